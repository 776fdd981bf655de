//! The debug registers: four watchpoints, three on words nobody touches, one on a word that is written now and then.

use core::sync::atomic::{AtomicU64, Ordering};

use guest_kernel::options::MOST_CPUS;

use super::{cpu, number};
use crate::console::damage;

/// Pages of their own: an emulator slows down all accesses to a page with a watchpoint.
#[repr(C, align(4096))]
struct Watched([[AtomicU64; 64]; MOST_CPUS]);

static WATCHED: Watched = Watched([const { [const { AtomicU64::new(0) }; 64] }; MOST_CPUS]);
static HITS: [AtomicU64; MOST_CPUS] = [const { AtomicU64::new(0) }; MOST_CPUS];
static EXPECTED: [AtomicU64; MOST_CPUS] = [const { AtomicU64::new(0) }; MOST_CPUS];

/// All four on (0x555): writes of 8 bytes, writes of 4, any access to 1, writes of 2.
const CONTROL: u64 = 0x53d9_0555;
/// DR6 as it is with nothing to tell.
const QUIET: u64 = 0xffff_0ff0;

/// The registers as they were set.
pub struct Watchpoints {
    expected: [u64; 6],
    hits: bool,
}

impl Watchpoints {
    /// Sets them, and finds out whether hits arrive at all: QEMU's emulation of nested virtualization has none.
    pub fn new() -> Self {
        let address = |index: usize| (&raw const WATCHED.0[number()][index * 8]).addr() as u64;
        cpu::write_dr0(address(0));
        cpu::write_dr1(address(1));
        cpu::write_dr2(address(2));
        cpu::write_dr3(address(3));
        cpu::write_dr6(QUIET);
        cpu::write_dr7(CONTROL);
        let mut watchpoints = Watchpoints { expected: read(), hits: false };
        watchpoints.hits = touch();
        watchpoints
    }

    /// Whether hits arrive.
    pub fn has_hits(&self) -> bool {
        self.hits
    }

    /// Compares, and puts right what is wrong.
    pub fn check(&mut self) {
        let found = read();
        for ((name, expected), found) in ["dr0", "dr1", "dr2", "dr3", "dr6", "dr7"].iter().zip(self.expected).zip(found)
        {
            if expected != found {
                damage("debug", format_args!("name={name} expected={expected:#x} found={found:#x}"));
            }
        }
        if found != self.expected {
            let [dr0, dr1, dr2, dr3, dr6, dr7] = self.expected;
            cpu::write_dr0(dr0);
            cpu::write_dr1(dr1);
            cpu::write_dr2(dr2);
            cpu::write_dr3(dr3);
            cpu::write_dr6(dr6);
            cpu::write_dr7(dr7);
        }
    }

    /// Writes to the watched word: the hit must arrive if hits arrived at the start.
    pub fn check_hit(&mut self) {
        if !touch() && self.hits {
            damage("watchpoint", format_args!("missing=1 hits={}", HITS[number()].load(Ordering::Relaxed)));
        }
    }
}

fn read() -> [u64; 6] {
    [cpu::read_dr0(), cpu::read_dr1(), cpu::read_dr2(), cpu::read_dr3(), cpu::read_dr6(), cpu::read_dr7()]
}

fn touch() -> bool {
    let before = HITS[number()].load(Ordering::SeqCst);
    EXPECTED[number()].store(before + 1, Ordering::SeqCst);
    WATCHED.0[number()][0].fetch_add(1, Ordering::SeqCst);
    let arrived = HITS[number()].load(Ordering::SeqCst) == before + 1;
    EXPECTED[number()].store(before, Ordering::SeqCst);
    arrived
}

/// Called for every debug exception.
pub fn hit(rip: u64) {
    let status = cpu::read_dr6();
    cpu::write_dr6(QUIET);
    let hits = HITS[number()].fetch_add(1, Ordering::SeqCst) + 1;
    if status & 0xf != 1 || hits != EXPECTED[number()].load(Ordering::SeqCst) {
        damage("watchpoint", format_args!("unexpected=1 dr6={status:#x} rip={rip:#x}"));
    }
}

/// Changes one: for the self-test.
pub fn strike() {
    cpu::write_dr3(cpu::read_dr3() + 8);
}
