//! Puts a kernel into RAM the way it wants to be entered: PVH where an ELF file has that entry point, else Linux' 64-bit boot
//! protocol (`Documentation/arch/x86/boot.rst`).

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::start_info::{
    XEN_HVM_MEMMAP_TYPE_RAM, XEN_HVM_MEMMAP_TYPE_RESERVED, XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry,
    hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::{BzImage, KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::super::boot::{self, BootError};
use super::{HOLE_START, acpi};
use crate::config::VmConfig;

// Boot data below the first MiB. Nothing of it is needed once the kernel runs.
const GDT: u64 = 0x500;
const START_INFO: u64 = 0x6000;
const MODULES: u64 = 0x6100;
const MEMORY_MAP: u64 = 0x6200;
const ZERO_PAGE: u64 = 0x7000;
const STACK: u64 = 0x8ff0;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PAGE_DIRECTORIES: u64 = 0xb000;
const COMMAND_LINE: u64 = 0x2_0000;
/// Longer command lines than x86 Linux takes are refused.
const COMMAND_LINE_MAXIMUM: usize = 2048;
/// Where a PC's firmware begins to keep memory to itself.
const LOW_MEMORY_END: u64 = 0x9_fc00;
const HIGH_MEMORY: u64 = 0x10_0000;

const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
const LOADER_UNKNOWN: u8 = 0xff;
const LOADED_HIGH: u8 = 1;
/// `xloadflags`: there is a 64-bit entry point, 512 bytes behind the start of the kernel.
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// How the first vCPU enters the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit protected mode without paging, `ebx` pointing to the start info.
    Pvh {
        /// Address of the first instruction.
        address: u64,
    },
    /// 64-bit long mode with identity paging, `rsi` pointing to the zero page.
    Linux64 {
        /// Address of the first instruction.
        address: u64,
    },
}

impl Entry {
    /// Sets the registers.
    pub fn apply(&self, sregs: &mut kvm_sregs, regs: &mut kvm_regs) {
        let segment = |selector: u16, kind: u8, long: bool| kvm_segment {
            base: 0,
            limit: 0xffff_ffff,
            selector,
            type_: kind,
            present: 1,
            dpl: 0,
            db: u8::from(!long),
            s: 1,
            l: u8::from(long),
            g: 1,
            ..Default::default()
        };
        const CODE: u8 = 0xb;
        const DATA: u8 = 0x3;
        const CR0_PE: u64 = 1;
        const CR0_ET: u64 = 1 << 4;
        const CR0_PG: u64 = 1 << 31;
        const CR4_PAE: u64 = 1 << 5;
        const EFER_LME_LMA: u64 = (1 << 8) | (1 << 10);
        let long = matches!(self, Self::Linux64 { .. });
        sregs.cs = segment(0x10, CODE, long);
        let data = segment(0x18, DATA, false);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        // A busy TSS, as Intel demands one; its selector is never loaded.
        sregs.tr = kvm_segment { selector: 0x20, type_: 0xb, limit: 0x67, present: 1, ..Default::default() };
        (sregs.gdt.base, sregs.gdt.limit) = (GDT, 8 * 6 - 1);
        (sregs.idt.base, sregs.idt.limit) = (0, 0);
        sregs.cr0 = CR0_PE | CR0_ET;
        *regs = kvm_regs { rflags: 2, ..Default::default() };
        match *self {
            Self::Pvh { address } => {
                sregs.cr4 = 0;
                (regs.rip, regs.rbx) = (address, START_INFO);
            }
            Self::Linux64 { address } => {
                sregs.cr0 |= CR0_PG;
                sregs.cr3 = PML4;
                sregs.cr4 = CR4_PAE;
                sregs.efer = EFER_LME_LMA;
                (regs.rip, regs.rsi, regs.rsp, regs.rbp) = (address, ZERO_PAGE, STACK, STACK);
            }
        }
    }
}

/// Loads kernel, initrd, command line and tables.
pub fn load(memory: &GuestMemoryMmap, config: &VmConfig) -> Result<Entry, BootError> {
    let VmConfig { kernel, initrd, append, cpus, devices, .. } = config;
    write_command_line(memory, append)?;
    let root = acpi::write(memory, *cpus, devices.len())?;
    write_tables(memory)?;
    let (loaded, protocol) = load_kernel(memory, kernel)?;
    let initrd = match initrd {
        None => None,
        Some(path) => {
            let (kernel_end, limit) = initrd_bounds(memory, &loaded);
            Some(boot::load_initrd(memory, path, kernel_end, limit)?)
        }
    };
    match protocol {
        Protocol::Pvh(address) => {
            write_start_info(memory, initrd, root)?;
            Ok(Entry::Pvh { address })
        }
        Protocol::Linux64(address) => {
            write_zero_page(memory, &loaded, initrd, append, root)?;
            Ok(Entry::Linux64 { address })
        }
    }
}

enum Protocol {
    Pvh(u64),
    Linux64(u64),
}

fn load_kernel(memory: &GuestMemoryMmap, path: &Path) -> Result<(KernelLoaderResult, Protocol), BootError> {
    let file_error = BootError::file(path);
    let kernel_error = |source| BootError::Kernel { path: path.to_owned(), source };
    let not_a_kernel =
        || BootError::NotAKernel { path: path.to_owned(), expected: "a bzImage, or an ELF file for x86_64" };
    let mut file = File::open(path).map_err(&file_error)?;
    let mut magic = [0; 0x206];
    let mut read = 0;
    while read < magic.len() {
        match file.read(&mut magic[read..]).map_err(&file_error)? {
            0 => return Err(not_a_kernel()),
            count => read += count,
        }
    }
    file.seek(SeekFrom::Start(0)).map_err(&file_error)?;
    let start = Some(GuestAddress(HIGH_MEMORY));
    if magic.starts_with(b"\x7fELF") {
        let loaded = Elf::load(memory, None, &mut file, start).map_err(kernel_error)?;
        let protocol = match loaded.pvh_boot_cap {
            PvhBootCapability::PvhEntryPresent(address) => Protocol::Pvh(address.0),
            _ => Protocol::Linux64(loaded.kernel_load.0),
        };
        Ok((loaded, protocol))
    } else if magic[0x202..].starts_with(b"HdrS") {
        let loaded = BzImage::load(memory, None, &mut file, start).map_err(kernel_error)?;
        let flags = loaded.setup_header.map_or(0, |header| header.xloadflags);
        if flags & XLF_KERNEL_64 == 0 {
            return Err(not_a_kernel());
        }
        let entry = loaded.kernel_load.0 + ENTRY_64;
        Ok((loaded, Protocol::Linux64(entry)))
    } else {
        Err(not_a_kernel())
    }
}

/// Where an initrd may lie: above what the kernel needs, and as high as it is able to read.
fn initrd_bounds(memory: &GuestMemoryMmap, loaded: &KernelLoaderResult) -> (u64, u64) {
    let low_end = memory.iter().next().map_or(0, |region| region.len()).min(HOLE_START);
    let limit = match loaded.setup_header {
        Some(header) if header.initrd_addr_max != 0 => low_end.min(u64::from(header.initrd_addr_max) + 1),
        _ => low_end,
    };
    let kernel_end = match loaded.setup_header {
        // What the kernel needs once it is unpacked, and not only what the file has.
        Some(header) => loaded.kernel_end.max(loaded.kernel_load.0 + u64::from(header.init_size)),
        None => loaded.kernel_end,
    };
    (kernel_end, limit)
}

fn write_command_line(memory: &GuestMemoryMmap, append: &str) -> Result<(), BootError> {
    boot::check_command_line(append, COMMAND_LINE_MAXIMUM)?;
    boot::write(memory, &[append.as_bytes(), &[0]].concat(), COMMAND_LINE)
}

/// The descriptors that the segment registers were loaded from, and page tables that map the first 4 GiB to themselves.
fn write_tables(memory: &GuestMemoryMmap) -> Result<(), BootError> {
    const CODE_64: u64 = 0x00af_9b00_0000_ffff;
    const DATA: u64 = 0x00cf_9300_0000_ffff;
    const TSS: u64 = 0x0000_8b00_0000_0067;
    const PRESENT_WRITABLE: u64 = 3;
    const HUGE: u64 = 1 << 7;
    let write = |value: u64, address: u64| memory.write_obj(value, GuestAddress(address)).map_err(BootError::Memory);
    for (index, descriptor) in [0, 0, CODE_64, DATA].into_iter().enumerate() {
        write(descriptor, GDT + index as u64 * 8)?;
    }
    write(TSS, GDT + 32)?;
    write(PDPT | PRESENT_WRITABLE, PML4)?;
    for gib in 0..4 {
        let directory = PAGE_DIRECTORIES + gib * 4096;
        write(directory | PRESENT_WRITABLE, PDPT + gib * 8)?;
        for entry in 0..512 {
            write((gib << 30) | (entry << 21) | PRESENT_WRITABLE | HUGE, directory + entry * 8)?;
        }
    }
    Ok(())
}

/// RAM as the guest is told of it: (address, size, usable).
fn memory_map(memory: &GuestMemoryMmap) -> Vec<(u64, u64, bool)> {
    let mut map = vec![(0, LOW_MEMORY_END, true), (LOW_MEMORY_END, HIGH_MEMORY - LOW_MEMORY_END, false)];
    for region in memory.iter() {
        let start = region.start_addr().0.max(HIGH_MEMORY);
        let end = region.start_addr().0 + region.len();
        map.push((start, end - start, true));
    }
    map
}

fn write_start_info(memory: &GuestMemoryMmap, initrd: Option<(u64, u64)>, root: u64) -> Result<(), BootError> {
    let map: Vec<_> = memory_map(memory)
        .into_iter()
        .map(|(addr, size, usable)| hvm_memmap_table_entry {
            addr,
            size,
            type_: if usable { XEN_HVM_MEMMAP_TYPE_RAM } else { XEN_HVM_MEMMAP_TYPE_RESERVED },
            reserved: 0,
        })
        .collect();
    let modules: Vec<_> =
        initrd.map(|(paddr, size)| hvm_modlist_entry { paddr, size, ..Default::default() }).into_iter().collect();
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: modules.len() as u32,
        modlist_paddr: if modules.is_empty() { 0 } else { MODULES },
        cmdline_paddr: COMMAND_LINE,
        rsdp_paddr: root,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let mut parameters = BootParams::new(&info, GuestAddress(START_INFO));
    parameters.set_sections(&map, GuestAddress(MEMORY_MAP));
    if !modules.is_empty() {
        parameters.set_modules(&modules, GuestAddress(MODULES));
    }
    PvhBootConfigurator::write_bootparams(&parameters, memory).map_err(|error| BootError::Parameters(Box::new(error)))
}

fn write_zero_page(
    memory: &GuestMemoryMmap,
    loaded: &KernelLoaderResult,
    initrd: Option<(u64, u64)>,
    append: &str,
    root: u64,
) -> Result<(), BootError> {
    let mut parameters = boot_params::default();
    // An ELF file has no setup header: then only what the kernel reads is filled in.
    if let Some(header) = loaded.setup_header {
        parameters.hdr = header;
    }
    parameters.hdr.boot_flag = BOOT_FLAG;
    parameters.hdr.header = HEADER_MAGIC;
    parameters.hdr.type_of_loader = LOADER_UNKNOWN;
    parameters.hdr.loadflags |= LOADED_HIGH;
    parameters.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    parameters.hdr.cmdline_size = append.len() as u32;
    if let Some((address, size)) = initrd {
        parameters.hdr.ramdisk_image = address as u32;
        parameters.hdr.ramdisk_size = u32::try_from(size).map_err(|_| BootError::NoRoom("the initrd"))?;
    }
    parameters.acpi_rsdp_addr = root;
    let map = memory_map(memory);
    for (slot, &(addr, size, usable)) in parameters.e820_table.iter_mut().zip(&map) {
        *slot = boot_e820_entry { addr, size, r#type: if usable { E820_RAM } else { E820_RESERVED } };
    }
    parameters.e820_entries = map.len() as u8;
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&parameters, GuestAddress(ZERO_PAGE)), memory)
        .map_err(|error| BootError::Parameters(Box::new(error)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::SerialConfig;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap()
    }

    fn config(kernel: &Path) -> VmConfig {
        VmConfig {
            name: "test".into(),
            kernel: kernel.to_owned(),
            initrd: None,
            append: String::new(),
            cpus: 1,
            memory: 16 << 20,
            serial: SerialConfig::Off,
            devices: vec![],
        }
    }

    #[test]
    fn file_that_is_no_kernel_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kernel");
        assert!(matches!(load(&memory(), &config(&path)), Err(BootError::File { .. })));
        for content in [vec![], b"\x7fELF".to_vec(), vec![0; 4096], [b"\x7fELF".to_vec(), vec![0xff; 4096]].concat()] {
            std::fs::write(&path, content).unwrap();
            assert!(load(&memory(), &config(&path)).is_err());
        }
    }

    #[test]
    fn memory_map_covers_all_ram_above_one_mib() {
        let memory =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 16 << 20), (GuestAddress(4 << 30), 8 << 20)]).unwrap();
        let usable: u64 = memory_map(&memory).iter().filter(|range| range.2).map(|range| range.1).sum();
        assert_eq!(usable, (24 << 20) - (HIGH_MEMORY - LOW_MEMORY_END));
    }
}
