//! KVM ioctls that kvm-ioctls does not offer, or offers for fewer registers than a vCPU with SVE has, or for structs that are no
//! plain bytes: the list of registers, pending events, a vCPU's device attributes, the counters' offset. And device attributes as values instead of pointers.
//! Numbers and layouts are those of `include/uapi/linux/kvm.h` and `arch/arm64/include/uapi/asm/kvm.h`.

use kvm_bindings::{KVMIO, kvm_arm_counter_offset, kvm_device_attr, kvm_reg_list, kvm_vcpu_events};
use kvm_ioctls::{DeviceFd, Error, VcpuFd, VmFd};
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};
use zerocopy::{FromBytes, Immutable, IntoBytes};

ioctl_iowr_nr!(KVM_GET_REG_LIST, KVMIO, 0xb0, kvm_reg_list);
ioctl_iow_nr!(KVM_ARM_SET_COUNTER_OFFSET, KVMIO, 0xb5, kvm_arm_counter_offset);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
ioctl_ior_nr!(KVM_GET_VCPU_EVENTS, KVMIO, 0x9f, kvm_vcpu_events);
ioctl_iow_nr!(KVM_SET_VCPU_EVENTS, KVMIO, 0xa0, kvm_vcpu_events);

/// `struct kvm_vcpu_events` as it travels.
pub type Events = [u64; size_of::<kvm_vcpu_events>() / size_of::<u64>()];

fn result(returned: i32) -> Result<(), Error> {
    if returned < 0 { Err(Error::last()) } else { Ok(()) }
}

/// The numbers of all registers that KVM saves of this vCPU.
pub fn register_list(vcpu: &VcpuFd) -> Result<Vec<u64>, Error> {
    // How many there are, then as many numbers. The first call, which has room for none, is told how many it would take.
    let mut list = vec![0];
    loop {
        // SAFETY: the fd is a vCPU's. The kernel reads from the first u64 for how many numbers there is room behind it, and
        // writes no more than that.
        match result(unsafe { ioctl_with_mut_ptr(vcpu, KVM_GET_REG_LIST(), list.as_mut_ptr()) }) {
            Ok(()) => return Ok(list.split_off(1)),
            Err(error) if error.errno() == libc::E2BIG && list[0] as usize >= list.len() => {
                list.resize(list[0] as usize + 1, 0);
            }
            Err(error) => return Err(error),
        }
    }
}

/// Reads what is pending for the vCPU.
pub fn events(vcpu: &VcpuFd) -> Result<Events, Error> {
    let mut events = [0; size_of::<Events>() / size_of::<u64>()];
    // SAFETY: the fd is a vCPU's and the kernel writes one struct, whose size and alignment the array has.
    result(unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_VCPU_EVENTS(), &mut events) })?;
    Ok(events)
}

/// Writes what is pending for the vCPU.
pub fn set_events(vcpu: &VcpuFd, events: &Events) -> Result<(), Error> {
    // SAFETY: the fd is a vCPU's and the kernel reads one struct, whose size and alignment the array has.
    result(unsafe { ioctl_with_ref(vcpu, KVM_SET_VCPU_EVENTS(), events) })
}

/// Sets what is taken from the host's counter to give both of the guest's, for all vCPUs of the VM.
pub fn set_counter_offset(vm: &VmFd, counter_offset: u64) -> Result<(), Error> {
    let offset = kvm_arm_counter_offset { counter_offset, reserved: 0 };
    // SAFETY: the fd is a VM's and the kernel reads one struct.
    result(unsafe { ioctl_with_ref(vm, KVM_ARM_SET_COUNTER_OFFSET(), &offset) })
}

/// An attribute of a vCPU or a device: a group and a number in it.
#[derive(Clone, Copy, Debug)]
pub struct Attribute {
    /// The group.
    pub group: u32,
    /// Which of the group.
    pub number: u64,
}

impl Attribute {
    /// The attribute called `number` in `group`.
    pub fn new(group: u32, number: impl Into<u64>) -> Self {
        Self { group, number: number.into() }
    }

    fn at(self, addr: u64) -> kvm_device_attr {
        kvm_device_attr { flags: 0, group: self.group, attr: self.number, addr }
    }
}

/// What has attributes: their size is a matter of each attribute, so the caller has to know it.
pub trait Attributes {
    /// Reads an attribute into the value at `attribute.addr`.
    ///
    /// # Safety
    /// That address must be one of a value that is as large as the attribute and may be written.
    unsafe fn attribute_at(&self, attribute: &mut kvm_device_attr) -> Result<(), Error>;

    /// Does what setting an attribute does, with the value at `attribute.addr` where it has one.
    fn set_attribute_at(&self, attribute: &kvm_device_attr) -> Result<(), Error>;

    /// Whether there is such an attribute.
    fn has_attribute(&self, attribute: Attribute) -> bool;

    /// The value of an attribute. `T` must be as large as the kernel has it, or larger.
    fn attribute<T: FromBytes + IntoBytes>(&self, attribute: Attribute) -> Result<T, Error> {
        let mut value = T::new_zeroed();
        let mut attribute = attribute.at(std::ptr::from_mut(&mut value) as u64);
        // SAFETY: the address is that of a live value, of which any bytes make a valid one. No attribute that is read here is
        // larger than a u64, and none is read into less than it has, as the table of each group says.
        unsafe { self.attribute_at(&mut attribute) }?;
        Ok(value)
    }

    /// Sets an attribute.
    fn set_attribute<T: IntoBytes + Immutable>(&self, attribute: Attribute, value: &T) -> Result<(), Error> {
        self.set_attribute_at(&attribute.at(std::ptr::from_ref(value) as u64))
    }

    /// Asks for what the attribute stands for.
    fn request(&self, attribute: Attribute) -> Result<(), Error> {
        self.set_attribute_at(&attribute.at(0))
    }
}

impl Attributes for VcpuFd {
    unsafe fn attribute_at(&self, attribute: &mut kvm_device_attr) -> Result<(), Error> {
        // SAFETY: the fd is a vCPU's, and the caller answers for the address.
        result(unsafe { ioctl_with_ref(self, KVM_GET_DEVICE_ATTR(), attribute) })
    }

    fn set_attribute_at(&self, attribute: &kvm_device_attr) -> Result<(), Error> {
        self.set_device_attr(attribute)
    }

    fn has_attribute(&self, attribute: Attribute) -> bool {
        self.has_device_attr(&attribute.at(0)).is_ok()
    }
}

impl Attributes for DeviceFd {
    unsafe fn attribute_at(&self, attribute: &mut kvm_device_attr) -> Result<(), Error> {
        // SAFETY: the caller answers for the address.
        unsafe { self.get_device_attr(attribute) }
    }

    fn set_attribute_at(&self, attribute: &kvm_device_attr) -> Result<(), Error> {
        self.set_device_attr(attribute)
    }

    fn has_attribute(&self, attribute: Attribute) -> bool {
        self.has_device_attr(&attribute.at(0)).is_ok()
    }
}
