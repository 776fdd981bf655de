//! Records: typed values that are nodes, each with its version in `compatible`, read strictly.
//!
//! Strict means that what a record reads is all there is: a property or a child that nobody asked for is an error, as
//! it is state that would be lost. So a layout cannot change silently: it needs a new `compatible`.

use alloc::collections::BTreeSet;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use super::node::Node;
use super::{DecodeError, Problem};

/// The property that every record's node has.
pub const COMPATIBLE: &str = "compatible";

/// A value with a node of its own.
pub trait Record: Sized {
    /// What the node calls itself, with a version: `kho-vmm,serial-v1`.
    const COMPATIBLE: &'static str;

    /// Adds this value's properties and children to `node`, which has its name and `compatible`.
    ///
    /// Take `self` apart exhaustively (`let Self { a, b } = self;`), so that a forgotten field does not compile.
    fn encode(&self, node: Node) -> Node;

    /// Reads everything that [`encode`](Record::encode) writes.
    ///
    /// # Errors
    /// When something is missing, of another size, or cannot be true.
    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError>;
}

/// The node, called `name`, that holds `record`.
pub fn to_node<R: Record>(name: &str, record: &R) -> Node {
    record.encode(Node::new(name).with_str(COMPATIBLE, R::COMPATIBLE))
}

/// The record that `node` holds.
///
/// # Errors
/// When the node is of another kind or version, lacks something, or has something that the record did not read.
pub fn from_node<R: Record>(node: &Node) -> Result<R, DecodeError> {
    read_node(node, |reader| reader.record())
}

/// What `read` makes of `node`: for a node that can hold one of several records.
///
/// # Errors
/// When `read` fails, or leaves something.
pub fn read_node<T>(
    node: &Node,
    read: impl FnOnce(&mut Reader<'_>) -> Result<T, DecodeError>,
) -> Result<T, DecodeError> {
    Reader::new(node, &node.name).read(read)
}

/// Reads one node and remembers what has been read.
#[derive(Debug)]
pub struct Reader<'a> {
    node: &'a Node,
    path: String,
    properties: BTreeSet<&'a str>,
    children: BTreeSet<&'a str>,
}

impl<'a> Reader<'a> {
    fn new(node: &'a Node, path: &str) -> Self {
        let path = if path.starts_with('/') { path.to_string() } else { format!("/{path}") };
        Self { node, path, properties: BTreeSet::new(), children: BTreeSet::new() }
    }

