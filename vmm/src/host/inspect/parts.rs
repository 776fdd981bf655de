//! Properties in parts: what a payload of bytes consists of, by the names that the field has for it. A document of any
//! architecture is taken apart on any machine.

mod aarch64;
mod x86_64;

use std::collections::BTreeSet;

use kho_abi::document::node::Node;
use kho_abi::document::record::Record;
use kho_abi::document::{aarch64 as arm, x86_64 as x86};

/// A part of a property.
#[derive(Debug, PartialEq, Eq)]
pub struct Part {
    /// What it is called.
    pub name: String,
    /// Its value, the lowest byte first.
    pub value: Vec<u8>,
}

/// The parts of a node's property, each under a name of its own. None where nothing is known of what is in it, or where it is not
/// what it should be: a file need not be one that can be restored.
pub fn of(node: &Node, property: &str) -> Option<Vec<Part>> {
    let compatible = std::str::from_utf8(node.property("compatible")?.strip_suffix(&[0])?).ok()?;
    let bytes = node.property(property)?;
    let cutter = Cutter { property, rest: bytes, at: 0, parts: Vec::new() };
    let parts = match compatible {
        x86::VcpuV1::COMPATIBLE => x86_64::vcpu(node, cutter)?,
        x86::PlatformV1::COMPATIBLE => x86_64::platform(cutter)?,
        arm::VcpuV1::COMPATIBLE => aarch64::vcpu(cutter)?,
        arm::GicV1::COMPATIBLE => aarch64::gic(cutter)?,
        arm::RedistributorV1::COMPATIBLE => aarch64::redistributor(cutter)?,
        arm::ItsV1::COMPATIBLE => aarch64::translation_service(cutter)?,
        _ => return None,
    };
    let names: BTreeSet<&str> = parts.iter().map(|part| part.name.as_str()).collect();
    (names.len() == parts.len()).then_some(parts)
}

/// Where bytes have no name, they are told in words of so many.
pub const WORD: usize = 8;

/// Takes a property apart, from its beginning on. What a struct has is there as far as it goes: it may be of a kernel in which it
/// was shorter.
struct Cutter<'a> {
    property: &'a str,
    rest: &'a [u8],
    at: usize,
    parts: Vec<Part>,
}

impl<'a> Cutter<'a> {
    fn take(&mut self, size: usize) -> &'a [u8] {
        let (taken, rest) = self.rest.split_at(size.min(self.rest.len()));
        self.rest = rest;
        self.at += taken.len();
        taken
    }

    /// Next is a field of that size, lowest byte first.
    fn field(mut self, name: impl Into<String>, size: usize) -> Self {
        let value = self.take(size).to_vec();
        if !value.is_empty() {
            self.parts.push(Part { name: name.into(), value });
        }
        self
    }

    /// Next are fields of the same size.
    fn fields<N: Into<String>>(self, names: impl IntoIterator<Item = N>, size: usize) -> Self {
        names.into_iter().fold(self, |cutter, name| cutter.field(name, size))
    }

    /// Next are so many bytes without a name.
    fn gap(mut self, size: usize) -> Self {
        let end = self.at.saturating_add(size).min(self.at + self.rest.len());
        while self.at < end {
            let name = format!("{} at byte {}", self.property, self.at);
            let size = WORD.min(end - self.at);
            self = self.field(name, size);
        }
        self
    }

    /// All parts; what is left has no name.
    fn finish(self) -> Vec<Part> {
        self.gap(usize::MAX).parts
    }

    /// The parts of a list whose entries are a number of 32 bits and a value, both with the highest byte first.
    fn entries(mut self, size: usize, name: impl Fn(u32) -> String) -> Option<Vec<Part>> {
        while !self.rest.is_empty() {
            let number = u32::from_be_bytes(self.take(4).try_into().ok()?);
            let mut value = self.take(size).to_vec();
            if value.len() < size {
                return None;
            }
            value.reverse();
            self.parts.push(Part { name: name(number), value });
        }
        Some(self.parts)
    }
}
