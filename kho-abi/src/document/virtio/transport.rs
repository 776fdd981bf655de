//! The state of a virtio-mmio transport (virtio 1.2, 4.2): what the driver has written to its registers, and how far its
//! queues have been worked off.

use alloc::format;
use alloc::vec::Vec;

use super::VirtioState;
use crate::document::DecodeError;
use crate::document::machine::decode_numbered;
use crate::document::node::Node;
use crate::document::record::{Reader, Record, to_node};
use crate::names;

/// A queue. Its addresses are the driver's words: whoever uses them asks whether RAM is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueV1 {
    /// Number of entries.
    pub size: u16,
    /// Whether the driver has set it up.
    pub ready: bool,
    /// Guest physical address of the descriptor table.
    pub descriptor_table: u64,
    /// The same of the available ring.
    pub available_ring: u64,
    /// The same of the used ring.
    pub used_ring: u64,
    /// Which entry of the available ring is the next to be taken; it counts on beyond the size.
    pub next_available: u16,
    /// Which entry of the used ring is the next to be filled.
    pub next_used: u16,
}

impl Record for QueueV1 {
    const COMPATIBLE: &'static str = "kho-vmm,virtio-queue-v1";

    fn encode(&self, node: Node) -> Node {
        let Self { size, ready, descriptor_table, available_ring, used_ring, next_available, next_used } = *self;
        node.with_u32("size", size.into())
            .with_u8("ready", ready.into())
            .with_u64("descriptor-table", descriptor_table)
            .with_u64("available-ring", available_ring)
            .with_u64("used-ring", used_ring)
            .with_u32("next-available", next_available.into())
            .with_u32("next-used", next_used.into())
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            size: reader.u16("size")?,
            ready: reader.flag("ready")?,
            descriptor_table: reader.u64("descriptor-table")?,
            available_ring: reader.u64("available-ring")?,
            used_ring: reader.u64("used-ring")?,
            next_available: reader.u16("next-available")?,
            next_used: reader.u16("next-used")?,
        })
    }
}

/// A device behind registers in the guest's memory. The registers have the specification's names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VirtioMmioV1 {
    /// DeviceFeaturesSel.
    pub device_features_select: u32,
    /// DriverFeaturesSel.
    pub driver_features_select: u32,
    /// The features that the driver has accepted.
    pub driver_features: u64,
    /// QueueSel.
    pub queue_select: u32,
    /// Status.
    pub status: u32,
    /// InterruptStatus.
    pub interrupt_status: u32,
    /// ConfigGeneration.
    pub config_generation: u32,
    /// Its queues.
    pub queues: Vec<QueueV1>,
    /// What it has beside the transport.
    pub device: VirtioState,
}

impl Record for VirtioMmioV1 {
    const COMPATIBLE: &'static str = "kho-vmm,virtio-mmio-v1";

    fn encode(&self, node: Node) -> Node {
        let Self {
            device_features_select,
            driver_features_select,
            driver_features,
            queue_select,
            status,
            interrupt_status,
            config_generation,
            queues,
            device,
        } = self;
        let numbered = queues.iter().enumerate();
        node.with_u32("device-features-select", *device_features_select)
            .with_u32("driver-features-select", *driver_features_select)
            .with_u64("driver-features", *driver_features)
            .with_u32("queue-select", *queue_select)
            .with_u32("status", *status)
            .with_u32("interrupt-status", *interrupt_status)
            .with_u32("config-generation", *config_generation)
            .with_children(numbered.map(|(number, queue)| to_node(&format!("{}@{number}", names::QUEUE), queue)))
            .with_child(device.to_node())
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            device_features_select: reader.u32("device-features-select")?,
            driver_features_select: reader.u32("driver-features-select")?,
            driver_features: reader.u64("driver-features")?,
            queue_select: reader.u32("queue-select")?,
            status: reader.u32("status")?,
            interrupt_status: reader.u32("interrupt-status")?,
            config_generation: reader.u32("config-generation")?,
            queues: decode_numbered(reader, names::QUEUE)?,
            device: reader.group(names::VIRTIO_DEVICE, VirtioState::decode)?,
        })
    }
}
