//! What the devicetree says: memory, the command line, and where the devices are.

use core::{ptr, slice};

use dtoolkit::fdt::{Fdt, FdtNode};
use dtoolkit::{Node, Property};
use guest_kernel::ranges::{Range, Ranges};

use super::processors;
use crate::irq_cell::IrqCell;

/// What serial port there is. Both kinds take a byte to send at their first address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Serial {
    /// A 16550, as the product has it.
    Ns16550(u64),
    /// A PL011, as QEMU's board has it: only written to.
    Pl011(u64),
}

/// The devices, by their addresses.
#[derive(Debug, Clone, Copy)]
pub struct Board {
    /// The serial port.
    pub serial: Serial,
    /// The interrupt controller's distributor.
    pub distributor: u64,
    /// The first of the redistributors.
    pub redistributors: u64,
    /// The interrupt translation service.
    pub its: Option<u64>,
}

/// The board, once it is known.
pub static BOARD: IrqCell<Option<Board>> = IrqCell::new(None);

/// What else the devicetree tells; it lies in memory that is free afterwards.
pub struct Found {
    pub memory: Ranges,
    pub command_line: &'static str,
}

/// Reads it all; the error says what is missing.
pub fn read(address: u64) -> Result<Found, &'static str> {
    if address == 0 || !address.is_multiple_of(8) {
        return Err("devicetree");
    }
    let start = ptr::with_exposed_provenance::<u8>(address as usize);
    // SAFETY: the loader's protocol: at this address there is a devicetree, whose first words are its magic and its size.
    let header = unsafe { slice::from_raw_parts(start, 8) };
    let size = u32::from_be_bytes([header[4], header[5], header[6], header[7]]) as usize;
    if header[..4] != 0xd00d_feed_u32.to_be_bytes() || size > 2 << 20 {
        return Err("magic");
    }
    // SAFETY: as above, and 2 MiB are the most it may have.
    let fdt = Fdt::new(unsafe { slice::from_raw_parts(start, size) }).map_err(|_| "syntax")?;
    let root = fdt.root();
    let mut board = (None, None, None);
    let mut found = Found { memory: Ranges::default(), command_line: "" };
    for node in root.children() {
        let name = node.name_without_address();
        if name == "memory" {
            for range in registers(node) {
                found.memory.add(range);
            }
        } else if name == "cpus" {
            for cpu in node.children().filter(|child| child.name_without_address() == "cpu") {
                let number = cpu.reg().ok().flatten().and_then(|mut entries| entries.next());
                number.and_then(|entry| entry.address::<u64>().ok()).into_iter().for_each(processors::add);
            }
        } else if name == "chosen" {
            found.command_line = node.property("bootargs").and_then(|property| property.value_as().ok()).unwrap_or("");
        } else if is(node, "ns16550a") {
            board.0 = registers(node).next().map(|range| Serial::Ns16550(range.start));
        } else if is(node, "arm,pl011") && board.0.is_none() {
            board.0 = registers(node).next().map(|range| Serial::Pl011(range.start));
        } else if is(node, "arm,gic-v3") {
            let mut parts = registers(node).map(|range| range.start);
            board.1 = parts.next().zip(parts.next());
            let its = node.children().find(|child| is(*child, "arm,gic-v3-its"));
            board.2 = its.and_then(|its| registers(its).next()).map(|range| range.start);
        }
    }
    let serial = board.0.ok_or("serial")?;
    let (distributor, redistributors) = board.1.ok_or("gic")?;
    BOARD.with(|found| *found = Some(Board { serial, distributor, redistributors, its: board.2 }));
    if found.memory.bytes() == 0 { Err("memory") } else { Ok(found) }
}

fn is(node: FdtNode<'_>, kind: &str) -> bool {
    node.compatible().is_some_and(|mut kinds| kinds.any(|entry| entry == kind))
}

fn registers(node: FdtNode<'_>) -> impl Iterator<Item = Range> {
    let entries = node.reg().ok().flatten().into_iter().flatten();
    entries.filter_map(|entry| {
        let start = entry.address::<u64>().ok()?;
        Some(Range { start, end: start.checked_add(entry.size::<u64>().ok()?)? })
    })
}
