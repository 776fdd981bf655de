//! All sixteen general registers and the flags hold known values while the CPU spins or halts until the next interrupt.

use core::arch::naked_asm;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};

use guest_kernel::pattern::scramble;

use super::counter;
use super::interrupts::EVENT;
use super::tables::Frame;
use crate::console::damage;

const NAMES: [&str; 16] =
    ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];
const RSP: usize = 4;
/// Direction and ID: two flags that nothing else here uses.
const FLAGS: u64 = 1 << 10 | 1 << 21;

static PATTERN: [AtomicU64; 16] = [const { AtomicU64::new(0) }; 16];
static FOUND: [AtomicU64; 16] = [const { AtomicU64::new(0) }; 16];
static FOUND_FLAGS: AtomicU64 = AtomicU64::new(0);
static SAVED_STACK: AtomicU64 = AtomicU64::new(0);
static BUDGET: AtomicU32 = AtomicU32::new(0);
static HALT: AtomicU8 = AtomicU8::new(0);
static STRIKE: AtomicBool = AtomicBool::new(false);

/// What the checks need to know.
pub struct Registers {
    budget: u32,
    rounds: u64,
}

impl Registers {
    /// Finds out how long to spin at most: about 100 ms, well below what counts as a pause. Interrupts must be off.
    pub fn new(khz: u64) -> Self {
        const TRIAL: u32 = 200_000;
        let mut registers = Registers { budget: TRIAL, rounds: 0 };
        let start = counter();
        registers.hold(false);
        let spent = (counter() - start).max(1);
        registers.budget = (u64::from(TRIAL) * 100 * khz / spent).clamp(1000, u64::from(u32::MAX)) as u32;
        registers
    }

    /// Holds values in all registers until there is an interrupt, and looks at them.
    pub fn hold(&mut self, halted: bool) {
        self.rounds += 1;
        for (index, pattern) in PATTERN.iter().enumerate() {
            let value = scramble(self.rounds * 16 + index as u64);
            // The stack pointer has to be an address that could be one, as a return from an interrupt loads it.
            pattern.store(if index == RSP { value & 0x0000_7fff_ffff_fff8 } else { value }, Ordering::Relaxed);
        }
        BUDGET.store(self.budget, Ordering::Relaxed);
        HALT.store(u8::from(halted), Ordering::Relaxed);
        EVENT.store(0, Ordering::Relaxed);
        hold();
        let mode = if halted { "halted" } else { "running" };
        for ((name, expected), found) in NAMES.iter().zip(&PATTERN).zip(&FOUND) {
            let (expected, found) = (expected.load(Ordering::Relaxed), found.load(Ordering::Relaxed));
            if expected != found {
                damage(
                    "register",
                    format_args!("name={name} expected={expected:#018x} found={found:#018x} cpu={mode}"),
                );
            }
        }
        let flags = FOUND_FLAGS.load(Ordering::Relaxed);
        if flags & FLAGS != FLAGS {
            damage("register", format_args!("name=rflags expected={FLAGS:#x} found={flags:#x} cpu={mode}"));
        }
    }
}

/// Asks the next tick that comes while registers are held to change one: for the self-test.
pub fn strike() {
    STRIKE.store(true, Ordering::Relaxed);
}

/// Called by the tick.
pub fn strike_if_asked(frame: &mut Frame) {
    if STRIKE.load(Ordering::Relaxed) && frame.rax == PATTERN[0].load(Ordering::Relaxed) {
        STRIKE.store(false, Ordering::Relaxed);
        frame.rax ^= 1 << 17;
    }
}

/// Loads the registers, waits, stores them.
#[unsafe(naked)]
extern "sysv64" fn hold() {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "pushfq",
        "pushfq",
        "or qword ptr [rsp], {flags}",
        "popfq",
        "mov [rip + {saved}], rsp",
        "mov rax, [rip + {pattern}]",
        "mov rcx, [rip + {pattern} + 8]",
        "mov rdx, [rip + {pattern} + 16]",
        "mov rbx, [rip + {pattern} + 24]",
        "mov rsp, [rip + {pattern} + 32]",
        "mov rbp, [rip + {pattern} + 40]",
        "mov rsi, [rip + {pattern} + 48]",
        "mov rdi, [rip + {pattern} + 56]",
        "mov r8, [rip + {pattern} + 64]",
        "mov r9, [rip + {pattern} + 72]",
        "mov r10, [rip + {pattern} + 80]",
        "mov r11, [rip + {pattern} + 88]",
        "mov r12, [rip + {pattern} + 96]",
        "mov r13, [rip + {pattern} + 104]",
        "mov r14, [rip + {pattern} + 112]",
        "mov r15, [rip + {pattern} + 120]",
        "2:",
        "cmp byte ptr [rip + {event}], 0",
        "jne 3f",
        "dec dword ptr [rip + {budget}]",
        "jz 3f",
        "cmp byte ptr [rip + {halt}], 0",
        "je 2b",
        "hlt",
        "jmp 2b",
        "3:",
        "mov [rip + {found}], rax",
        "mov [rip + {found} + 8], rcx",
        "mov [rip + {found} + 16], rdx",
        "mov [rip + {found} + 24], rbx",
        "mov [rip + {found} + 32], rsp",
        "mov [rip + {found} + 40], rbp",
        "mov [rip + {found} + 48], rsi",
        "mov [rip + {found} + 56], rdi",
        "mov [rip + {found} + 64], r8",
        "mov [rip + {found} + 72], r9",
        "mov [rip + {found} + 80], r10",
        "mov [rip + {found} + 88], r11",
        "mov [rip + {found} + 96], r12",
        "mov [rip + {found} + 104], r13",
        "mov [rip + {found} + 112], r14",
        "mov [rip + {found} + 120], r15",
        "mov rsp, [rip + {saved}]",
        "pushfq",
        "pop [rip + {found_flags}]",
        "popfq",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        flags = const FLAGS,
        saved = sym SAVED_STACK,
        pattern = sym PATTERN,
        event = sym EVENT,
        budget = sym BUDGET,
        halt = sym HALT,
        found = sym FOUND,
        found_flags = sym FOUND_FLAGS,
    )
}
