//! The debug registers: all break- and watchpoints there are hold values of their own. One of each is enabled, and hit now and
//! then. Not more, as a hypervisor writes all of them at each entry, and an emulator forgets translations for each that is on.

use core::arch::global_asm;
use core::sync::atomic::{AtomicU64, Ordering};

use guest_kernel::options::MOST_CPUS;

use super::cpu::{read_register, write_register};
use super::exceptions::Frame;
use super::{number, system};
use crate::console::damage;

/// Pages of their own: an emulator slows down all accesses to a page with a watchpoint.
#[repr(C, align(4096))]
struct Watched([[AtomicU64; 128]; MOST_CPUS]);

static WATCHED: Watched = Watched([const { [const { AtomicU64::new(0) }; 128] }; MOST_CPUS]);
static HITS: [AtomicU64; MOST_CPUS] = [const { AtomicU64::new(0) }; MOST_CPUS];
static EXPECTED: [AtomicU64; MOST_CPUS] = [const { AtomicU64::new(0) }; MOST_CPUS];

/// MDSCR_EL1: monitor debug events, at EL1 too.
const MONITOR: u64 = 1 << 15 | 1 << 13;
/// At EL1, all four bytes of the instruction.
const BREAK: u64 = 1 << 1 | 0xf << 5;
/// At EL1, all eight bytes; loads, stores or both come with it.
const WATCH: u64 = 1 << 1 | 0xff << 5;
const ENABLED: u64 = 1;
const STORES: u64 = 2 << 3;

const BREAKPOINT: u64 = 0x31;
const WATCHPOINT: u64 = 0x35;

struct Pair {
    read: [fn() -> u64; 2],
    write: [fn(u64); 2],
}

