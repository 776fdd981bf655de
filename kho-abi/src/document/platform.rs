//! What belongs to the machine but to no vCPU and no device of ours, of any architecture.

pub use super::{aarch64, x86_64};

use super::node::Node;
use super::record::{Reader, Record, to_node};
use super::{DecodeError, Problem};
use crate::names;

/// The platform's state. `compatible` says whose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PlatformState {
    /// Of an x86_64 machine.
    X86_64(x86_64::PlatformV1),
    /// Of an aarch64 machine.
    Aarch64(aarch64::PlatformV1),
}

impl PlatformState {
    /// The name of the architecture it belongs to.
    pub fn architecture(&self) -> &'static str {
        match self {
            Self::X86_64(_) => x86_64::NAME,
            Self::Aarch64(_) => aarch64::NAME,
        }
    }

    /// For how many vCPUs it has state of their own, where it has any.
    pub fn vcpus(&self) -> Option<usize> {
        match self {
            Self::X86_64(_) => None,
            Self::Aarch64(platform) => Some(platform.gic.redistributors.len()),
        }
    }

    /// The node `platform`.
    pub fn to_node(&self) -> Node {
        match self {
            Self::X86_64(platform) => to_node(names::PLATFORM, platform),
            Self::Aarch64(platform) => to_node(names::PLATFORM, platform),
        }
    }

    /// Reads a node of any architecture.
    ///
    /// # Errors
    /// When `compatible` names none that is known here, or the record does not decode.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        match reader.compatible()?.as_str() {
            x86_64::PlatformV1::COMPATIBLE => Ok(Self::X86_64(reader.record()?)),
            aarch64::PlatformV1::COMPATIBLE => Ok(Self::Aarch64(reader.record()?)),
            found => {
                let expected = [x86_64::PlatformV1::COMPATIBLE, aarch64::PlatformV1::COMPATIBLE].join(" or ");
                Err(reader.error(Problem::Incompatible { expected, found: found.into() }))
            }
        }
    }
}
