//! What can be wrong with a document, on its way out and on its way in.
//!
//! Each names the place: the path of a node, an offset, a size. None of them is a bug of the reader: a document comes
//! from another process, another version, or another kernel, and any byte of it may be wrong.

use alloc::string::String;

use thiserror::Error;

/// A tree that is well sealed but does not hold what it must.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{path}: {problem}")]
pub struct DecodeError {
    /// The node, for example `/vcpus/vcpu@0`.
    pub path: String,
    /// What is wrong with it.
    pub problem: Problem,
}

impl DecodeError {
    /// Says that the node at `path` has `problem`.
    pub fn new(path: impl Into<String>, problem: Problem) -> Self {
        Self { path: path.into(), problem }
    }
}

/// What is wrong with a node.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Problem {
    /// The bytes are no flattened device tree of the one form that is written here.
    #[error("not a well-formed tree: {reason} (at byte {offset})")]
    Malformed {
        /// Which rule the bytes break.
        reason: String,
        /// Where in the tree's bytes.
        offset: usize,
    },
    /// Nodes are nested more deeply than any document's.
    #[error("nodes are nested more than {max} deep")]
    TooDeep {
        /// The limit.
        max: usize,
    },
    /// There are more of something than any document has.
    #[error("more than {max} {what}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// The limit.
        max: usize,
    },
    /// A name that no node or property can have.
    #[error("{name:?} cannot be a name here")]
    BadName {
        /// The name.
        name: String,
    },
    /// A property must be there and is not.
    #[error("property {name:?} is missing")]
    MissingProperty {
        /// Its name.
        name: String,
    },
    /// A property is there that this version does not know.
    #[error("property {name:?} is unknown")]
    UnknownProperty {
        /// Its name.
        name: String,
    },
    /// A property occurs twice.
    #[error("property {name:?} occurs twice")]
    DuplicateProperty {
        /// Its name.
        name: String,
    },
    /// A property's value has a size that its type cannot have.
    #[error("property {name:?} has {found} bytes instead of {expected}")]
    WrongSize {
        /// Its name.
        name: String,
        /// The size it must have, or that its size must be a multiple of.
        expected: usize,
        /// The size it has.
        found: usize,
    },
    /// A property that holds text is not UTF-8 ended by its only NUL.
    #[error("property {name:?} is no text ended by a NUL")]
    NotText {
        /// Its name.
        name: String,
    },
    /// A node must be there and is not.
    #[error("node {name:?} is missing")]
    MissingNode {
        /// Its name.
        name: String,
    },
    /// A node is there that this version does not know.
    #[error("node {name:?} is unknown")]
    UnknownNode {
        /// Its name.
        name: String,
    },
    /// Two nodes of one parent have the same name.
    #[error("node {name:?} occurs twice")]
    DuplicateNode {
        /// Their name.
        name: String,
    },
    /// The node is of another kind or version than this place wants.
    #[error("is {found:?} where {expected:?} is wanted")]
    Incompatible {
        /// The `compatible` this version reads here.
        expected: String,
        /// The one it found.
        found: String,
    },
    /// All is there, but it cannot be true.
    #[error("{what} {reason}")]
    Invalid {
        /// What: a property, or a thing the node describes.
        what: &'static str,
        /// Why not.
        reason: String,
    },
}

/// A value that cannot be written as a document. Nothing has been written.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// The value would be refused by whoever reads it.
    #[error(transparent)]
    Invalid(#[from] DecodeError),
    /// The sealed document would exceed the cap.
    #[error("the document would have {length} bytes, more than the {cap} that any reader accepts")]
    TooLarge {
        /// Its length, with the header.
        length: usize,
        /// [`header::CAP`](super::header::CAP).
        cap: usize,
    },
    /// The FDT writer refused what had been checked before.
    #[error("the tree cannot be written: {reason}")]
    Writer {
        /// In the writer's words.
        reason: String,
    },
}

/// Bytes that are not a sealed document.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// More bytes than a document may have, trailing zeros included.
    #[error("{length} bytes are more than the {cap} that a document may have")]
    TooLarge {
        /// How many there are.
        length: usize,
        /// [`header::CAP`](super::header::CAP).
        cap: usize,
    },
    /// Not even a header.
    #[error("{length} bytes are less than a header")]
    TooShort {
        /// How many there are.
        length: usize,
    },
    /// It is something else, or was never written.
    #[error("it begins with \"{}\" instead of \"{}\"", .found.escape_ascii(), .expected.escape_ascii())]
    Magic {
        /// The magic wanted.
        expected: [u8; 8],
        /// The first eight bytes.
        found: [u8; 8],
    },
    /// Written by a version with another header.
    #[error("its header has version {found}, this program reads version {supported}")]
    Version {
        /// The version it states.
        found: u32,
        /// The one version read here.
        supported: u32,
    },
    /// A field that must be zero is not.
    #[error("its header's reserved field is {found:#x} instead of zero")]
    Reserved {
        /// The field's value.
        found: u32,
    },
    /// The header speaks of more bytes than there are: the document was cut short.
    #[error("its header states a body of {stated} bytes, {available} are there")]
    Length {
        /// The length stated.
        stated: u64,
        /// The bytes behind the header.
        available: usize,
    },
    /// Some byte has changed since it was sealed.
    #[error("its checksum is {computed:#018x}, its header states {stated:#018x}")]
    Checksum {
        /// The sum stated.
        stated: u64,
        /// The sum of what is there.
        computed: u64,
    },
    /// There is something behind the document.
    #[error("the byte at {offset}, behind the document, is not zero")]
    Tail {
        /// Where the first such byte is.
        offset: usize,
    },
}

/// Why bytes are not the document they should be.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DocumentError {
    /// The seal is broken or of another kind. Nothing behind the header has been looked at.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// The seal is good, the content is not.
    #[error(transparent)]
    Body(#[from] DecodeError),
}

/// A raw struct that does not fit this kernel's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{found} bytes do not fit into {expected}: the byte at {offset} is not zero")]
pub struct PayloadError {
    /// The size of the struct here.
    pub expected: usize,
    /// The size of the payload.
    pub found: usize,
    /// Its first byte beyond `expected` that is not zero.
    pub offset: usize,
}
