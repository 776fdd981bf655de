//! The counters of a VM, as an offset from the host's.
//!
//! A guest has two counters, the physical (CNTPCT) and the virtual one (CNTVCT), each the host's less an offset. KVM lets both be
//! written as values, but what it then takes for the offset is the difference to the moment in which it gets to it: the time from
//! the reading to the writing is lost, to each counter another amount, so that the difference between the two, which a guest may
//! rely on, is no longer what it was. The host's counter itself runs on through a kexec, so the offset that was exact before it is
//! exact after it. KVM does not tell the offset. It lets it be set, one for both counters, and from then on ignores values: so it
//! is set when the VM is made, and from then on known.

use kvm_bindings::KVM_CAP_COUNTER_OFFSET;
use kvm_ioctls::VmFd;

use super::super::ArchError;
use super::ioctl;

/// Sets what is taken from the host's counter to give both of the guest's. The host's counter `now` makes a new guest's begin at
/// zero; a restored one's offset is the one that it had. Must come before the vCPUs' timers are put back, and before any runs.
pub fn set_offset(vm: &VmFd, offset: u64) -> Result<(), ArchError> {
    if vm.check_extension_raw(KVM_CAP_COUNTER_OFFSET.into()) <= 0 {
        return Err(ArchError::Missing("an offset for the guest's counters (Linux 6.4 or newer)".to_owned()));
    }
    ioctl::set_counter_offset(vm, offset).map_err(ArchError::kvm("set the offset of the guest's counters"))
}

/// That the host's counter is the one that a guest's offset was taken from: `then` when it was saved and `now` at
/// `frequency_then` and `frequency` Hz.
pub fn check(then: u64, now: u64, frequency_then: u64, frequency: u64) -> Result<(), ArchError> {
    if frequency_then != frequency {
        return Err(ArchError::Unfit(format!(
            "the guest's counter has {frequency_then} Hz, this host's {frequency} Hz, and no Arm processor scales it"
        )));
    }
    if now < then {
        return Err(ArchError::Unfit(
            "the counter is behind what it was: it did not run on through the kexec".to_owned(),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_counter_that_ran_on_is_accepted() {
        assert!(check(1_000, 1_000, 62_500_000, 62_500_000).is_ok());
        let behind = check(1_000, 999, 62_500_000, 62_500_000).unwrap_err().to_string();
        assert!(behind.contains("did not run on through the kexec"), "{behind}");
        let other = check(1_000, 1_001, 62_500_000, 1_000_000_000).unwrap_err().to_string();
        assert!(other.contains("62500000 Hz"), "{other}");
    }
}
