//! Guest RAM: which part of which preserved memfd stands at which guest physical address.

use alloc::format;

use super::DecodeError;
use super::node::Node;
use super::record::{Reader, Record, to_node};
use crate::{names, tokens};

/// What addresses, sizes and offsets are multiples of: the smallest page of any architecture.
pub const PAGE: u64 = 4096;

/// One range of guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RamRangeV1 {
    /// Guest physical address.
    pub gpa: u64,
    /// Size in bytes.
    pub size: u64,
    /// The memfd, by its token in the VM's session.
    pub token: u64,
    /// Where in the memfd the range begins.
    pub offset: u64,
}

impl RamRangeV1 {
    /// The node `range@<gpa>`.
    pub fn to_node(&self) -> Node {
        to_node(&format!("{}@{:x}", names::RANGE, self.gpa), self)
    }

    /// The first guest physical address behind the range.
    pub fn end(&self) -> Option<u64> {
        self.gpa.checked_add(self.size)
    }
}

impl Record for RamRangeV1 {
    const COMPATIBLE: &'static str = "kho-vmm,ram-range-v1";

    fn encode(&self, node: Node) -> Node {
        let Self { gpa, size, token, offset } = *self;
        node.with_u64("gpa", gpa).with_u64("size", size).with_u64("token", token).with_u64("offset", offset)
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let range = Self {
            gpa: reader.u64("gpa")?,
            size: reader.u64("size")?,
            token: reader.u64("token")?,
            offset: reader.u64("offset")?,
        };
        if reader.unit_address() != Some(&format!("{:x}", range.gpa)) {
            return Err(reader.invalid("gpa", "is not the one in the node's name"));
        }
        if range.size == 0 {
            return Err(reader.invalid("size", "is zero"));
        }
        for (what, value) in [("gpa", range.gpa), ("size", range.size), ("offset", range.offset)] {
            if !value.is_multiple_of(PAGE) {
                return Err(reader.invalid(what, format!("is {value:#x}, no multiple of a page")));
            }
        }
        if range.end().is_none() || range.offset.checked_add(range.size).is_none() {
            return Err(reader.invalid("size", "reaches beyond the last address"));
        }
        if range.token < tokens::RAM_FIRST {
            return Err(reader.invalid("token", format!("is {}, which is never guest memory", range.token)));
        }
        Ok(range)
    }
}
