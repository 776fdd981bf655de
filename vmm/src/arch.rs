//! What differs between architectures, under one set of names: each architecture's folder defines them all, and a missing one
//! does not compile. The only place that asks which architecture this is.
//!
//! | name | what it is |
//! |---|---|
//! | `NAME` | the architecture's name, as `uname -m` and the document have it |
//! | `counter`, `counter_frequency` | the raw counter that runs on through a kexec, and its frequency |
//! | `await_counter_calibration` | waits until the kernel knows that frequency well |
//! | `create_vm` | a VM of KVM's whose guest physical addresses reach far enough |
//! | `memory_layout` | where in the guest's address space RAM lies |
//! | `Platform` | interrupt controllers, timers and clocks of a VM: create, save, restore; its devices; booting a kernel |
//! | `VcpuArch` | the state of a vCPU: create, boot, save, restore |

use kho_abi::document::payload;
use zerocopy::FromBytes;

#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "x86_64")]
pub use x86_64::{
    NAME, await_counter_calibration, counter, counter_frequency, create_vm, memory_layout, platform::Platform,
    vcpu::VcpuArch,
};

#[cfg(target_arch = "aarch64")]
mod aarch64;

#[cfg(target_arch = "aarch64")]
pub use aarch64::{
    NAME, await_counter_calibration, counter, counter_frequency, create_vm, memory_layout, platform::Platform,
    vcpu::VcpuArch,
};

mod boot;

pub use boot::BootError;

/// What can go wrong between us and the processor: KVM refused, or the state handed over does not fit this host.
#[derive(Debug, thiserror::Error)]
pub enum ArchError {
    /// A KVM ioctl failed.
    #[error("KVM: cannot {operation}")]
    Kvm {
        /// What was tried.
        operation: String,
        /// Why it failed.
        source: kvm_ioctls::Error,
    },
    /// The host lacks something.
    #[error("this host's KVM does not offer {0}")]
    Missing(String),
    /// The state handed over does not fit.
    #[error("the state handed over does not fit this host: {0}")]
    Unfit(String),
}

impl ArchError {
    /// The state is another architecture's.
    pub fn foreign(architecture: &str) -> Self {
        Self::Unfit(format!("it is of {architecture}, this is {NAME}"))
    }

    /// For `map_err` behind an ioctl.
    pub fn kvm(operation: &str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { operation: operation.to_owned(), source }
    }
}

/// A KVM struct from its payload: zero-padded where the kernel's struct has grown since, refused where it holds more than this
/// kernel knows.
pub fn payload_struct<T: FromBytes>(what: &str, bytes: &[u8]) -> Result<T, ArchError> {
    let fitted = payload::fit(bytes, size_of::<T>()).map_err(|error| ArchError::Unfit(format!("{what}: {error}")))?;
    T::read_from_bytes(&fitted).map_err(|_| ArchError::Unfit(format!("{what}: {} bytes", bytes.len())))
}
