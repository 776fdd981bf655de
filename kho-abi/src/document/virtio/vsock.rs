//! A vsock device's state: what outlives its connections, which end with the host's sockets.

use alloc::format;

use crate::document::DecodeError;
use crate::document::node::Node;
use crate::document::record::{Reader, Record};

/// A vsock device. Its connections do not travel: under the next kernel the driver is told that they are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VsockV1 {
    /// The guest's number (CID), which the driver has read once and uses ever since.
    pub cid: u32,
    /// The host's port of the next connection that a program of the host asks for. The guest may still have sockets with those
    /// before it.
    pub next_port: u32,
}

impl VsockV1 {
    /// The least number of a guest: those below are the hypervisor's, a guest's own and its host's.
    pub const CID_MIN: u32 = 3;
    /// The largest; the one behind it stands for any.
    pub const CID_MAX: u32 = u32::MAX - 1;
    /// The first of the host's ports that are given out. Those below are for programs with a port of their own.
    pub const PORT_FIRST: u32 = 1 << 30;
    /// The last.
    pub const PORT_LAST: u32 = (1 << 31) - 1;
}

impl Record for VsockV1 {
    const COMPATIBLE: &'static str = "kho-vmm,virtio-vsock-v1";

    fn encode(&self, node: Node) -> Node {
        let Self { cid, next_port } = self;
        node.with_u32("cid", *cid).with_u32("next-port", *next_port)
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let (cid, next_port) = (reader.u32("cid")?, reader.u32("next-port")?);
        if !(Self::CID_MIN..=Self::CID_MAX).contains(&cid) {
            return Err(reader.invalid("cid", format!("is {cid}, which no guest has")));
        }
        if !(Self::PORT_FIRST..=Self::PORT_LAST).contains(&next_port) {
            return Err(reader.invalid("next-port", format!("is {next_port}, which is none that is given out")));
        }
        Ok(Self { cid, next_port })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::record::{from_node, to_node};

    #[test]
    fn vsock_state_round_trips() {
        for (cid, next_port) in [(VsockV1::CID_MIN, VsockV1::PORT_FIRST), (VsockV1::CID_MAX, VsockV1::PORT_LAST)] {
            let state = VsockV1 { cid, next_port };
            assert_eq!(from_node::<VsockV1>(&to_node("device", &state)), Ok(state));
        }
    }

    #[test]
    fn vsock_state_that_cannot_be_is_refused() {
        let good = VsockV1 { cid: 3, next_port: VsockV1::PORT_FIRST };
        for cid in [0, 1, 2, u32::MAX] {
            assert!(from_node::<VsockV1>(&to_node("device", &VsockV1 { cid, ..good })).is_err(), "{cid}");
        }
        for next_port in [0, VsockV1::PORT_FIRST - 1, VsockV1::PORT_LAST + 1, u32::MAX] {
            assert!(from_node::<VsockV1>(&to_node("device", &VsockV1 { next_port, ..good })).is_err(), "{next_port}");
        }
    }
}
