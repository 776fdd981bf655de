//! Puts a kernel into RAM as Linux' boot protocol wants it (`Documentation/arch/arm64/booting.rst`): the image at 2 MiB alignment,
//! behind it all free, the initrd and the device tree at the end.

use std::fs::File;
use std::io::{self, Cursor, Read, Seek};
use std::path::Path;

use flate2::read::GzDecoder;
use linux_loader::loader::{self, KernelLoader, KernelLoaderResult, PE};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, ReadVolatile};

use super::super::boot::{self, BootError};
use super::RAM_START;
use super::fdt::{self, Tree};
use crate::config::VmConfig;

/// What the device tree may have at most: Linux maps no more, and not across a boundary of this size.
const TREE_SIZE: u64 = 2 << 20;
/// Initrd and device tree are below this, where every kernel finds them: Linux maps 1 GiB around itself at first.
const LOW_END: u64 = RAM_START + (1 << 30);
/// Longer command lines than arm64 Linux takes are refused.
const COMMAND_LINE_MAXIMUM: usize = 2048;

/// What a compressed kernel may unpack to. Distributions' kernels have 30 to 70 MiB.
const UNPACKED_MAXIMUM: u64 = 512 << 20;
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
/// Where in the image its header says how much memory it takes.
const IMAGE_SIZE: usize = 16;
/// Where the header has its magic number.
const IMAGE_MAGIC: usize = 56;
const HEADER_SIZE: usize = 64;

const EXPECTED: &str = "an arm64 Image, as it is or compressed with gzip";

/// How the first vCPU enters the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Address of the first instruction.
    pub address: u64,
    /// Address of the device tree, which the kernel expects in x0.
    pub tree: u64,
}

/// What the guest must be told of its machine.
pub struct Machine<'a> {
    /// The vCPUs' MPIDRs.
    pub mpidrs: &'a [u64],
    /// Whether there is an interrupt translation service.
    pub has_its: bool,
    /// The private interrupt of the performance monitors, where the vCPUs have them.
    pub pmu_interrupt: Option<u32>,
}

/// Loads kernel, initrd and device tree.
pub fn load(memory: &GuestMemoryMmap, config: &VmConfig, machine: &Machine<'_>) -> Result<Entry, BootError> {
    let VmConfig { kernel, initrd, append, devices, .. } = config;
    boot::check_command_line(append, COMMAND_LINE_MAXIMUM)?;
    let ram_end = memory.iter().last().map_or(RAM_START, |region| region.start_addr().0 + region.len());
    let tree_address = (ram_end.min(LOW_END) - TREE_SIZE) & !(TREE_SIZE - 1);
    let (address, kernel_end) = load_kernel(memory, kernel)?;
    if kernel_end > tree_address {
        return Err(BootError::NoRoom("the kernel"));
    }
    let initrd = match initrd {
        None => None,
        Some(path) => Some(boot::load_initrd(memory, path, kernel_end, tree_address)?),
    };
    let tree = Tree { ram: ram_end - RAM_START, machine, append, initrd, slots: devices.len() };
    let bytes = fdt::build(&tree)?;
    if bytes.len() as u64 > TREE_SIZE {
        return Err(BootError::NoRoom("the device tree"));
    }
    boot::write(memory, &bytes, tree_address)?;
    Ok(Entry { address, tree: tree_address })
}

/// Loads the kernel; gives its first instruction's address and the end of all that it takes.
fn load_kernel(memory: &GuestMemoryMmap, path: &Path) -> Result<(u64, u64), BootError> {
    let mut file = File::open(path).map_err(BootError::file(path))?;
    let mut magic = [0; GZIP_MAGIC.len()];
    let read = file.read(&mut magic).map_err(BootError::file(path))?;
    file.rewind().map_err(BootError::file(path))?;
    if read == magic.len() && magic == GZIP_MAGIC {
        let image = unpack(file, UNPACKED_MAXIMUM).map_err(BootError::file(path))?;
        load_image(memory, path, &mut Cursor::new(image))
    } else {
        load_image(memory, path, &mut file)
    }
}

/// What a compressed kernel unpacks to; an error as soon as it is more than `maximum` bytes: a few kilobytes can unpack to more
/// than the host has.
fn unpack(compressed: impl Read, maximum: u64) -> io::Result<Vec<u8>> {
    let mut image = Vec::new();
    GzDecoder::new(compressed).take(maximum + 1).read_to_end(&mut image)?;
    if image.len() as u64 > maximum {
        let too_large = format!("it unpacks to more than the {maximum} bytes that a kernel may have");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, too_large));
    }
    Ok(image)
}

