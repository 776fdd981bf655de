//! The interrupt translation service: two message-signalled interrupts of one device. The first is sent once per second and must
//! arrive. The second is disabled and pending all the time, until once per second it is let through: each pause finds it pending.

use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use super::cpu;
use super::gic::{self, Gic};
use crate::console::damage;

/// The first message-signalled interrupt.
const FIRST: u32 = 8192;
const COUNT: usize = 2;
const DEVICE: u64 = 5;
const COLLECTION: u64 = 0;
const PENDING: usize = 1;

const GITS_CTLR: u64 = 0;
const GITS_IIDR: u64 = 4;
const GITS_TYPER: u64 = 8;
const GITS_CBASER: u64 = 0x80;
const GITS_CWRITER: u64 = 0x88;
const GITS_CREADR: u64 = 0x90;
const GITS_BASER: u64 = 0x100;
const PIDR2: u64 = 0xffe8;
const GICR_CTLR: u64 = 0;
const GICR_TYPER: u64 = 8;
const GICR_PROPBASER: u64 = 0x70;
const GICR_PENDBASER: u64 = 0x78;

const VALID: u64 = 1 << 63;
/// Inner shareable, written back.
const TABLE_MEMORY: u64 = 7 << 59 | 1 << 10;
const REDISTRIBUTOR_MEMORY: u64 = 7 << 7 | 1 << 10;
const PAGES_OF_64_KIB: u64 = 2 << 8;
const PENDING_IS_ZERO: u64 = 1 << 62;
/// 14 bits of interrupt numbers: the first 8192 of them that are messages.
const ID_BITS: u64 = 14;

const ENABLED: u8 = 1;
const PRIORITY: u8 = 0x40;

/// What the service keeps in memory; each at 64 KiB, the largest alignment that is asked for.
#[repr(C, align(65536))]
struct Aligned<const SIZE: usize>([AtomicU8; SIZE]);

impl<const SIZE: usize> Aligned<SIZE> {
    const fn new() -> Self {
        Aligned([const { AtomicU8::new(0) }; SIZE])
    }

    fn address(&self) -> u64 {
        (&raw const self.0).addr() as u64
    }
}

static DEVICES: Aligned<0x10000> = Aligned::new();
static COLLECTIONS: Aligned<0x10000> = Aligned::new();
static PENDING_TABLE: Aligned<0x10000> = Aligned::new();
static PROPERTIES: Aligned<0x2000> = Aligned::new();
static TRANSLATIONS: Aligned<0x1000> = Aligned::new();

const QUEUE: usize = 4096;
const COMMAND: usize = 32;
#[repr(C, align(65536))]
struct Queue([AtomicU64; QUEUE / 8]);
static COMMANDS: Queue = Queue([const { AtomicU64::new(0) }; QUEUE / 8]);

static TAKEN: [AtomicU64; COUNT] = [const { AtomicU64::new(0) }; COUNT];

/// The service.
pub struct Its {
    address: u64,
    target: u64,
    written: u64,
    lost: bool,
}

