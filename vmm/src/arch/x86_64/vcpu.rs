//! The state of a vCPU: made, set up for boot, taken, and put back in an order that is safe.

use kho_abi::document::payload;
use kho_abi::document::vcpu::VcpuState;
use kho_abi::document::vcpu::x86_64::VcpuV1;
use kvm_bindings::{KVM_CAP_SREGS2, KVM_CAP_XSAVE2, kvm_mp_state, kvm_xsave};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use zerocopy::IntoBytes;

use super::super::{ArchError, payload_struct};
use super::boot::Entry;
use super::cpuid::Vendor;
use super::msr::{self, MsrList};
use super::{cpuid, ioctl};

/// What has to be known of a vCPU, besides its fd, to take its state. Found out when the vCPU is made, and not in the pause.
#[derive(Debug)]
pub struct VcpuArch {
    id: u32,
    msrs: MsrList,
    xsave_size: usize,
    has_sregs2: bool,
    scales_tsc: bool,
}

impl VcpuArch {
    /// Gives a new vCPU, one of `cpus`, its CPUID: this host's, or in a restored VM the one that the guest knows.
    pub fn new(
        kvm: &Kvm,
        vm: &VmFd,
        vcpu: &VcpuFd,
        (id, cpus): (u32, u32),
        state: Option<&VcpuState>,
    ) -> Result<Self, ArchError> {
        let cpuid = match state {
            None => cpuid::for_vcpu(kvm, id, cpus)?,
            Some(VcpuState::X86_64(state)) => {
                let wanted = cpuid::decode(&state.cpuid)?;
                cpuid::check(kvm, &wanted)?;
                wanted
            }
            Some(foreign) => return Err(ArchError::foreign(foreign.architecture())),
        };
        vcpu.set_cpuid2(&cpuid).map_err(ArchError::kvm("set CPUID"))?;
        let msrs = MsrList::of(kvm, vcpu)?;
        let xsave_size = match usize::try_from(vm.check_extension_raw(KVM_CAP_XSAVE2.into())) {
            Ok(size) if size >= size_of::<kvm_xsave>() => size,
            _ => return Err(ArchError::Missing("KVM_CAP_XSAVE2 (Linux 5.17 or newer)".to_owned())),
        };
        let has_sregs2 = vm.check_extension_raw(KVM_CAP_SREGS2.into()) > 0;
        let scales_tsc = kvm.check_extension(Cap::TscControl);
        Ok(Self { id, msrs, xsave_size, has_sregs2, scales_tsc })
    }

    /// Points the vCPU at a loaded kernel.
    pub fn enter(&self, vcpu: &VcpuFd, entry: &Entry) -> Result<(), ArchError> {
        let mut sregs = vcpu.get_sregs().map_err(ArchError::kvm("read the segment registers"))?;
        let mut regs = vcpu.get_regs().map_err(ArchError::kvm("read the registers"))?;
        entry.apply(&mut sregs, &mut regs);
        vcpu.set_sregs(&sregs).map_err(ArchError::kvm("write the segment registers"))?;
        vcpu.set_regs(&regs).map_err(ArchError::kvm("write the registers"))
    }

    /// Takes the state. The vCPU must stand still, with no I/O of its own half done.
    pub fn save(&self, vcpu: &VcpuFd) -> Result<VcpuState, ArchError> {
        Ok(VcpuState::X86_64(Box::new(self.take(vcpu)?)))
    }

