//! What an x86_64 machine consists of: the state that KVM gives out, as raw structs under their own names.
//!
//! Here a struct is bytes. Its size depends on the kernel, so it is for whoever hands it to KVM to fit it
//! ([`payload::fit`](super::payload::fit)) and to judge what it says.

use alloc::vec::Vec;

use super::DecodeError;
use super::node::Node;
use super::record::{Reader, Record};

/// The architecture's name in documents.
pub const NAME: &str = "x86_64";

/// The size of an entry in the list of MSRs: index and value.
const MSR: usize = 12;

/// One vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VcpuV1 {
    /// The vCPU's number, as for `KVM_CREATE_VCPU`.
    pub id: u32,
    /// `struct kvm_cpuid_entry2[]`.
    pub cpuid: Vec<u8>,
    /// `struct kvm_regs`.
    pub regs: Vec<u8>,
    /// `struct kvm_sregs`.
    pub sregs: Vec<u8>,
    /// `struct kvm_sregs2`, where the kernel has it.
    pub sregs2: Option<Vec<u8>>,
    /// `struct kvm_xsave`, as long as `KVM_GET_XSAVE2` makes it.
    pub xsave: Vec<u8>,
    /// `struct kvm_xcrs`.
    pub xcrs: Vec<u8>,
    /// `struct kvm_debugregs`.
    pub debug_registers: Vec<u8>,
    /// `struct kvm_lapic_state`.
    pub lapic: Vec<u8>,
    /// `struct kvm_mp_state`.
    pub mp_state: Vec<u8>,
    /// `struct kvm_vcpu_events`.
    pub events: Vec<u8>,
    /// MSRs as index and value, in the order in which they were read.
    pub msrs: Vec<(u32, u64)>,
    /// The guest's TSC frequency in kHz.
    pub tsc_khz: u32,
    /// What is added to the host's TSC, where the kernel tells it.
    pub tsc_offset: Option<u64>,
}

impl Record for VcpuV1 {
    const COMPATIBLE: &'static str = "kho-vmm,x86_64-vcpu-v1";

    fn encode(&self, node: Node) -> Node {
        let Self {
            id,
            cpuid,
            regs,
            sregs,
            sregs2,
            xsave,
            xcrs,
            debug_registers,
            lapic,
            mp_state,
            events,
            msrs,
            tsc_khz,
            tsc_offset,
        } = self;
        let mut list = Vec::with_capacity(msrs.len() * MSR);
        for (index, value) in msrs {
            list.extend_from_slice(&index.to_be_bytes());
            list.extend_from_slice(&value.to_be_bytes());
        }
        node.with_u32("id", *id)
            .with_bytes("cpuid", cpuid.as_slice())
            .with_bytes("regs", regs.as_slice())
            .with_bytes("sregs", sregs.as_slice())
            .with_optional_bytes("sregs2", sregs2.as_deref())
            .with_bytes("xsave", xsave.as_slice())
            .with_bytes("xcrs", xcrs.as_slice())
            .with_bytes("debug-registers", debug_registers.as_slice())
            .with_bytes("lapic", lapic.as_slice())
            .with_bytes("mp-state", mp_state.as_slice())
            .with_bytes("events", events.as_slice())
            .with_bytes("msrs", list)
            .with_u32("tsc-khz", *tsc_khz)
            .with_optional_u64("tsc-offset", *tsc_offset)
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            id: reader.u32("id")?,
            cpuid: reader.bytes("cpuid")?,
            regs: reader.bytes("regs")?,
            sregs: reader.bytes("sregs")?,
            sregs2: reader.optional_bytes("sregs2").map(Vec::from),
            xsave: reader.bytes("xsave")?,
            xcrs: reader.bytes("xcrs")?,
            debug_registers: reader.bytes("debug-registers")?,
            lapic: reader.bytes("lapic")?,
            mp_state: reader.bytes("mp-state")?,
            events: reader.bytes("events")?,
            msrs: reader
                .entries::<MSR>("msrs")?
                .iter()
                .map(|&[a, b, c, d, ref value @ ..]| (u32::from_be_bytes([a, b, c, d]), u64::from_be_bytes(*value)))
                .collect(),
            tsc_khz: reader.u32("tsc-khz")?,
            tsc_offset: reader.optional_u64("tsc-offset")?,
        })
    }
}

/// The interrupt controllers, the timer and the clock that KVM emulates in the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlatformV1 {
    /// `struct kvm_pic_state` of the first PIC.
    pub pic_master: Vec<u8>,
    /// `struct kvm_pic_state` of the second PIC.
    pub pic_slave: Vec<u8>,
    /// `struct kvm_ioapic_state`.
    pub ioapic: Vec<u8>,
    /// `struct kvm_pit_state2`.
    pub pit2: Vec<u8>,
    /// kvmclock, in nanoseconds.
    pub clock_ns: u64,
    /// The host's raw TSC when `clock_ns` was read.
    pub counter: u64,
}

impl Record for PlatformV1 {
    const COMPATIBLE: &'static str = "kho-vmm,x86_64-platform-v1";

    fn encode(&self, node: Node) -> Node {
        let Self { pic_master, pic_slave, ioapic, pit2, clock_ns, counter } = self;
        node.with_bytes("pic-master", pic_master.as_slice())
            .with_bytes("pic-slave", pic_slave.as_slice())
            .with_bytes("ioapic", ioapic.as_slice())
            .with_bytes("pit2", pit2.as_slice())
            .with_u64("clock-ns", *clock_ns)
            .with_u64("counter", *counter)
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            pic_master: reader.bytes("pic-master")?,
            pic_slave: reader.bytes("pic-slave")?,
            ioapic: reader.bytes("ioapic")?,
            pit2: reader.bytes("pit2")?,
            clock_ns: reader.u64("clock-ns")?,
            counter: reader.u64("counter")?,
        })
    }
}
