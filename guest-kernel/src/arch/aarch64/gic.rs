//! The interrupt controller, a GICv3: timers, an interrupt to itself, and everything a controller keeps.

use core::sync::atomic::{AtomicU64, Ordering};

use guest_kernel::options::MOST_CPUS;
use guest_kernel::ring::LANES;

use super::cpu::{self, read_register, write_register};
use super::devicetree::Board;
use super::{number, timer};
use crate::console::damage;

/// What is acknowledged when nothing is pending.
pub const NONE: u32 = 1023;
/// The interrupt that the CPU sends to itself once per second.
pub const OWN: u32 = 1;
/// One that is sent while it is disabled, and stays pending.
const PENDING: u32 = 2;
/// The first of those from one CPU to the next.
pub const IPI: u32 = 4;
/// The last of them.
pub const LAST_IPI: u32 = IPI + LANES as u32 - 1;
/// One that is taken and never ended, so that the CPU has an active priority all the time.
pub const PARKED: u32 = 15;
const IPIS: u32 = ((1 << LANES) - 1) << IPI;
/// Private interrupts without a device: one pending, one active.
const PRIVATE_PENDING: u32 = 18;
const PRIVATE_ACTIVE: u32 = 19;
/// The first of 32 shared interrupts without a device.
const SHARED: u64 = 64;

const GICD_CTLR: u64 = 0;
const GICD_TYPER: u64 = 4;
const GICD_IIDR: u64 = 8;
const GICR_IIDR: u64 = 4;
const GICR_TYPER: u64 = 8;
const GICR_WAKER: u64 = 0x14;
const IGROUPR: u64 = 0x80;
const ISENABLER: u64 = 0x100;
const ICENABLER: u64 = 0x180;
const ISPENDR: u64 = 0x200;
const ISACTIVER: u64 = 0x300;
const IPRIORITYR: u64 = 0x400;
const ICFGR: u64 = 0xc00;
const IROUTER: u64 = 0x6000;
const PIDR2: u64 = 0xffe8;
const FRAME: u64 = 0x2_0000;
const SGI_FRAME: u64 = 0x1_0000;

const WRITE_PENDING: u32 = 1 << 31;
const AFFINITY_ROUTING: u32 = 1 << 4;
const GROUP_1: u32 = 1 << 1;

const PRIORITY_MASK: u64 = 0xf0;
/// Above the parked one, so that they come through.
const PRIORITY: u32 = 0x6060_6060;
const PARKED_PRIORITY: u32 = 0xe060_6060;
/// The three highest bits of a priority decide.
const BINARY_POINT: u64 = 5;
/// The waits for an interrupt that has been sent are counted in turns, not in time, so that a pause does not shorten them.
const TURNS: u32 = 100_000;

static OWN_TAKEN: [AtomicU64; MOST_CPUS] = [const { AtomicU64::new(0) }; MOST_CPUS];
static PARKED_TAKEN: [AtomicU64; MOST_CPUS] = [const { AtomicU64::new(0) }; MOST_CPUS];

/// A register in memory that is to keep the bits of the mask.
#[derive(Clone, Copy)]
struct Kept {
    part: &'static str,
    address: u64,
    offset: u64,
    mask: u32,
    value: u32,
}

/// The controller.
pub struct Gic {
    distributor: u64,
    redistributor: u64,
    kept: [Option<Kept>; 96],
    count: usize,
    own_lost: bool,
}

impl Gic {
    /// Switches it on, with both timers enabled. Interrupts are off.
    pub fn new(board: &Board) -> Self {
        let mut gic = Gic {
            distributor: board.distributor,
            redistributor: own_redistributor(board.redistributors),
            kept: [None; 96],
            count: 0,
            own_lost: false,
        };
        if number() == 0 {
            cpu::write_u32(gic.distributor + GICD_CTLR, AFFINITY_ROUTING);
            gic.wait();
            cpu::write_u32(gic.distributor + GICD_CTLR, AFFINITY_ROUTING | GROUP_1);
            gic.wait();
        }
        cpu::write_u32(gic.redistributor + GICR_WAKER, 0);
        while cpu::read_u32(gic.redistributor + GICR_WAKER) & 4 != 0 {}
        gic.set_private();
        if number() == 0 {
            gic.set_shared();
        }
        write_register!("icc_sre_el1", 7);
        write_register!("icc_bpr1_el1", BINARY_POINT);
        write_register!("icc_ctlr_el1", 0);
        write_register!("icc_pmr_el1", PRIORITY_MASK);
        write_register!("icc_igrpen1_el1", 1);
        gic
    }

