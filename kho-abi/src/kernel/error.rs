//! What can be wrong with what a kernel has handed over. No format of the kernel's: an error says which of them is broken, where.
//!
//! ```
//! use kho_abi::kernel::{Image, Limits, PageSize, Problem, radix};
//!
//! // The map's first table is on a page that was never handed over.
//! let memory = Image::new(PageSize::SMALL);
//! let error = radix::decode(&memory, 0x5000, &Limits::default(), "/map").unwrap_err();
//! assert!(error.path.starts_with("/map"));
//! assert!(matches!(error.problem, Problem::Unreadable(unreadable) if unreadable.address == 0x5000));
//! ```

use alloc::string::String;
use core::fmt::Display;

use super::Unreadable;
use crate::document::DecodeError;

/// Something that is not as the format wants it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {problem}")]
pub struct Error {
    /// How one gets there, for example `/LUO/sessions/vm@a/files`.
    pub path: String,
    /// What is wrong.
    pub problem: Problem,
}

impl Error {
    /// Says that there is `problem` at `path`.
    pub fn new(path: impl Into<String>, problem: impl Into<Problem>) -> Self {
        Self { path: path.into(), problem: problem.into() }
    }

    /// Says that something at `path` cannot be true.
    pub fn invalid(path: impl Into<String>, what: &'static str, reason: impl Display) -> Self {
        Self::new(path, Problem::Invalid { what, reason: alloc::format!("{reason}") })
    }
}

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// It leads to where there is no memory.
    #[error(transparent)]
    Unreadable(#[from] Unreadable),
    /// The bytes are no flattened device tree.
    #[error("no tree that the kernel writes: {0}")]
    Tree(#[from] DecodeError),
    /// Another version than those that are known here.
    #[error("its version is {found:?}, known here are {known}")]
    Version {
        /// What it says.
        found: String,
        /// What this program reads.
        known: &'static str,
    },
    /// An address that cannot be one.
    #[error("{what} is at {address:#x}, which is not aligned to {alignment:#x}")]
    Misaligned {
        /// What is there.
        what: &'static str,
        /// Where.
        address: u64,
        /// What its address must be a multiple of.
        alignment: u64,
    },
    /// A page is reached a second time: a circle, or two lists that share it.
    #[error("the page at {address:#x} is part of it twice")]
    Again {
        /// Its address.
        address: u64,
    },
    /// There is more of something than a host has.
    #[error("more than {max} {what}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// The limit.
        max: usize,
    },
    /// All is there, but it cannot be true.
    #[error("{what} {reason}")]
    Invalid {
        /// What.
        what: &'static str,
        /// Why not.
        reason: String,
    },
}