impl Its {
    /// Switches it on, with both interrupts mapped. Interrupts must be on.
    pub fn new(address: u64, gic: &mut Gic) -> Self {
        let redistributor = gic.redistributor();
        cpu::write_u64(redistributor + GICR_PROPBASER, PROPERTIES.address() | REDISTRIBUTOR_MEMORY | (ID_BITS - 1));
        let pending = PENDING_TABLE.address() | REDISTRIBUTOR_MEMORY;
        cpu::write_u64(redistributor + GICR_PENDBASER, pending | PENDING_IS_ZERO);
        for property in &PROPERTIES.0[..COUNT] {
            property.store(PRIORITY | ENABLED, Ordering::Relaxed);
        }
        cpu::synchronize();
        cpu::write_u32(redistributor + GICR_CTLR, 1);
        for number in 0..8 {
            let register = address + GITS_BASER + number * 8;
            let table = match cpu::read_u64(register) >> 56 & 7 {
                1 => DEVICES.address(),
                4 => COLLECTIONS.address(),
                _ => continue,
            };
            cpu::write_u64(register, table | VALID | TABLE_MEMORY | PAGES_OF_64_KIB);
        }
        let commands = (&raw const COMMANDS.0).addr() as u64;
        cpu::write_u64(address + GITS_CBASER, commands | VALID | TABLE_MEMORY);
        cpu::write_u64(address + GITS_CWRITER, 0);
        cpu::write_u32(address + GITS_CTLR, 1);
        // By its address or by its number, as the service wants it.
        let by_address = cpu::read_u64(address + GITS_TYPER) & 1 << 19 != 0;
        let number = cpu::read_u64(redistributor + GICR_TYPER) >> 8 & 0xffff;
        let target = if by_address { redistributor } else { number << 16 };
        let mut its = Its { address, target, written: 0, lost: false };
        its.command([0x08 | DEVICE << 32, 4, TRANSLATIONS.address() | VALID]); // MAPD, 5 bits of events
        its.command([0x09, 0, COLLECTION | target | VALID]); // MAPC
        for event in 0..COUNT as u64 {
            let id = u64::from(FIRST) + event;
            its.command([0x0a | DEVICE << 32, event | id << 32, COLLECTION]); // MAPTI
        }
        its.set_enabled(PENDING, false);
        its.send(PENDING);
        for offset in [GITS_IIDR, GITS_TYPER, GITS_TYPER + 4, GITS_CBASER, GITS_CBASER + 4, PIDR2] {
            gic.keep("its", address, offset, u32::MAX);
        }
        // Whether it is quiescent is its own business.
        gic.keep("its", address, GITS_CTLR, 1);
        for offset in [0, 4, 8, 12] {
            gic.keep("its", address, GITS_BASER + offset, u32::MAX);
        }
        for offset in [GICR_CTLR, GICR_PROPBASER, GICR_PROPBASER + 4, GICR_PENDBASER] {
            gic.keep("redistributor", redistributor, offset, u32::MAX);
        }
        its
    }

    /// Both interrupts must arrive, the one that was disabled as soon as it is enabled and not before.
    pub fn check(&mut self) {
        let [first, second] = [0, 1].map(|event| TAKEN[event].load(Ordering::SeqCst));
        if !core::mem::take(&mut self.lost) {
            self.send(0);
        }
        if !gic::arrives(&TAKEN[0], first) {
            damage("lpi", format_args!("lost=1 intid={FIRST} taken={first}"));
        }
        self.set_enabled(PENDING, true);
        if !gic::arrives(&TAKEN[PENDING], second) {
            damage("lpi", format_args!("lost=1 intid={} taken={second} was=pending", FIRST + 1));
        }
        self.set_enabled(PENDING, false);
        self.send(PENDING);
        let found = TAKEN[PENDING].load(Ordering::SeqCst);
        if found > second + 1 {
            damage("lpi", format_args!("unexpected=1 intid={} taken={found} before={second}", FIRST + 1));
        }
    }

    /// Loses the next one: for the self-test.
    pub fn strike(&mut self) {
        self.lost = true;
    }

    fn set_enabled(&mut self, event: usize, enabled: bool) {
        PROPERTIES.0[event].store(PRIORITY | if enabled { ENABLED } else { 0 }, Ordering::SeqCst);
        self.command([0x0c | DEVICE << 32, event as u64, 0]); // INV
    }

    fn send(&mut self, event: usize) {
        self.command([0x03 | DEVICE << 32, event as u64, 0]); // INT
    }

    /// One command, and a second one that waits for its effect.
    fn command(&mut self, words: [u64; 3]) {
        for command in [words, [0x05, 0, self.target]] {
            let place = self.written as usize / 8;
            for (word, value) in COMMANDS.0[place..].iter().zip(command) {
                word.store(value, Ordering::Relaxed);
            }
            self.written = (self.written + COMMAND as u64) % QUEUE as u64;
        }
        cpu::synchronize();
        cpu::write_u64(self.address + GITS_CWRITER, self.written);
        let done = (0..100_000).any(|_| cpu::read_u64(self.address + GITS_CREADR) == self.written);
        if !done {
            let read = cpu::read_u64(self.address + GITS_CREADR);
            damage("lpi", format_args!("stuck=1 written={:#x} read={read:#x}", self.written));
        }
    }
}

/// A message has come. False if it is none of ours.
pub fn taken(id: u32) -> bool {
    let ours = id.checked_sub(FIRST).and_then(|event| TAKEN.get(event as usize));
    if let Some(taken) = ours {
        taken.fetch_add(1, Ordering::SeqCst);
    }
    ours.is_some()
}
