//! A node: named properties and named children, the form in which all data of a document meet.

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;

/// One node of a tree. Properties have no order (they are written sorted), children have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// `name` or `name@unit-address`; the root's is empty.
    pub name: String,
    /// Values by name. Integers are big-endian and text ends with a NUL, as in any device tree.
    pub properties: BTreeMap<String, Vec<u8>>,
    /// The children, in order.
    pub children: Vec<Node>,
}

impl Node {
    /// A node without properties and children.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    /// Adds an integer of one byte. As all setters it replaces what the name stood for.
    pub fn with_u8(self, name: &str, value: u8) -> Self {
        self.with_bytes(name, [value])
    }

    /// Adds an integer of 32 bits.
    pub fn with_u32(self, name: &str, value: u32) -> Self {
        self.with_bytes(name, value.to_be_bytes())
    }

    /// Adds an integer of 64 bits.
    pub fn with_u64(self, name: &str, value: u64) -> Self {
        self.with_bytes(name, value.to_be_bytes())
    }

    /// Adds an integer of 64 bits where there is one.
    pub fn with_optional_u64(self, name: &str, value: Option<u64>) -> Self {
        match value {
            Some(value) => self.with_u64(name, value),
            None => self,
        }
    }

    /// Adds an integer of 32 bits where there is one.
    pub fn with_optional_u32(self, name: &str, value: Option<u32>) -> Self {
        match value {
            Some(value) => self.with_u32(name, value),
            None => self,
        }
    }

    /// Adds text, ended by a NUL. Text that contains a NUL itself is refused by whoever reads it.
    pub fn with_str(self, name: &str, value: &str) -> Self {
        let mut bytes = Vec::with_capacity(value.len() + 1);
        bytes.extend_from_slice(value.as_bytes());
        bytes.push(0);
        self.with_bytes(name, bytes)
    }

    /// Adds a list of texts, each ended by a NUL.
    pub fn with_strings<'a>(self, name: &str, values: impl IntoIterator<Item = &'a str>) -> Self {
        let bytes: Vec<u8> = values.into_iter().flat_map(|value| value.bytes().chain([0])).collect();
        self.with_bytes(name, bytes)
    }

    /// Adds bytes as they are.
    pub fn with_bytes(mut self, name: &str, value: impl Into<Vec<u8>>) -> Self {
        self.properties.insert(name.into(), value.into());
        self
    }

    /// Adds bytes where there are some.
    pub fn with_optional_bytes(self, name: &str, value: Option<&[u8]>) -> Self {
        match value {
            Some(value) => self.with_bytes(name, value),
            None => self,
        }
    }

    /// Adds a child behind those already there.
    pub fn with_child(mut self, child: Node) -> Self {
        self.children.push(child);
        self
    }

    /// Adds children behind those already there.
    pub fn with_children(mut self, children: impl IntoIterator<Item = Node>) -> Self {
        self.children.extend(children);
        self
    }

    /// The value of a property.
    pub fn property(&self, name: &str) -> Option<&[u8]> {
        self.properties.get(name).map(Vec::as_slice)
    }

    /// The first child of that name.
    pub fn child(&self, name: &str) -> Option<&Node> {
        self.children.iter().find(|child| child.name == name)
    }

    /// The part of the name behind `@`.
    pub fn unit_address(&self) -> Option<&str> {
        self.name.split_once('@').map(|(_, address)| address)
    }
}
