//! A vCPU of any architecture.
//!
//! A further architecture is a file with its records, and a variant here and in [`platform`](super::platform).

use alloc::boxed::Box;
use alloc::format;

pub use super::{aarch64, x86_64};

use super::node::Node;
use super::record::{Reader, Record, to_node};
use super::{DecodeError, Problem};
use crate::names;

/// One vCPU's state. `compatible` says whose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VcpuState {
    /// Of an x86_64 machine.
    X86_64(Box<x86_64::VcpuV1>),
    /// Of an aarch64 machine.
    Aarch64(Box<aarch64::VcpuV1>),
}

impl VcpuState {
    /// The vCPU's number.
    pub fn id(&self) -> u32 {
        match self {
            Self::X86_64(vcpu) => vcpu.id,
            Self::Aarch64(vcpu) => vcpu.id,
        }
    }

    /// The name of the architecture it belongs to.
    pub fn architecture(&self) -> &'static str {
        match self {
            Self::X86_64(_) => x86_64::NAME,
            Self::Aarch64(_) => aarch64::NAME,
        }
    }

    /// The node `vcpu@<id>`.
    pub fn to_node(&self) -> Node {
        let name = format!("{}@{:x}", names::VCPU, self.id());
        match self {
            Self::X86_64(vcpu) => to_node(&name, vcpu.as_ref()),
            Self::Aarch64(vcpu) => to_node(&name, vcpu.as_ref()),
        }
    }

    /// Reads a node of any architecture.
    ///
    /// # Errors
    /// When `compatible` names none that is known here, or the record does not decode.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let vcpu = match reader.compatible()?.as_str() {
            x86_64::VcpuV1::COMPATIBLE => Self::X86_64(Box::new(reader.record()?)),
            aarch64::VcpuV1::COMPATIBLE => Self::Aarch64(Box::new(reader.record()?)),
            found => {
                let expected = [x86_64::VcpuV1::COMPATIBLE, aarch64::VcpuV1::COMPATIBLE].join(" or ");
                return Err(reader.error(Problem::Incompatible { expected, found: found.into() }));
            }
        };
        if reader.unit_address() != Some(&format!("{:x}", vcpu.id())) {
            return Err(reader.invalid("id", "is not the one in the node's name"));
        }
        Ok(vcpu)
    }
}