    fn set_private(&mut self) {
        let own = self.redistributor + SGI_FRAME;
        cpu::write_u32(own + IGROUPR, u32::MAX);
        for word in 0..8 {
            cpu::write_u32(own + IPRIORITYR + word * 4, if word == 3 { PARKED_PRIORITY } else { PRIORITY });
        }
        // KVM's controller comes with the first 16 enabled.
        cpu::write_u32(own + ICENABLER, u32::MAX);
        cpu::write_u32(own + ISENABLER, 1 << timer::TICK | 1 << timer::WATCHDOG | 1 << OWN | 1 << PARKED | IPIS);
        cpu::write_u32(own + ISPENDR, 1 << PRIVATE_PENDING | 1 << PENDING);
        cpu::write_u32(own + ISACTIVER, 1 << PRIVATE_ACTIVE);
    }

    fn set_shared(&mut self) {
        let shared = self.distributor;
        if !self.has_shared() {
            return;
        }
        let word = SHARED / 8;
        cpu::write_u32(shared + IGROUPR + word, u32::MAX);
        for number in 0..8u32 {
            let priorities = 0x8040_c020u32.rotate_left(number * 8);
            cpu::write_u32(shared + IPRIORITYR + SHARED + u64::from(number) * 4, priorities);
        }
        for number in 0..2 {
            cpu::write_u32(shared + ICFGR + SHARED / 4 + number * 4, 0xa0a0_0a82);
        }
        cpu::write_u64(shared + IROUTER + SHARED * 8, own_affinity());
        cpu::write_u32(shared + ISENABLER + word, 0xff00_00f0);
        // Of those that are disabled, some pending, some active, some both.
        cpu::write_u32(shared + ISPENDR + word, 0x0000_1503);
        cpu::write_u32(shared + ISACTIVER + word, 0x0003_1001);
    }

    fn has_shared(&self) -> bool {
        u64::from(cpu::read_u32(self.distributor + GICD_TYPER) & 0x1f) > SHARED / 32
    }

    /// The rest, with interrupts on: one is parked, and all that is to be kept is remembered.
    pub fn finish(&mut self) {
        send(own_affinity(), PARKED);
        arrives(&PARKED_TAKEN[number()], 0);
        if number() == 0 {
            self.keep_shared();
        }
        let own = self.redistributor + SGI_FRAME;
        let redistributor = self.redistributor;
        for offset in [GICR_IIDR, GICR_TYPER, GICR_TYPER + 4, GICR_WAKER, PIDR2] {
            self.keep("redistributor", redistributor, offset, u32::MAX);
        }
        for offset in [IGROUPR, ISENABLER, ICFGR, ICFGR + 4] {
            self.keep("private", own, offset, u32::MAX);
        }
        for number in 0..8 {
            self.keep("private", own, IPRIORITYR + number * 4, u32::MAX);
        }
        // The timers' come and go.
        let ours = 1 << PENDING | 1 << PRIVATE_PENDING | 1 << PRIVATE_ACTIVE | 1 << PARKED;
        self.keep("private", own, ISPENDR, ours);
        self.keep("private", own, ISACTIVER, ours);
    }

    fn keep_shared(&mut self) {
        let distributor = self.distributor;
        for offset in [GICD_CTLR, GICD_TYPER, GICD_IIDR, PIDR2] {
            self.keep("distributor", distributor, offset, u32::MAX);
        }
        for word in 1..if self.has_shared() { 3 } else { 1 } {
            for (offset, bytes) in [(IGROUPR, 4), (ISENABLER, 4), (ISPENDR, 4), (ISACTIVER, 4)] {
                self.keep("distributor", distributor, offset + word * bytes, u32::MAX);
            }
            for (offset, words) in [(IPRIORITYR, 8), (ICFGR, 2)] {
                for number in 0..words {
                    self.keep("distributor", distributor, offset + (word * words + number) * 4, u32::MAX);
                }
            }
            self.keep("distributor", distributor, IROUTER + word * 32 * 8, u32::MAX);
        }
    }

    /// Remembers what a register holds now.
    pub fn keep(&mut self, part: &'static str, address: u64, offset: u64, mask: u32) {
        if let Some(place) = self.kept.get_mut(self.count) {
            *place = Some(Kept { part, address, offset, mask, value: cpu::read_u32(address + offset) & mask });
            self.count += 1;
        }
    }

    fn wait(&self) {
        while cpu::read_u32(self.distributor + GICD_CTLR) & WRITE_PENDING != 0 {}
    }

    /// The address of this CPU's redistributor.
    pub fn redistributor(&self) -> u64 {
        self.redistributor
    }