    /// The node's path, `/vcpus/vcpu@0`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The part of the node's name behind `@`.
    pub fn unit_address(&self) -> Option<&'a str> {
        self.node.unit_address()
    }

    /// An error about this node.
    pub fn error(&self, problem: Problem) -> DecodeError {
        DecodeError::new(self.path.clone(), problem)
    }

    /// An error about something this node says that cannot be true.
    pub fn invalid(&self, what: &'static str, reason: impl Into<String>) -> DecodeError {
        self.error(Problem::Invalid { what, reason: reason.into() })
    }

    /// The value of a property that may be absent.
    pub fn optional_bytes(&mut self, name: &str) -> Option<&'a [u8]> {
        let (name, value) = self.node.properties.get_key_value(name)?;
        self.properties.insert(name);
        Some(value)
    }

    fn value(&mut self, name: &str) -> Result<&'a [u8], DecodeError> {
        self.optional_bytes(name).ok_or_else(|| self.error(Problem::MissingProperty { name: name.into() }))
    }

    fn array<const N: usize>(&self, name: &str, value: &[u8]) -> Result<[u8; N], DecodeError> {
        value
            .try_into()
            .map_err(|_| self.error(Problem::WrongSize { name: name.into(), expected: N, found: value.len() }))
    }

    /// The value of a property.
    ///
    /// # Errors
    /// When it is missing.
    pub fn bytes(&mut self, name: &str) -> Result<Vec<u8>, DecodeError> {
        Ok(self.value(name)?.to_vec())
    }

    /// An integer of one byte.
    ///
    /// # Errors
    /// When it is missing or of another size; so for the other integers.
    pub fn u8(&mut self, name: &str) -> Result<u8, DecodeError> {
        let value = self.value(name)?;
        self.array(name, value).map(u8::from_be_bytes)
    }

    /// An integer of 32 bits.
    ///
    /// # Errors
    /// When it is missing or of another size.
    pub fn u32(&mut self, name: &str) -> Result<u32, DecodeError> {
        let value = self.value(name)?;
        self.array(name, value).map(u32::from_be_bytes)
    }

    /// An integer of 64 bits.
    ///
    /// # Errors
    /// When it is missing or of another size.
    pub fn u64(&mut self, name: &str) -> Result<u64, DecodeError> {
        let value = self.value(name)?;
        self.array(name, value).map(u64::from_be_bytes)
    }

    /// An integer of 64 bits that may be absent.
    ///
    /// # Errors
    /// When it is of another size.
    pub fn optional_u64(&mut self, name: &str) -> Result<Option<u64>, DecodeError> {
        match self.optional_bytes(name) {
            Some(value) => self.array(name, value).map(u64::from_be_bytes).map(Some),
            None => Ok(None),
        }
    }

    /// An integer of 32 bits that may be absent.
    ///
    /// # Errors
    /// When it is of another size.
    pub fn optional_u32(&mut self, name: &str) -> Result<Option<u32>, DecodeError> {
        match self.optional_bytes(name) {
            Some(value) => self.array(name, value).map(u32::from_be_bytes).map(Some),
            None => Ok(None),
        }
    }

    /// Text.
    ///
    /// # Errors
    /// When it is missing, not UTF-8, or not ended by its only NUL.
    pub fn string(&mut self, name: &str) -> Result<String, DecodeError> {
        let value = self.value(name)?;
        value
            .strip_suffix(&[0])
            .filter(|text| !text.contains(&0))
            .and_then(|text| str::from_utf8(text).ok())
            .map(ToString::to_string)
            .ok_or_else(|| self.error(Problem::NotText { name: name.into() }))
    }

    /// A list of texts.
    ///
    /// # Errors
    /// When it is missing, not UTF-8, or the last is not ended by a NUL.
    pub fn strings(&mut self, name: &str) -> Result<Vec<String>, DecodeError> {
        let value = self.value(name)?;
        if value.is_empty() {
            return Ok(Vec::new());
        }
        value
            .strip_suffix(&[0])
            .and_then(|texts| str::from_utf8(texts).ok())
            .map(|texts| texts.split('\0').map(ToString::to_string).collect())
            .ok_or_else(|| self.error(Problem::NotText { name: name.into() }))
    }

    /// A flag: one byte, 0 or 1.
    ///
    /// # Errors
    /// When it is missing, of another size, or has another value.
    pub fn flag(&mut self, name: &'static str) -> Result<bool, DecodeError> {
        match self.u8(name)? {
            0 => Ok(false),
            1 => Ok(true),
            value => Err(self.invalid(name, format!("is {value}, neither 0 nor 1"))),
        }
    }

    /// An integer of 16 bits, which takes 32.
    ///
    /// # Errors
    /// When it is missing, of another size, or larger.
    pub fn u16(&mut self, name: &'static str) -> Result<u16, DecodeError> {
        let value = self.u32(name)?;
        u16::try_from(value).map_err(|_| self.invalid(name, format!("is {value}, more than 16 bits can hold")))
    }

    /// A list of entries of `N` bytes each.
    ///
    /// # Errors
    /// When it is missing or its size is no multiple of `N`.
    pub fn entries<const N: usize>(&mut self, name: &str) -> Result<&'a [[u8; N]], DecodeError> {
        let value = self.value(name)?;
        match value.as_chunks::<N>() {
            (entries, []) => Ok(entries),
            _ => Err(self.error(Problem::WrongSize { name: name.into(), expected: N, found: value.len() })),
        }
    }

    /// The record in the child called `name`.
    ///
    /// # Errors
    /// When there is no such child, or it does not decode.
    pub fn child<R: Record>(&mut self, name: &str) -> Result<R, DecodeError> {
        self.group(name, |reader| reader.record())
    }

    /// The record in the child called `name`, which may be absent.
    ///
    /// # Errors
    /// When it is there and does not decode.
    pub fn optional_child<R: Record>(&mut self, name: &str) -> Result<Option<R>, DecodeError> {
        if self.node.child(name).is_some() { self.child(name).map(Some) } else { Ok(None) }
    }

    /// The records in all children called `prefix@…`, in order.
    ///
    /// # Errors
    /// When one of them does not decode, or two have the same name.
    pub fn children<R: Record>(&mut self, prefix: &str) -> Result<Vec<R>, DecodeError> {
        self.each(prefix, |reader| reader.record())
    }

    /// What `read` makes of the child called `name`; afterwards nothing in it may be unread.
    ///
    /// # Errors
    /// When there is no such child, or two, or `read` fails, or leaves something.
    pub fn group<T>(
        &mut self,
        name: &str,
        read: impl FnOnce(&mut Reader<'_>) -> Result<T, DecodeError>,
    ) -> Result<T, DecodeError> {
        let mut found = self.node.children.iter().filter(|child| child.name == name);
        let Some(child) = found.next() else {
            return Err(self.error(Problem::MissingNode { name: name.into() }));
        };
        if found.next().is_some() {
            return Err(self.error(Problem::DuplicateNode { name: name.into() }));
        }
        self.children.insert(&child.name);
        self.reader_of(child).read(read)
    }

    /// What `read` makes of every child called `prefix@…`, in order; afterwards nothing in them may be unread.
    ///
    /// # Errors
    /// When two have the same name, or `read` fails for one, or leaves something in it.
    pub fn each<T>(
        &mut self,
        prefix: &str,
        mut read: impl FnMut(&mut Reader<'_>) -> Result<T, DecodeError>,
    ) -> Result<Vec<T>, DecodeError> {
        let mut values = Vec::new();
        for child in &self.node.children {
            if !child.name.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('@')) {
                continue;
            }
            if !self.children.insert(&child.name) {
                return Err(self.error(Problem::DuplicateNode { name: child.name.clone() }));
            }
            values.push(self.reader_of(child).read(&mut read)?);
        }
        Ok(values)
    }

    /// What this node calls itself: decide by it which record to read where several can stand, then call
    /// [`record`](Reader::record).
    ///
    /// # Errors
    /// When it does not say.
    pub fn compatible(&mut self) -> Result<String, DecodeError> {
        self.string(COMPATIBLE)
    }

    /// The record in this node itself.
    ///
    /// # Errors
    /// When the node is of another kind or version, or the record does not decode.
    pub fn record<R: Record>(&mut self) -> Result<R, DecodeError> {
        let found = self.compatible()?;
        if found != R::COMPATIBLE {
            return Err(self.error(Problem::Incompatible { expected: R::COMPATIBLE.into(), found }));
        }
        R::decode(self)
    }

    /// Refuses what nobody has read.
    ///
    /// # Errors
    /// When a property or a child is left.
    pub fn finish(self) -> Result<(), DecodeError> {
        if let Some(name) = self.node.properties.keys().find(|name| !self.properties.contains(name.as_str())) {
            return Err(self.error(Problem::UnknownProperty { name: name.clone() }));
        }
        if let Some(child) = self.node.children.iter().find(|child| !self.children.contains(child.name.as_str())) {
            return Err(self.error(Problem::UnknownNode { name: child.name.clone() }));
        }
        Ok(())
    }

    fn reader_of<'b>(&self, child: &'b Node) -> Reader<'b> {
        let parent = self.path.strip_suffix('/').unwrap_or(&self.path);
        Reader::new(child, &format!("{parent}/{}", child.name))
    }

    fn read<T>(mut self, read: impl FnOnce(&mut Self) -> Result<T, DecodeError>) -> Result<T, DecodeError> {
        let value = read(&mut self)?;
        self.finish()?;
        Ok(value)
    }
}