macro_rules! pairs {
    ($kind:literal: $($number:literal)*) => {
        [$(Pair {
            read: [
                || read_register!(concat!("dbg", $kind, "vr", $number, "_el1")),
                || read_register!(concat!("dbg", $kind, "cr", $number, "_el1")),
            ],
            write: [
                |value| write_register!(concat!("dbg", $kind, "vr", $number, "_el1"), value),
                |value| write_register!(concat!("dbg", $kind, "cr", $number, "_el1"), value),
            ],
        }),*]
    };
}
static BREAKPOINTS: [Pair; 16] = pairs!("b": 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
static WATCHPOINTS: [Pair; 16] = pairs!("w": 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);

/// The registers as they were set: address and control of each.
pub struct Debug {
    breakpoints: [Option<[u64; 2]>; 16],
    watchpoints: [Option<[u64; 2]>; 16],
    monitor: u64,
    hits: [bool; 2],
}

impl Debug {
    /// Sets them, and finds out whether hits arrive at all. Debug exceptions must not be masked.
    pub fn new() -> Self {
        write_register!("oslar_el1", 0);
        let features = read_register!("id_aa64dfr0_el1");
        let count = |shift: u32| (features >> shift & 0xf) as usize + 1;
        let word = |index: usize| (&raw const WATCHED.0[number()][index * 8]).addr() as u64;
        let mut debug = Debug { breakpoints: [None; 16], watchpoints: [None; 16], monitor: 0, hits: [false; 2] };
        for (index, known) in debug.breakpoints.iter_mut().take(count(12)).enumerate() {
            let values = match index {
                0 => [breakpoint_target as *const () as u64, BREAK | ENABLED],
                _ => [word(index) + 4, BREAK],
            };
            *known = Some(set(&BREAKPOINTS[index], values));
        }
        for (index, known) in debug.watchpoints.iter_mut().take(count(20)).enumerate() {
            let kind = if index == 0 { STORES | ENABLED } else { (index as u64 % 3 + 1) << 3 };
            *known = Some(set(&WATCHPOINTS[index], [word(index), WATCH | kind]));
        }
        write_register!("mdscr_el1", MONITOR);
        debug.monitor = read_register!("mdscr_el1");
        debug.hits = [is_hit(breakpoint), is_hit(touch)];
        debug
    }

    /// Whether hits of breakpoints and of watchpoints arrive.
    pub fn has_hits(&self) -> [bool; 2] {
        self.hits
    }

    /// Compares, and puts right what is wrong.
    pub fn check(&mut self) {
        for (kind, pairs, known) in [("b", &BREAKPOINTS, &self.breakpoints), ("w", &WATCHPOINTS, &self.watchpoints)] {
            for (index, (pair, known)) in pairs.iter().zip(known).enumerate() {
                let Some(expected) = known else { continue };
                for (part, which) in ["vr", "cr"].into_iter().enumerate() {
                    let (expected, found) = (expected[part], (pair.read[part])());
                    if expected != found {
                        damage(
                            "debug",
                            format_args!("name=dbg{kind}{which}{index} expected={expected:#x} found={found:#x}"),
                        );
                        (pair.write[part])(expected);
                    }
                }
            }
        }
        let found = read_register!("mdscr_el1");
        if found != self.monitor {
            damage("debug", format_args!("name=mdscr expected={:#x} found={found:#x}", self.monitor));
            write_register!("mdscr_el1", self.monitor);
        }
    }

    /// Runs into the breakpoint and the watchpoint: the hits must arrive if hits arrived at the start.
    pub fn check_hits(&mut self) {
        let provoke: [(&str, fn()); 2] = [("breakpoint", breakpoint), ("watchpoint", touch)];
        for ((name, provoke), arrives) in provoke.into_iter().zip(self.hits) {
            if !is_hit(provoke) && arrives {
                damage("watchpoint", format_args!("missing={name} hits={}", HITS[number()].load(Ordering::Relaxed)));
            }
        }
    }

    /// Changes one: for the self-test.
    pub fn strike() {
        (WATCHPOINTS[1].write[0])((WATCHPOINTS[1].read[0])() + 8);
    }
}

fn set(pair: &Pair, values: [u64; 2]) -> [u64; 2] {
    // The address first, or it would be another that is watched for a moment.
    pair.write[0](values[0]);
    pair.write[1](values[1]);
    pair.read.map(|read| read())
}

fn is_hit(provoke: fn()) -> bool {
    let before = HITS[number()].load(Ordering::SeqCst);
    EXPECTED[number()].store(before + 1, Ordering::SeqCst);
    provoke();
    let arrived = HITS[number()].load(Ordering::SeqCst) == before + 1;
    EXPECTED[number()].store(before, Ordering::SeqCst);
    arrived
}

fn breakpoint() {
    breakpoint_target();
}

fn touch() {
    WATCHED.0[number()][0].store(1, Ordering::SeqCst);
}

// A page of its own, too: an emulator takes all code of a page with a breakpoint one instruction at a time.
global_asm!(
    ".pushsection .text.breakpoint_target, \"ax\", @progbits",
    ".balign 4096",
    ".global breakpoint_target",
    "breakpoint_target:",
    "nop",
    "ret",
    ".balign 4096",
    ".popsection",
);

unsafe extern "C" {
    safe fn breakpoint_target();
}

/// Called for every synchronous exception. Whether it was a debug exception; if so, what was hit is skipped.
pub fn hit(frame: &mut Frame, syndrome: u64, address: u64) -> bool {
    let class = syndrome >> 26 & 0x3f;
    if class != BREAKPOINT && class != WATCHPOINT {
        return false;
    }
    let place = if class == BREAKPOINT { frame.elr } else { address };
    let expected = [breakpoint_target as *const () as u64, (&raw const WATCHED.0[number()][0]).addr() as u64];
    let hits = HITS[number()].fetch_add(1, Ordering::SeqCst) + 1;
    if hits != EXPECTED[number()].load(Ordering::SeqCst) || !expected.contains(&place) {
        damage("watchpoint", format_args!("unexpected=1 esr={syndrome:#x} pc={:#x} far={address:#x}", frame.elr));
    }
    frame.elr += 4;
    system::restore_syndrome();
    true
}
