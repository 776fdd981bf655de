//! A kexec with nothing handed over: what the demo compares a live update with.
use anyhow::{Context, Result};
use std::ffi::CString;
use std::fs::File;
use std::os::fd::AsRawFd;

/// Loads the next kernel.
pub fn load(kernel: &str, initrd: &str, command_line: &str) -> Result<()> {
    let open = |path: &str| File::open(path).with_context(|| format!("cannot open {path}"));
    let (kernel_file, initrd_file) = (open(kernel)?, open(initrd)?);
    let line = CString::new(command_line).context("the command line contains a zero byte")?;
    // SAFETY: both descriptors are open, and the pointer and the length (which counts the final zero) describe `line`.
    let status = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel_file.as_raw_fd(),
            initrd_file.as_raw_fd(),
            line.as_bytes_with_nul().len(),
            line.as_ptr(),
            0_u64,
        )
    };
    if status != 0 {
        return Err(std::io::Error::last_os_error()).with_context(|| format!("cannot load {kernel}"));
    }
    Ok(())
}

/// Enters the loaded kernel. Returns only when that fails.
pub fn commit() -> Result<()> {
    // SAFETY: the call takes no pointers.
    let status = unsafe { libc::reboot(libc::LINUX_REBOOT_CMD_KEXEC) };
    if status != 0 {
        return Err(std::io::Error::last_os_error()).context("the kexec failed");
    }
    Ok(())
}
