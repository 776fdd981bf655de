//! What booting a guest has in common on all architectures: the errors, and getting files into guest memory.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use linux_loader::loader;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, ReadVolatile};

/// Why a guest cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be opened or read.
    #[error("cannot read {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The file is no kernel.
    #[error("{path} is no kernel that can be booted here: expected {expected}")]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What this architecture boots.
        expected: &'static str,
    },
    /// linux-loader refused the kernel.
    #[error("cannot load the kernel {path} (does it fit into the guest's memory?)")]
    Kernel {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: loader::Error,
    },
    /// What the kernel is told at boot could not be made.
    #[error("cannot write the boot parameters")]
    Parameters(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A command line that is too long, or has bytes in it that it cannot have.
    #[error("the kernel's command line (--append) {0}")]
    CommandLine(String),
    /// Something does not fit where it belongs.
    #[error("there is no room in the guest's memory for {0}; give it more with --memory")]
    NoRoom(&'static str),
    /// Guest memory could not be written.
    #[error("cannot write to the guest's memory")]
    Memory(#[source] GuestMemoryError),
}

impl BootError {
    /// For `map_err` behind what is done with a file.
    pub fn file(path: &Path) -> impl Fn(io::Error) -> Self {
        move |source| Self::File { path: path.to_owned(), source }
    }
}

/// Checks that a command line can be handed over whole: `maximum` is what the kernel takes, in bytes with the zero behind.
pub fn check_command_line(append: &str, maximum: usize) -> Result<(), BootError> {
    if append.len() >= maximum {
        let length = append.len();
        return Err(BootError::CommandLine(format!("has {length} bytes; a kernel takes fewer than {maximum}")));
    }
    if append.bytes().any(|byte| byte == 0) {
        return Err(BootError::CommandLine("contains a zero byte".to_owned()));
    }
    Ok(())
}

/// Puts the initrd as high below `limit` as it may lie, so that it is out of the way of a kernel that unpacks itself, which needs
/// all below `kernel_end`. Gives its address and size.
pub fn load_initrd(
    memory: &GuestMemoryMmap,
    path: &Path,
    kernel_end: u64,
    limit: u64,
) -> Result<(u64, u64), BootError> {
    const PAGE: u64 = 4096;
    let mut file = File::open(path).map_err(BootError::file(path))?;
    let size = file.metadata().map_err(BootError::file(path))?.len();
    let address = limit
        .checked_sub(size)
        .map(|address| address & !(PAGE - 1))
        .filter(|&address| address >= kernel_end)
        .ok_or(BootError::NoRoom("the initrd"))?;
    let slice = memory.get_slice(GuestAddress(address), size as usize).map_err(BootError::Memory)?;
    file.read_exact_volatile(&mut slice.offset(0).map_err(|_| BootError::NoRoom("the initrd"))?)
        .map_err(|error| BootError::file(path)(io::Error::other(error)))?;
    Ok((address, size))
}

/// Writes bytes to an address that belongs to the loader.
pub fn write(memory: &GuestMemoryMmap, bytes: &[u8], address: u64) -> Result<(), BootError> {
    memory.write_slice(bytes, GuestAddress(address)).map_err(BootError::Memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_of_any_length_is_whole_or_refused() {
        assert!(check_command_line(&"x".repeat(99), 100).is_ok());
        assert!(check_command_line(&"x".repeat(100), 100).is_err());
        assert!(check_command_line("a\0b", 100).is_err());
    }

    #[test]
    fn initrd_lies_below_its_limit_and_never_in_the_kernel() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("initrd");
        std::fs::write(&path, [7; 5000]).unwrap();
        let (address, size) = load_initrd(&memory, &path, 0x1000, 0x10_0000).unwrap();
        assert_eq!((address, size), (0xfe000, 5000));
        let last: u8 = memory.read_obj(GuestAddress(address + size - 1)).unwrap();
        assert_eq!(last, 7);
        assert!(load_initrd(&memory, &path, 0xff000, 0x10_0000).is_err());
        assert!(load_initrd(&memory, &path, 0, 4096).is_err());
    }
}
