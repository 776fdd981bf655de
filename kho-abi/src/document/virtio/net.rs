//! A network device's state: what the driver knows of it beside the features.

use crate::document::DecodeError;
use crate::document::node::Node;
use crate::document::record::{Reader, Record};

/// A network device. What the driver wants of offloads lies in the features, which the transport keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetV1 {
    /// The device's address, which the driver has read once and uses ever since.
    pub mac: [u8; 6],
    /// The driver has been asked to announce itself, and has not said yet that it did.
    pub announce: bool,
}

impl Record for NetV1 {
    const COMPATIBLE: &'static str = "kho-vmm,virtio-net-v1";

    fn encode(&self, node: Node) -> Node {
        let Self { mac, announce } = self;
        node.with_bytes("mac", *mac).with_u8("announce", (*announce).into())
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let mac = match *reader.entries::<6>("mac")? {
            [mac] => mac,
            _ => return Err(reader.invalid("mac", "is not one address")),
        };
        if mac[0] & 1 != 0 || mac == [0; 6] {
            return Err(reader.invalid("mac", "is not an address that one device can have"));
        }
        let announce = match reader.u8("announce")? {
            0 => false,
            1 => true,
            _ => return Err(reader.invalid("announce", "is neither 0 nor 1")),
        };
        Ok(Self { mac, announce })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::record::{from_node, to_node};

    #[test]
    fn network_state_round_trips() {
        for announce in [false, true] {
            let state = NetV1 { mac: [2, 3, 4, 5, 6, 7], announce };
            assert_eq!(from_node::<NetV1>(&to_node("device", &state)).unwrap(), state);
        }
    }

    #[test]
    fn network_state_that_cannot_be_true_is_refused() {
        let good = to_node("device", &NetV1 { mac: [2, 3, 4, 5, 6, 7], announce: false });
        for mac in [&[][..], &[2, 3, 4, 5, 6], &[0; 6], &[1, 2, 3, 4, 5, 6], &[2; 12]] {
            assert!(from_node::<NetV1>(&good.clone().with_bytes("mac", mac)).is_err(), "{mac:?}");
        }
        assert!(from_node::<NetV1>(&good.with_u8("announce", 2)).is_err());
    }
}
