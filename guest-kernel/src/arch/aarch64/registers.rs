//! All general registers, the other stack pointer and the flags hold known values while the CPU spins or halts until the next
//! interrupt, which then sends it on: not one register is left that could be used to wait for it.

use core::arch::naked_asm;
use core::mem::offset_of;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use guest_kernel::options::MOST_CPUS;
use guest_kernel::pattern::scramble;

use super::exceptions::Frame;
use super::number;
use crate::console::damage;

const GENERAL: usize = 31;
const STACK: usize = 31;
const FLAGS: usize = 32;
const COUNT: usize = 33;
/// Z says how to wait; N, C and V are any.
const ZERO: u64 = 1 << 30;
const OTHER_FLAGS: u64 = 0b1011 << 28;

/// What a CPU needs while its registers are held: it keeps the address on its stack, and finds it with what is found.
#[repr(C)]
struct Hold {
    pattern: [AtomicU64; COUNT],
    found: [AtomicU64; COUNT],
}

static HOLDS: [Hold; MOST_CPUS] =
    [const { Hold { pattern: [const { AtomicU64::new(0) }; COUNT], found: [const { AtomicU64::new(0) }; COUNT] } };
        MOST_CPUS];
static STRIKE: AtomicBool = AtomicBool::new(false);

/// What the checks need to know.
pub struct Registers {
    rounds: u64,
}

impl Registers {
    /// Each CPU begins with other values.
    pub fn new() -> Self {
        Registers { rounds: (number() as u64) << 32 }
    }

    /// Holds values in all registers until there is an interrupt, and looks at them.
    pub fn hold(&mut self, halted: bool) {
        self.rounds += 1;
        let own = &HOLDS[number()];
        for (index, pattern) in own.pattern.iter().enumerate() {
            let value = scramble(self.rounds * 64 + index as u64);
            let value = match index {
                FLAGS => value & OTHER_FLAGS | if halted { ZERO } else { 0 },
                _ => value,
            };
            pattern.store(value, Ordering::Relaxed);
        }
        hold(own);
        let mode = if halted { "halted" } else { "running" };
        for (index, (expected, found)) in own.pattern.iter().zip(&own.found).enumerate() {
            let (expected, found) = (expected.load(Ordering::Relaxed), found.load(Ordering::Relaxed));
            if expected != found {
                let details = format_args!("expected={expected:#018x} found={found:#018x} cpu={mode}");
                match index {
                    0..GENERAL => damage("register", format_args!("name=x{index} {details}")),
                    STACK => damage("register", format_args!("name=sp_el0 {details}")),
                    _ => damage("register", format_args!("name=nzcv {details}")),
                }
            }
        }
    }
}

/// Asks the next interrupt that comes while registers are held to change one: for the self-test.
pub fn strike() {
    STRIKE.store(true, Ordering::Relaxed);
}

/// Called by every interrupt: sends those on who wait for one.
pub fn wake(frame: &mut Frame) {
    let waiting = hold_waiting as *const () as u64..hold_over as *const () as u64;
    if waiting.contains(&frame.elr) {
        frame.elr = waiting.end;
        if STRIKE.swap(false, Ordering::Relaxed) {
            frame.x[9] ^= 1 << 17;
        }
    }
}

unsafe extern "C" {
    fn hold_waiting();
    fn hold_over();
}

/// Loads the registers, waits, stores them.
#[unsafe(naked)]
extern "C" fn hold(own: &Hold) {
    naked_asm!(
        "stp x29, x30, [sp, #-112]!",
        "stp x19, x20, [sp, #16]",
        "stp x21, x22, [sp, #32]",
        "stp x23, x24, [sp, #48]",
        "stp x25, x26, [sp, #64]",
        "stp x27, x28, [sp, #80]",
        "str x0, [sp, #96]",
        "ldp x1, x2, [x0, #248]",
        "msr sp_el0, x1",
        "msr nzcv, x2",
        "ldp x2, x3, [x0, #16]",
        "ldp x4, x5, [x0, #32]",
        "ldp x6, x7, [x0, #48]",
        "ldp x8, x9, [x0, #64]",
        "ldp x10, x11, [x0, #80]",
        "ldp x12, x13, [x0, #96]",
        "ldp x14, x15, [x0, #112]",
        "ldp x16, x17, [x0, #128]",
        "ldp x18, x19, [x0, #144]",
        "ldp x20, x21, [x0, #160]",
        "ldp x22, x23, [x0, #176]",
        "ldp x24, x25, [x0, #192]",
        "ldp x26, x27, [x0, #208]",
        "ldp x28, x29, [x0, #224]",
        "ldr x30, [x0, #240]",
        "ldp x0, x1, [x0]",
        "msr spsel, #0",
        ".global hold_waiting",
        "hold_waiting:",
        "b.eq 3f",
        "2: b 2b",
        "3: wfi",
        "b 3b",
        ".global hold_over",
        "hold_over:",
        "msr spsel, #1",
        "stp x0, x1, [sp, #-16]!",
        "ldr x0, [sp, #112]",
        "add x0, x0, #{found}",
        "stp x2, x3, [x0, #16]",
        "stp x4, x5, [x0, #32]",
        "stp x6, x7, [x0, #48]",
        "stp x8, x9, [x0, #64]",
        "stp x10, x11, [x0, #80]",
        "stp x12, x13, [x0, #96]",
        "stp x14, x15, [x0, #112]",
        "stp x16, x17, [x0, #128]",
        "stp x18, x19, [x0, #144]",
        "stp x20, x21, [x0, #160]",
        "stp x22, x23, [x0, #176]",
        "stp x24, x25, [x0, #192]",
        "stp x26, x27, [x0, #208]",
        "stp x28, x29, [x0, #224]",
        "str x30, [x0, #240]",
        "ldp x1, x2, [sp], #16",
        "stp x1, x2, [x0]",
        "mrs x1, sp_el0",
        "mrs x2, nzcv",
        "stp x1, x2, [x0, #248]",
        "ldp x19, x20, [sp, #16]",
        "ldp x21, x22, [sp, #32]",
        "ldp x23, x24, [sp, #48]",
        "ldp x25, x26, [sp, #64]",
        "ldp x27, x28, [sp, #80]",
        "ldp x29, x30, [sp], #112",
        "ret",
        found = const offset_of!(Hold, found),
    )
}