fn load_image<F: Read + Seek + ReadVolatile>(
    memory: &GuestMemoryMmap,
    path: &Path,
    file: &mut F,
) -> Result<(u64, u64), BootError> {
    let not_a_kernel = || BootError::NotAKernel { path: path.to_owned(), expected: EXPECTED };
    let mut header = [0; HEADER_SIZE];
    match file.read_exact(&mut header) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(not_a_kernel()),
        other => other.map_err(BootError::file(path))?,
    }
    if !header[IMAGE_MAGIC..].starts_with(b"ARM\x64") {
        return Err(not_a_kernel());
    }
    // Of kernels before 3.17 it is not known.
    let field: [u8; 8] = std::array::from_fn(|at| header[IMAGE_SIZE + at]);
    let size = u64::from_le_bytes(field);
    let loaded = PE::load(memory, Some(GuestAddress(RAM_START)), file, None);
    let KernelLoaderResult { kernel_load, kernel_end, .. } =
        loaded.map_err(|source: loader::Error| BootError::Kernel { path: path.to_owned(), source })?;
    let end = kernel_load.0.checked_add(size).ok_or_else(not_a_kernel)?;
    Ok((kernel_load.0, kernel_end.max(end)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::SerialConfig;
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use std::io::Write;
    use vm_memory::Bytes;

    const SIZE: u64 = 16 << 20;
    const MACHINE: Machine<'_> = Machine { mpidrs: &[0], has_its: true, pmu_interrupt: None };

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(RAM_START), SIZE as usize)]).unwrap()
    }

    fn config(kernel: &Path) -> VmConfig {
        VmConfig {
            name: "test".into(),
            kernel: kernel.to_owned(),
            initrd: None,
            append: "console=ttyS0".into(),
            cpus: 1,
            memory: SIZE,
            serial: SerialConfig::Off,
            devices: vec![],
        }
    }

    fn image(size: u64) -> Vec<u8> {
        let mut image = vec![0x5a; 8192];
        image[8..16].copy_from_slice(&0u64.to_le_bytes());
        image[16..24].copy_from_slice(&size.to_le_bytes());
        image[56..60].copy_from_slice(b"ARM\x64");
        image
    }

    fn compress(content: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn image_and_compressed_image_are_loaded_alike() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kernel");
        let plain = image(8192);
        let packed = compress(&plain);
        for content in [plain, packed] {
            std::fs::write(&path, content).unwrap();
            let memory = memory();
            let entry = load(&memory, &config(&path), &MACHINE).unwrap();
            assert_eq!(entry, Entry { address: RAM_START, tree: RAM_START + SIZE - TREE_SIZE });
            assert_eq!(memory.read_obj::<u8>(GuestAddress(RAM_START + 8191)).unwrap(), 0x5a);
            let magic: u32 = memory.read_obj(GuestAddress(entry.tree)).unwrap();
            assert_eq!(u32::from_be(magic), 0xd00d_feed);
        }
    }

    #[test]
    fn file_that_is_no_kernel_or_does_not_fit_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kernel");
        assert!(matches!(load(&memory(), &config(&path), &MACHINE), Err(BootError::File { .. })));
        let bad = [vec![], vec![0; 4096], b"\x7fELF".to_vec(), vec![0x1f, 0x8b, 8, 0], image(SIZE), image(u64::MAX)];
        for content in bad {
            std::fs::write(&path, &content).unwrap();
            assert!(load(&memory(), &config(&path), &MACHINE).is_err(), "{} bytes", content.len());
        }
    }

    #[test]
    fn kernel_that_unpacks_to_too_much_or_not_at_all_is_refused() {
        let packed = compress(&image(8192));
        assert_eq!(unpack(packed.as_slice(), 8192).unwrap().len(), 8192);
        let error = unpack(packed.as_slice(), 8191).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
        assert!(unpack(&packed[..packed.len() - 1], 8192).is_err());
        let mut damaged = packed;
        let checksum = damaged.len() - 8;
        damaged[checksum] ^= 1;
        assert!(unpack(damaged.as_slice(), 8192).is_err());
    }

    #[test]
    fn initrd_lies_behind_all_that_the_kernel_takes_and_before_the_tree() {
        const KERNEL_END: u64 = 9 << 20;
        let directory = tempfile::tempdir().unwrap();
        let (path, initrd) = (directory.path().join("kernel"), directory.path().join("initrd"));
        std::fs::write(&path, image(KERNEL_END)).unwrap();
        let room = SIZE - TREE_SIZE - KERNEL_END;
        let config = VmConfig { initrd: Some(initrd.clone()), ..config(&path) };
        std::fs::write(&initrd, vec![7; room as usize]).unwrap();
        let memory = memory();
        load(&memory, &config, &MACHINE).unwrap();
        assert_eq!(memory.read_obj::<u8>(GuestAddress(RAM_START + KERNEL_END)).unwrap(), 7);
        std::fs::write(&initrd, vec![7; room as usize + 1]).unwrap();
        assert!(matches!(load(&memory, &config, &MACHINE), Err(BootError::NoRoom("the initrd"))));
    }
}
