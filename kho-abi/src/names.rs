//! Names that both sides of a live update must agree on: those of sessions, of VMs, and of the nodes in a document.

use alloc::format;
use alloc::string::String;

/// The session that holds the index. LUO cannot list its sessions, so this name is the one that a new kernel's user
/// space has to know beforehand; it finds all others in the index.
pub const INDEX_SESSION: &str = "kho-vmm";

/// The longest name of a VM, in bytes, so that its session's name stays within LUO's 63.
pub const VM_NAME_MAX: usize = 48;

/// The record of what the operator asked for.
pub const CONFIG: &str = "config";
/// The group of RAM ranges.
pub const MEMORY: &str = "memory";
/// One RAM range, `range@<guest physical address>`.
pub const RANGE: &str = "range";
/// What belongs to the machine but to no vCPU and no device of ours: interrupt controllers, timers, the clock.
pub const PLATFORM: &str = "platform";
/// The interrupt controller of an aarch64 machine.
pub const GIC: &str = "gic";
/// What a GICv3 has for one vCPU, `redistributor@<MPIDR>`.
pub const REDISTRIBUTOR: &str = "redistributor";
/// The interrupt translation service of a GICv3.
pub const ITS: &str = "its";
/// The real-time clock of an aarch64 machine.
pub const RTC: &str = "rtc";
/// The group of vCPUs.
pub const VCPUS: &str = "vcpus";
/// One vCPU, `vcpu@<id>`.
pub const VCPU: &str = "vcpu";
/// The group of devices.
pub const DEVICES: &str = "devices";
/// The first serial port.
pub const SERIAL: &str = "serial@3f8";
/// Its registers, where it has more than these.
pub const PORT: &str = "port";
/// One virtio device, `virtio@<slot>`.
pub const VIRTIO: &str = "virtio";
/// One of its queues, `queue@<number>`.
pub const QUEUE: &str = "queue";
/// What it has beside the transport.
pub const VIRTIO_DEVICE: &str = "device";
/// The marks that concern the whole host.
pub const TIMELINE: &str = "timeline";
/// The host's wall clock in the index.
pub const CLOCK: &str = "clock";
/// The group of VMs in the index.
pub const VMS: &str = "vms";
/// One VM in the index, `vm@<name>`.
pub const VM: &str = "vm";
/// The marks that concern one VM.
pub const MARKS: &str = "marks";

/// Whether `name` can be a VM's: 1 to [`VM_NAME_MAX`] characters of `[A-Za-z0-9_-]`, the first a letter or digit.
///
/// Such a name is safe as a file name, in a session's name and as the unit address of a node.
pub fn is_valid_vm_name(name: &str) -> bool {
    name.len() <= VM_NAME_MAX
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name.chars().all(|letter| letter.is_ascii_alphanumeric() || matches!(letter, '_' | '-'))
}

/// The name of the session that carries the VM called `vm`, or `None` where that cannot be a VM's name.
pub fn session_name(vm: &str) -> Option<String> {
    is_valid_vm_name(vm).then(|| format!("{INDEX_SESSION}.{vm}"))
}
