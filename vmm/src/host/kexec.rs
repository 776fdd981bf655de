//! The next kernel: loading it, unloading it, and the jump into it.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Flags of `kexec_file_load` (Linux `include/uapi/linux/kexec.h`).
const UNLOAD: libc::c_ulong = 1;
const NO_INITRAMFS: libc::c_ulong = 4;

/// What can go wrong with kexec.
#[derive(Debug, thiserror::Error)]
pub enum KexecError {
    /// The kernel refused the image.
    #[error("cannot load the next kernel: {}", explain(source))]
    Load {
        /// Why.
        source: io::Error,
    },
    /// The jump did not happen.
    #[error("cannot boot the next kernel")]
    Reboot {
        /// Why.
        source: io::Error,
    },
}

/// What an error code of `kexec_file_load` means.
fn explain(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::ENOEXEC) => "the file is no kernel image that this host can boot",
        Some(libc::EADDRNOTAVAIL) => "it does not fit into the scratch memory that KHO has set aside",
        Some(libc::EBUSY) => "another kexec is being loaded, or the kernel cannot stop its CPUs",
        Some(libc::EPERM) => "not permitted",
        Some(libc::EKEYREJECTED | libc::ENOKEY | libc::EBADMSG | libc::ENODATA) => {
            "the image is not signed as this kernel demands"
        }
        Some(libc::EINVAL) => "the kernel does not accept the image or its command line",
        Some(libc::ENOMEM) => "not enough free memory",
        Some(libc::ENOSYS) => "this kernel was built without CONFIG_KEXEC_FILE",
        _ => "the kernel refused",
    }
}

impl KexecError {
    /// What the operator can do about it.
    pub fn help(&self) -> Option<String> {
        let (Self::Load { source } | Self::Reboot { source }) = self;
        let help = match source.raw_os_error()? {
            libc::EADDRNOTAVAIL => {
                "use a smaller kernel or initrd, or boot this host with more scratch memory, such as \
                 kho_scratch=512M,512M,256M"
            }
            libc::EPERM => {
                "run vmm as root; lockdown and the sysctl kernel.kexec_load_disabled forbid kexec to root too"
            }
            libc::EBUSY => "wait for the other one; the running kernel needs CONFIG_HOTPLUG_CPU",
            libc::EINVAL => "a command line may have up to 2047 characters; `dmesg | tail` tells more",
            libc::EKEYREJECTED | libc::ENOKEY | libc::EBADMSG | libc::ENODATA => {
                "sign the image, or boot without Secure Boot and lockdown"
            }
            _ => return None,
        };
        Some(help.to_owned())
    }
}

fn kexec_file_load(kernel: i32, initrd: i32, command_line: Option<&CString>, flags: libc::c_ulong) -> io::Result<()> {
    let (length, text) =
        command_line.map_or((0, std::ptr::null()), |text| (text.as_bytes_with_nul().len(), text.as_ptr()));
    // SAFETY: the kernel reads `length` bytes from `text`, which is the whole of a C string that outlives the call, or
    // nothing; the descriptors are only read from. Nothing of this process is changed.
    let result = unsafe { libc::syscall(libc::SYS_kexec_file_load, kernel, initrd, length, text, flags) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A kernel that waits in memory. Dropping it unloads it.
#[derive(Debug)]
pub struct LoadedKernel(());

impl LoadedKernel {
    /// Loads a kernel, instead of one that may be loaded already. By `kexec_file_load`, as an image that came by the
    /// older `kexec_load` would not be told where the memory is that was handed over.
    pub fn load(kernel: &File, initrd: Option<&File>, command_line: &CString) -> Result<Self, KexecError> {
        let (initrd, flags) = initrd.map_or((-1, NO_INITRAMFS), |file| (file.as_raw_fd(), 0));
        kexec_file_load(kernel.as_raw_fd(), initrd, Some(command_line), flags)
            .map_err(|source| KexecError::Load { source })?;
        Ok(Self(()))
    }

    /// Boots it: all that runs on this host ends here, without being asked. Returns only when that fails, with all as
    /// it was.
    pub fn boot(&self) -> KexecError {
        match rustix::system::reboot(rustix::system::RebootCommand::Kexec) {
            Err(error) => KexecError::Reboot { source: error.into() },
            Ok(()) => KexecError::Reboot { source: io::Error::other("the call came back") },
        }
    }
}

impl Drop for LoadedKernel {
    fn drop(&mut self) {
        unload();
    }
}

/// Unloads the next kernel, if one is loaded.
pub fn unload() {
    if let Err(error) = kexec_file_load(-1, -1, None, UNLOAD) {
        tracing::error!(%error, "cannot unload the next kernel");
    }
}
