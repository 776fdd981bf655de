//! What the ACPI tables say: the CPUs there are, by the numbers of their interrupt controllers.

use super::memory::read;
use super::processors;

/// No table we look for is larger.
const LARGEST: u32 = 64 << 10;
const HEADER: u64 = 36;

fn length(table: u64) -> u64 {
    u64::from(read::<u32>(table + 4).min(LARGEST))
}

/// Reads the tables that this root pointer leads to, below 4 GiB. Where there are none there is one CPU.
pub fn read_processors(root: u64) {
    if root == 0 || read::<[u8; 8]>(root) != *b"RSD PTR " {
        return;
    }
    // The newer table of tables has longer addresses.
    let (tables, size) = match read::<u8>(root + 15) {
        0 => (u64::from(read::<u32>(root + 16)), 4),
        _ => (read::<u64>(root + 24), 8),
    };
    for entry in (tables + HEADER..tables + length(tables)).step_by(size) {
        let table = if size == 4 { u64::from(read::<u32>(entry)) } else { read::<u64>(entry) };
        if table < 1 << 32 && read::<[u8; 4]>(table) == *b"APIC" {
            read_controllers(table);
        }
    }
}

fn read_controllers(table: u64) {
    let mut entry = table + HEADER + 8;
    while entry + 2 <= table + length(table) {
        let [kind, size] = read::<[u8; 2]>(entry);
        let (id, flags) = match kind {
            0 => (u32::from(read::<u8>(entry + 3)), read::<u32>(entry + 4)),
            9 => (read::<u32>(entry + 4), read::<u32>(entry + 8)),
            _ => (0, 0),
        };
        if flags & 1 != 0 {
            processors::add(id);
        }
        entry += u64::from(size.max(2));
    }
}
