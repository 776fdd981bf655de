//! What the loader says about memory, and the page tables: all RAM one to one in pages of 2 MiB, all else uncached.

use core::ptr;
use core::sync::atomic::{AtomicU64, Ordering};

use guest_kernel::options::End;
use guest_kernel::ranges::{Range, Ranges};

use super::{acpi, cpu, processors};
use crate::console::damage;
use crate::kept;
use crate::oracle::Boot;

const ENTRIES: usize = 512;
const LARGE_PAGE: u64 = 2 << 20;
const DIRECTORY_SPAN: u64 = 1 << 30;
const PAGE: u64 = 4096;

/// Present, writable, accessed, dirty, large. Accessed and dirty from the start, so that the CPU never writes to the tables.
const LARGE: u64 = 0xe3;
/// Present, writable, accessed.
const TABLE: u64 = 0x23;
/// Not cached, whatever the MTRRs say.
const UNCACHED: u64 = 0x18;

/// Where all of it is mapped once more.
pub const UPPER_HALF: u64 = 0xffff_a580_0000_0000;
const UPPER_ENTRY: usize = (UPPER_HALF >> 39 & 0x1ff) as usize;

/// One or more page tables.
#[repr(C, align(4096))]
pub struct Tables<const COUNT: usize>([[AtomicU64; ENTRIES]; COUNT]);

/// The top level, of which two entries are used, both for the same.
pub static ROOT: Tables<1> = Tables([[const { AtomicU64::new(0) }; ENTRIES]; 1]);
/// The second level.
pub static POINTERS: Tables<1> = Tables([[const { AtomicU64::new(0) }; ENTRIES]; 1]);
/// The third level for the first 4 GiB.
pub static DIRECTORIES: Tables<4> = Tables([const { [const { AtomicU64::new(0) }; ENTRIES] }; 4]);

/// `struct hvm_start_info`, of version 1 (Xen's public/arch-x86/hvm/start_info.h).
#[repr(C)]
#[derive(Clone, Copy)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

const MAGIC: u32 = 0x336e_c578;

#[repr(C)]
#[derive(Clone, Copy)]
struct MemoryMapEntry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

const RAM: u32 = 1;

/// Reads what the loader left, completes the page tables, and says what RAM is free. From then on nothing of the loader's is used.
pub fn read_start_info(address: u32) -> Boot {
    let info: StartInfo = read(u64::from(address));
    if info.magic != MAGIC || info.version < 1 || info.memory_map == 0 {
        damage("boot", format_args!("magic={:#x} version={} map={:#x}", info.magic, info.version, info.memory_map));
        super::end(End::PowerOff);
    }
    let mut ram = Ranges::default();
    for index in 0..u64::from(info.memory_map_entries) {
        let entry: MemoryMapEntry = read(info.memory_map + index * size_of::<MemoryMapEntry>() as u64);
        if entry.kind == RAM {
            ram.add(Range { start: entry.address, end: entry.address.saturating_add(entry.size) });
        }
    }
    let command_line = kept::keep_command_line(string(info.command_line));
    acpi::read_processors(info.rsdp);
    let tables_end = map(&ram, kept::image().end);
    let used_end = processors::take_stacks(tables_end);
    let memory = ram.bytes();
    let mut free = ram;
    if processors::present() > 1 {
        free.remove(Range { start: processors::TRAMPOLINE, end: processors::TRAMPOLINE + PAGE });
    }
    // The first page stays out of use, as Rust has no pointers to it.
    free.remove(Range { start: 0, end: PAGE });
    free.remove(Range { start: kept::image().start, end: used_end });
    Boot { memory, free, command_line }
}

/// Completes the identity mapping; tables for RAM above 4 GiB come right after the image. Gives the end of what is in use.
fn map(ram: &Ranges, tables: u64) -> u64 {
    for (directory, table) in DIRECTORIES.0.iter().enumerate() {
        fill(table, directory as u64 * DIRECTORY_SPAN, ram);
    }
    let mut next = tables;
    let mut base = 4 * DIRECTORY_SPAN;
    while base < ram.end() && base / DIRECTORY_SPAN < ENTRIES as u64 {
        if ram.overlaps(Range { start: base, end: base + DIRECTORY_SPAN }) {
            // SAFETY: right after the image there is RAM, mapped and free: the loader's own data was copied before.
            let table = unsafe { &*ptr::with_exposed_provenance::<[AtomicU64; ENTRIES]>(next as usize) };
            fill(table, base, ram);
            POINTERS.0[0][(base / DIRECTORY_SPAN) as usize].store(next | TABLE, Ordering::Relaxed);
            next += PAGE;
        }
        base += DIRECTORY_SPAN;
    }
    ROOT.0[0][UPPER_ENTRY].store((&raw const POINTERS).addr() as u64 | TABLE, Ordering::Relaxed);
    cpu::flush_translations();
    next
}

fn fill(table: &[AtomicU64; ENTRIES], base: u64, ram: &Ranges) {
    for (index, entry) in table.iter().enumerate() {
        let start = base + index as u64 * LARGE_PAGE;
        let cached = ram.overlaps(Range { start, end: start + LARGE_PAGE });
        entry.store(start | LARGE | if cached { 0 } else { UNCACHED }, Ordering::Relaxed);
    }
}

/// The bytes of a string that a zero ends.
fn string(address: u64) -> impl Iterator<Item = u8> {
    (address..).map(read).take_while(move |byte| address != 0 && *byte != 0)
}

/// A value that the loader left in the first 4 GiB, which are mapped.
pub fn read<T: Copy>(address: u64) -> T {
    // SAFETY: the boot code mapped the first 4 GiB, and every T here is plain integers.
    unsafe { ptr::with_exposed_provenance::<T>(address as usize).read_unaligned() }
}
