//! What the loader says about memory, and the page tables: all RAM one to one in blocks of 2 MiB, all else as devices.

use core::ptr;
use core::sync::atomic::{AtomicU64, Ordering};

use guest_kernel::options::End;
use guest_kernel::ranges::{Range, Ranges};

use super::cpu::{self, write_register};
use super::{devicetree, processors};
use crate::console::damage;
use crate::kept;
use crate::oracle::Boot;

const ENTRIES: usize = 512;
const BLOCK: u64 = 2 << 20;
const TABLE_SPAN: u64 = 1 << 30;
const PAGE: u64 = 4096;

/// MAIR_EL1: the first two are used (device, and normal write-back memory), the others have only to be kept.
pub const ATTRIBUTES: u64 = 0x00f4_77bb_0c44_ff04;
/// TCR_EL1: 39 bits of address from TTBR0 alone, pages of 4 KiB, walks through the caches. The physical size is added.
pub const TRANSLATION_CONTROL: u64 = 25 | 1 << 8 | 1 << 10 | 3 << 12 | 25 << 16 | 1 << 23 | 2 << 30;
/// A block of devices: accessed, not global, never executed.
pub const DEVICE_BLOCK: u64 = 0x0060_0000_0000_0c01;
/// A block of RAM: accessed, not global, inner shareable, attributes 1.
pub const RAM_BLOCK: u64 = 0x0040_0000_0000_0f05;
const TABLE: u64 = 3;
/// An address space of its own, so that nothing cached from the first tables is taken for these.
pub const ADDRESS_SPACE: u64 = 0x5a << 48;

#[repr(C, align(4096))]
pub struct Table([AtomicU64; ENTRIES]);

/// The top level.
pub static ROOT: Table = Table([const { AtomicU64::new(0) }; ENTRIES]);

/// Reads what the loader left, makes the page tables, and says what RAM is free. From then on nothing of the loader's is used.
pub fn read_devicetree(address: u64) -> Boot {
    let found = devicetree::read(address).unwrap_or_else(|missing| {
        damage("boot", format_args!("devicetree={address:#x} missing={missing}"));
        super::end(End::PowerOff)
    });
    let command_line = kept::keep_command_line(found.command_line.bytes());
    let ram = found.memory;
    let tables_end = map(&ram, kept::image().end);
    let used_end = processors::take_stacks(tables_end);
    let mut free = ram.clone();
    free.remove(Range { start: kept::image().start, end: used_end });
    // What the tables cannot reach stays out of use.
    free.remove(Range { start: ENTRIES as u64 * TABLE_SPAN, end: u64::MAX });
    Boot { memory: ram.bytes(), free, command_line }
}

/// Makes the identity mapping; tables for RAM come right after the image. Gives the end of what is in use.
fn map(ram: &Ranges, tables: u64) -> u64 {
    let mut next = tables;
    for (index, entry) in ROOT.0.iter().enumerate() {
        let base = index as u64 * TABLE_SPAN;
        if !ram.overlaps(Range { start: base, end: base + TABLE_SPAN }) {
            entry.store(base | DEVICE_BLOCK, Ordering::Relaxed);
            continue;
        }
        // SAFETY: right after the image there is RAM, mapped and free: the loader's own data was copied before.
        let table = unsafe { &*ptr::with_exposed_provenance::<[AtomicU64; ENTRIES]>(next as usize) };
        fill(table, base, ram);
        entry.store(next | TABLE, Ordering::Relaxed);
        next += PAGE;
    }
    cpu::synchronize();
    write_register!("ttbr0_el1", (&raw const ROOT).addr() as u64 | ADDRESS_SPACE);
    next
}

fn fill(table: &[AtomicU64; ENTRIES], base: u64, ram: &Ranges) {
    for (index, entry) in table.iter().enumerate() {
        let start = base + index as u64 * BLOCK;
        let is_ram = ram.overlaps(Range { start, end: start + BLOCK });
        entry.store(start | if is_ram { RAM_BLOCK } else { DEVICE_BLOCK }, Ordering::Relaxed);
    }
}