    /// How many registers are kept.
    pub fn len(&self) -> usize {
        self.count
    }

    /// One of the registers in memory, each of which costs an exit; what was found is expected from then on.
    pub fn check(&mut self, index: usize) {
        let Some(Some(kept)) = self.kept.get_mut(index) else { return };
        let found = cpu::read_u32(kept.address + kept.offset) & kept.mask;
        if found != kept.value {
            let Kept { part, offset, value, .. } = kept;
            damage("gic", format_args!("part={part} offset={offset:#x} expected={value:#010x} found={found:#010x}"));
            kept.value = found;
        }
    }

    /// The CPU interface, which needs no exit. To be called when no interrupt is being handled.
    pub fn check_interface(&self) {
        let parked = u64::from(PARKED_PRIORITY >> 24);
        for (name, expected, found) in [
            ("icc_pmr_el1", PRIORITY_MASK, read_register!("icc_pmr_el1")),
            ("icc_bpr1_el1", BINARY_POINT, read_register!("icc_bpr1_el1")),
            ("icc_igrpen1_el1", 1, read_register!("icc_igrpen1_el1")),
            ("icc_rpr_el1", parked, read_register!("icc_rpr_el1")),
            ("icc_ctlr_el1", 0, read_register!("icc_ctlr_el1") & 3),
            ("icc_sre_el1", 1, read_register!("icc_sre_el1") & 1),
        ] {
            if expected != found {
                damage("gic", format_args!("name={name} expected={expected:#x} found={found:#x}"));
            }
        }
    }

    /// Sends an interrupt to itself, which must arrive.
    pub fn check_own(&mut self) {
        let before = OWN_TAKEN[number()].load(Ordering::SeqCst);
        if !core::mem::take(&mut self.own_lost) {
            send(own_affinity(), OWN);
        }
        if !arrives(&OWN_TAKEN[number()], before) {
            damage("sgi", format_args!("lost=1 taken={before}"));
        }
    }

    /// Changes a priority: for the self-test.
    pub fn strike(&self) {
        cpu::write_u32(self.redistributor + SGI_FRAME + IPRIORITYR + 28, 0x8080_8080);
    }

    /// Loses the next interrupt to itself: for the self-test.
    pub fn strike_own(&mut self) {
        self.own_lost = true;
    }
}

/// This CPU's affinity, as the registers that route have it.
pub fn own_affinity() -> u64 {
    read_register!("mpidr_el1") & 0xff_00ff_ffff
}

/// The redistributor of this CPU: the one with its affinity.
fn own_redistributor(first: u64) -> u64 {
    let affinity = own_affinity();
    let affinity = affinity & 0xff_ffff | affinity >> 8 & 0xff00_0000;
    let mut frame = first;
    loop {
        let kind = cpu::read_u64(frame + GICR_TYPER);
        let is_last = kind & 1 << 4 != 0;
        if kind >> 32 == affinity || is_last {
            return frame;
        }
        frame += FRAME;
    }
}

/// Sends one of the first 16 interrupts to a CPU.
pub fn send(to: u64, id: u32) {
    let list = 1 << (to & 0xf);
    let range = (to >> 4 & 0xf) << 44;
    let affinity = (to >> 8 & 0xff) << 16 | (to >> 16 & 0xff) << 32 | (to >> 32) << 48;
    // What was written before is seen by whoever is interrupted.
    cpu::synchronize();
    write_register!("icc_sgi1r_el1", list | range | affinity | u64::from(id) << 24);
}

/// Waits for the next interrupt of a kind.
pub fn arrives(taken: &AtomicU64, before: u64) -> bool {
    happens(|| taken.load(Ordering::SeqCst) != before)
}

/// Waits for what an interrupt that is already due does.
pub fn happens(has_happened: impl Fn() -> bool) -> bool {
    (0..TURNS).any(|_| {
        core::hint::spin_loop();
        has_happened()
    })
}

/// Takes the interrupt that is to be handled.
pub fn acknowledge() -> u32 {
    let id = read_register!("icc_iar1_el1");
    cpu::synchronize();
    id as u32
}

/// It has been handled.
pub fn end_of_interrupt(id: u32) {
    write_register!("icc_eoir1_el1", u64::from(id));
}

/// The CPU's interrupt to itself has come.
pub fn own_taken() {
    OWN_TAKEN[number()].fetch_add(1, Ordering::SeqCst);
}

/// The interrupt that is never ended has come, which it may once.
pub fn park() {
    if PARKED_TAKEN[number()].fetch_add(1, Ordering::SeqCst) > 0 {
        damage("interrupt", format_args!("intid={PARKED} parked=1"));
    }
}
