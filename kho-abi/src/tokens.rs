//! The numbers under which files are put into a LUO session.
//!
//! A token is chosen by user space and means something only within one session. All of a VM's files share that VM's
//! session; the index has a session of its own ([`names::INDEX_SESSION`](crate::names::INDEX_SESSION)).

/// A VM's state memfd: the sealed document, followed by zeros up to the file's capacity.
pub const STATE: u64 = 1;

/// The index memfd, in the index's own session.
pub const INDEX: u64 = 2;

/// The first of a VM's RAM memfds; further ones count up from here. Nothing below it names guest memory.
pub const RAM_FIRST: u64 = 0x100;