    fn take(&self, vcpu: &VcpuFd) -> Result<VcpuV1, ArchError> {
        // First, as reading it may change the others: an INIT or SIPI that has arrived is acted upon.
        let mp_state = vcpu.get_mp_state().map_err(ArchError::kvm("read the MP state"))?;
        let cpuid = vcpu.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).map_err(ArchError::kvm("read CPUID"))?;
        let sregs2 = if self.has_sregs2 {
            let sregs = ioctl::sregs2(vcpu).map_err(ArchError::kvm("read the segment registers and PDPTRs"))?;
            Some(sregs.as_bytes().to_vec())
        } else {
            None
        };
        Ok(VcpuV1 {
            id: self.id,
            cpuid: cpuid::encode(&cpuid),
            regs: vcpu.get_regs().map_err(ArchError::kvm("read the registers"))?.as_bytes().to_vec(),
            sregs: vcpu.get_sregs().map_err(ArchError::kvm("read the segment registers"))?.as_bytes().to_vec(),
            sregs2,
            xsave: ioctl::xsave2(vcpu, self.xsave_size).map_err(ArchError::kvm("read the extended state"))?,
            xcrs: vcpu.get_xcrs().map_err(ArchError::kvm("read the XCRs"))?.as_bytes().to_vec(),
            debug_registers: vcpu
                .get_debug_regs()
                .map_err(ArchError::kvm("read the debug registers"))?
                .as_bytes()
                .to_vec(),
            // Before the MSRs: what the timer's interrupt changes in the LAPIC, it has then not yet changed in the deadline.
            lapic: vcpu.get_lapic().map_err(ArchError::kvm("read the LAPIC"))?.as_bytes().to_vec(),
            msrs: self.msrs.save(vcpu)?,
            events: vcpu.get_vcpu_events().map_err(ArchError::kvm("read the pending events"))?.as_bytes().to_vec(),
            mp_state: mp_state.as_bytes().to_vec(),
            tsc_khz: vcpu.get_tsc_khz().map_err(ArchError::kvm("read the TSC's frequency"))?,
            tsc_offset: ioctl::tsc_offset(vcpu),
        })
    }

    /// Puts the state back. The VM's interrupt controllers and clock must have been restored before.
    pub fn restore(&self, vcpu: &VcpuFd, state: &VcpuState) -> Result<(), ArchError> {
        let VcpuState::X86_64(state) = state else { return Err(ArchError::foreign(state.architecture())) };
        // The CPUID was set when the vCPU was made, as other state depends on it.
        let VcpuV1 {
            id,
            cpuid: _,
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
        } = &**state;
        if *id != self.id {
            return Err(ArchError::Unfit(format!("vCPU {id} where {} belongs", self.id)));
        }
        let host_khz = vcpu.get_tsc_khz().map_err(ArchError::kvm("read the TSC's frequency"))?;
        if !self.scales_tsc && !same_tsc(*tsc_khz, host_khz) {
            return Err(ArchError::Unfit(format!(
                "the guest's TSC has {tsc_khz} kHz, this host's {host_khz} kHz, and its processor cannot scale it"
            )));
        }
        // Decode all before the first write.
        let regs = payload_struct("the registers", regs)?;
        let sregs = payload_struct("the segment registers", sregs)?;
        let sregs2 = sregs2.as_deref().map(|bytes| payload_struct("the segment registers", bytes)).transpose()?;
        let xsave = payload::fit(xsave, self.xsave_size)
            .map_err(|error| ArchError::Unfit(format!("the extended state: {error}")))?;
        let xcrs = payload_struct("the XCRs", xcrs)?;
        let debug_registers = payload_struct("the debug registers", debug_registers)?;
        let lapic = payload_struct("the LAPIC", lapic)?;
        let mp_state: kvm_mp_state = payload_struct("the MP state", mp_state)?;
        let events = payload_struct("the pending events", events)?;

        if self.scales_tsc {
            vcpu.set_tsc_khz(*tsc_khz).map_err(ArchError::kvm(&format!("scale the guest's TSC to {tsc_khz} kHz")))?;
        }
        // Before the TSC deadline, which is a value of the TSC.
        if let Some(offset) = tsc_offset {
            ioctl::set_tsc_offset(vcpu, *offset).map_err(ArchError::kvm("set the TSC's offset"))?;
        }
        // Before the LAPIC: an AP that waits would otherwise act on what the LAPIC holds.
        vcpu.set_mp_state(mp_state).map_err(ArchError::kvm("write the MP state"))?;
        vcpu.set_regs(&regs).map_err(ArchError::kvm("write the registers"))?;
        // Sets the APIC base, without which the LAPIC's registers have no meaning, and EFER and CR4 for what follows.
        match (self.has_sregs2, &sregs2) {
            (true, Some(sregs2)) => {
                ioctl::set_sregs2(vcpu, sregs2).map_err(ArchError::kvm("write the segment registers and PDPTRs"))?;
            }
            _ => vcpu.set_sregs(&sregs).map_err(ArchError::kvm("write the segment registers"))?,
        }
        // XCR0 decides which parts of the extended state are valid.
        vcpu.set_xcrs(&xcrs).map_err(ArchError::kvm("write the XCRs"))?;
        ioctl::set_xsave(vcpu, &xsave).map_err(ArchError::kvm("write the extended state"))?;
        vcpu.set_debug_regs(&debug_registers).map_err(ArchError::kvm("write the debug registers"))?;
        vcpu.set_lapic(&lapic).map_err(ArchError::kvm("write the LAPIC"))?;
        // Last of all that may set a timer; the TSC deadline is the last among them.
        msr::restore(vcpu, msrs)?;
        // Behind the LAPIC and the registers, whose writes clear what is pending.
        vcpu.set_vcpu_events(&events).map_err(ArchError::kvm("write the pending events"))?;
        if cfg!(debug_assertions) { self.check(vcpu, state) } else { Ok(()) }
    }

    /// Tells the guest that it was stopped, so that its watchdogs do not mistake the pause for a lockup.
    pub fn announce_pause(&self, vcpu: &VcpuFd) -> Result<(), ArchError> {
        match vcpu.kvmclock_ctrl() {
            // The guest does not use kvmclock.
            Err(error) if error.errno() == libc::EINVAL => Ok(()),
            other => other.map_err(ArchError::kvm("announce the pause")),
        }
    }

    /// Where the vCPU is and in which mode, for whoever has to find out why it got there.
    pub fn describe(&self, vcpu: &VcpuFd) -> String {
        match (vcpu.get_regs(), vcpu.get_sregs()) {
            (Ok(regs), Ok(sregs)) => format!(
                "rip={:#x} rsp={:#x} rflags={:#x} cs={:#x} cr0={:#x} cr2={:#x} cr3={:#x} cr4={:#x} efer={:#x} idt={:#x}",
                regs.rip,
                regs.rsp,
                regs.rflags,
                sregs.cs.selector,
                sregs.cr0,
                sregs.cr2,
                sregs.cr3,
                sregs.cr4,
                sregs.efer,
                sregs.idt.base
            ),
            (Err(error), _) | (_, Err(error)) => format!("its registers cannot be read: {error}"),
        }
    }

    /// Whether there is no event that a processor which left the guest was about to deliver.
    ///
    /// KVM ends a guest that touches a device while an event is delivered: it cannot do that access for it. On AMD it goes by the
    /// kind of event that the processor names. QEMU's emulation of such a processor (10.0) also names one that it has delivered
    /// before, and only takes back that there is any; so a handler that begins with a device ended its guest. Such an event is not
    /// injected again, and the access succeeds when it is made once more.
    pub fn is_delivering_nothing(&self, vcpu: &VcpuFd) -> bool {
        vcpu.get_vcpu_events().is_ok_and(|events| {
            let injected = [events.exception.injected, events.interrupt.injected, events.nmi.injected];
            injected.iter().all(|&injected| injected == 0)
        })
    }

    /// Reads the state back and compares it with what was written.
    fn check(&self, vcpu: &VcpuFd, wanted: &VcpuV1) -> Result<(), ArchError> {
        let found = self.take(vcpu)?;
        let mut differences = Vec::new();
        let mut compare = |what: &str, wanted: &[u8], found: &[u8]| {
            let place = wanted.iter().zip(found).position(|(wanted, found)| wanted != found);
            if let Some(place) = place {
                differences.push(format!("{what} at byte {place:#x}: {:#x}, not {:#x}", found[place], wanted[place]));
            }
        };
        compare("registers", &wanted.regs, &found.regs);
        match (&wanted.sregs2, &found.sregs2) {
            (Some(wanted), Some(found)) => compare("segment registers", wanted, found),
            _ => compare("segment registers", &wanted.sregs, &found.sregs),
        }
        compare("extended state", &wanted.xsave, &found.xsave);
        compare("XCRs", &wanted.xcrs, &found.xcrs);
        compare("debug registers", &wanted.debug_registers, &found.debug_registers);
        compare("MP state", &wanted.mp_state, &found.mp_state);
        compare("pending events", &wanted.events, &found.events);
        // The LAPIC's current count runs, and what it has counted down to is already pending. The processor priority follows from
        // what is in service, and KVM brings it up to date when it looks for the next interrupt only.
        const PROCESSOR_PRIORITY: std::ops::Range<usize> = 0xa0..0xa4;
        const IRR: std::ops::Range<usize> = 0x200..0x280;
        const CURRENT_COUNT: std::ops::Range<usize> = 0x390..0x394;
        let still = |lapic: &[u8]| {
            let mut lapic = lapic.to_vec();
            for range in [PROCESSOR_PRIORITY, IRR, CURRENT_COUNT] {
                if let Some(bytes) = lapic.get_mut(range) {
                    bytes.fill(0);
                }
            }
            lapic
        };
        compare("LAPIC", &still(&wanted.lapic), &still(&found.lapic));
        let vendor = Vendor::of(&cpuid::decode(&wanted.cpuid)?);
        for (wanted, found) in wanted.msrs.iter().zip(&found.msrs) {
            let seen = |entry: &(u32, u64)| (entry.0, msr::seen(entry.0, entry.1, vendor));
            if seen(wanted) != seen(found) && !msr::is_volatile(wanted.0) {
                differences.push(format!("MSR {:#x}: {:#x}, not {:#x}", found.0, found.1, wanted.1));
            }
        }
        if wanted.tsc_offset != found.tsc_offset {
            differences.push(format!("TSC offset: {:?}, not {:?}", found.tsc_offset, wanted.tsc_offset));
        }
        if differences.is_empty() {
            return Ok(());
        }
        Err(ArchError::Unfit(format!("vCPU {}, read back: {}", self.id, differences.join("; "))))
    }
}

/// Whether two kernels' figures can be of one processor's TSC. Each kernel estimates it anew while it boots, and the estimate
/// that KVM has is the first and coarse one; a live update does not change the processor. Without scaling, KVM would make up a
/// difference by adjusting the TSC at every entry, so that the guest's would no longer be steady: then better none at all.
fn same_tsc(document_khz: u32, host_khz: u32) -> bool {
    document_khz.abs_diff(host_khz) <= host_khz / 100
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tsc_frequencies_of_one_processor_differ_by_an_estimate_only() {
        assert!(same_tsc(2_442_617, 2_445_362));
        assert!(!same_tsc(2_100_000, 2_445_362));
        assert!(!same_tsc(0, 2_445_362));
    }
}
