//! KVM ioctls that kvm-ioctls does not offer, or offers only for structs of one fixed size: segment registers with the PDPTRs
//! (`KVM_GET_SREGS2`), the extended state (`KVM_GET_XSAVE2`), and a vCPU's device attributes, which hold the TSC offset.
//! Numbers and layouts are those of `include/uapi/linux/kvm.h` and `arch/x86/include/uapi/asm/kvm.h`.

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr, kvm_sregs2, kvm_xsave};
use kvm_ioctls::{Error, VcpuFd, VmFd};
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iow_nr};

ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);
ioctl_ior_nr!(KVM_GET_XSAVE2, KVMIO, 0xcf, kvm_xsave);
ioctl_iow_nr!(KVM_SET_XSAVE, KVMIO, 0xa5, kvm_xsave);
ioctl_io_nr!(KVM_SET_TSC_KHZ, KVMIO, 0xa2);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);

/// `struct kvm_sregs2` as it travels.
pub type Sregs2 = [u64; size_of::<kvm_sregs2>() / size_of::<u64>()];

fn result(returned: i32) -> Result<(), Error> {
    if returned < 0 { Err(Error::last()) } else { Ok(()) }
}

/// Gives vCPUs that are yet to be made the TSC frequency that the kernel now takes for the host's.
pub fn use_host_tsc_frequency(vm: &VmFd) -> Result<(), Error> {
    const HOST: u64 = 0;
    // SAFETY: the fd is a VM's, and the argument is a number.
    result(unsafe { ioctl_with_val(vm, KVM_SET_TSC_KHZ(), HOST) })
}

/// Reads segment and control registers together with the PDPTRs.
pub fn sregs2(vcpu: &VcpuFd) -> Result<Sregs2, Error> {
    let mut sregs = [0; size_of::<Sregs2>() / size_of::<u64>()];
    // SAFETY: the fd is a vCPU's and the kernel writes one struct, whose size and alignment the array has.
    result(unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut sregs) })?;
    Ok(sregs)
}

/// Writes segment and control registers together with the PDPTRs.
pub fn set_sregs2(vcpu: &VcpuFd, sregs: &Sregs2) -> Result<(), Error> {
    // SAFETY: the fd is a vCPU's and the kernel reads one struct, whose size and alignment the array has.
    result(unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2(), sregs) })
}

/// Reads the extended state. `size` is what `KVM_CAP_XSAVE2` tells of the VM that the vCPU belongs to.
pub fn xsave2(vcpu: &VcpuFd, size: usize) -> Result<Vec<u8>, Error> {
    let mut state = vec![0; size];
    // SAFETY: the fd is a vCPU's and the buffer has the size that the kernel has told it writes.
    result(unsafe { ioctl_with_mut_ptr(vcpu, KVM_GET_XSAVE2(), state.as_mut_ptr()) })?;
    Ok(state)
}

/// Writes the extended state, of which the kernel reads as many bytes as `KVM_CAP_XSAVE2` tells: `state` must have that size.
pub fn set_xsave(vcpu: &VcpuFd, state: &[u8]) -> Result<(), Error> {
    // SAFETY: the fd is a vCPU's and the buffer has the size that the kernel has told it reads.
    result(unsafe { ioctl_with_ptr(vcpu, KVM_SET_XSAVE(), state.as_ptr()) })
}

fn tsc_offset_attribute(value: &mut u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: std::ptr::from_mut(value) as u64,
    }
}

/// What is added to the host's TSC to give the guest's. None where the kernel does not tell (before 5.16).
pub fn tsc_offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut offset = 0;
    let attribute = tsc_offset_attribute(&mut offset);
    // SAFETY: the fd is a vCPU's, and the attribute's address is that of a live u64, which is what the kernel writes.
    result(unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) }).ok()?;
    Some(offset)
}

/// Sets what is added to the host's TSC to give the guest's.
pub fn set_tsc_offset(vcpu: &VcpuFd, mut offset: u64) -> Result<(), Error> {
    let attribute = tsc_offset_attribute(&mut offset);
    // SAFETY: the fd is a vCPU's, and the attribute's address is that of a live u64, which is what the kernel reads.
    result(unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) })
}
