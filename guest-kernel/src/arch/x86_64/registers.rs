//! All sixteen general registers and the flags hold known values while the CPU spins or halts until the next interrupt.

use core::arch::naked_asm;
use core::mem::offset_of;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};

use guest_kernel::options::MOST_CPUS;
use guest_kernel::pattern::scramble;

use super::tables::Frame;
use super::{counter, cpu, memory, number};
use crate::console::damage;

const NAMES: [&str; 16] =
    ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];
const RSP: usize = 4;
const GS_BASE: u32 = 0xc000_0101;
/// Direction and ID: two flags that nothing else here uses.
const FLAGS: u64 = 1 << 10 | 1 << 21;

/// What a CPU needs while its registers are held: the code there finds it through GS, as no register is left to point to it.
#[repr(C)]
struct Hold {
    pattern: [AtomicU64; 16],
    found: [AtomicU64; 16],
    found_flags: AtomicU64,
    saved_stack: AtomicU64,
    budget: AtomicU32,
    halt: AtomicU8,
    event: AtomicU8,
}

static HOLDS: [Hold; MOST_CPUS] = [const {
    Hold {
        pattern: [const { AtomicU64::new(0) }; 16],
        found: [const { AtomicU64::new(0) }; 16],
        found_flags: AtomicU64::new(0),
        saved_stack: AtomicU64::new(0),
        budget: AtomicU32::new(0),
        halt: AtomicU8::new(0),
        event: AtomicU8::new(0),
    }
}; MOST_CPUS];
static BUDGET: AtomicU32 = AtomicU32::new(0);
static STRIKE: AtomicBool = AtomicBool::new(false);

fn own() -> &'static Hold {
    &HOLDS[number()]
}

/// The base of GS: where the CPU finds what it needs, in the upper half of addresses, so that all of its bits count.
pub fn own_base() -> u64 {
    memory::UPPER_HALF + ptr::from_ref(own()).addr() as u64
}

/// There was an interrupt.
pub fn wake() {
    own().event.store(1, Ordering::Relaxed);
}

/// What the checks need to know.
pub struct Registers {
    rounds: u64,
}

impl Registers {
    /// On the first CPU it finds out how long to spin at most: about 100 ms, well below what counts as a pause. Interrupts must
    /// be off.
    pub fn new(khz: u64) -> Self {
        const TRIAL: u32 = 200_000;
        cpu::write_msr(GS_BASE, own_base());
        // Others begin with other values.
        let mut registers = Registers { rounds: (number() as u64) << 32 };
        if number() == 0 {
            BUDGET.store(TRIAL, Ordering::Relaxed);
            let start = counter();
            registers.hold(false);
            let spent = (counter() - start).max(1);
            let budget = (u64::from(TRIAL) * 100 * khz / spent).clamp(1000, u64::from(u32::MAX)) as u32;
            BUDGET.store(budget, Ordering::Relaxed);
        }
        registers
    }

    /// Holds values in all registers until there is an interrupt, and looks at them.
    pub fn hold(&mut self, halted: bool) {
        self.rounds += 1;
        let own = own();
        for (index, pattern) in own.pattern.iter().enumerate() {
            let value = scramble(self.rounds * 16 + index as u64);
            // The stack pointer has to be an address that could be one, as a return from an interrupt loads it.
            pattern.store(if index == RSP { value & 0x0000_7fff_ffff_fff8 } else { value }, Ordering::Relaxed);
        }
        own.budget.store(BUDGET.load(Ordering::Relaxed), Ordering::Relaxed);
        own.halt.store(u8::from(halted), Ordering::Relaxed);
        own.event.store(0, Ordering::Relaxed);
        hold();
        let mode = if halted { "halted" } else { "running" };
        for ((name, expected), found) in NAMES.iter().zip(&own.pattern).zip(&own.found) {
            let (expected, found) = (expected.load(Ordering::Relaxed), found.load(Ordering::Relaxed));
            if expected != found {
                damage(
                    "register",
                    format_args!("name={name} expected={expected:#018x} found={found:#018x} cpu={mode}"),
                );
            }
        }
        let flags = own.found_flags.load(Ordering::Relaxed);
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
    if STRIKE.load(Ordering::Relaxed) && frame.rax == own().pattern[0].load(Ordering::Relaxed) {
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
        "mov gs:[{saved}], rsp",
        "mov rax, gs:[{pattern}]",
        "mov rcx, gs:[{pattern} + 8]",
        "mov rdx, gs:[{pattern} + 16]",
        "mov rbx, gs:[{pattern} + 24]",
        "mov rsp, gs:[{pattern} + 32]",
        "mov rbp, gs:[{pattern} + 40]",
        "mov rsi, gs:[{pattern} + 48]",
        "mov rdi, gs:[{pattern} + 56]",
        "mov r8, gs:[{pattern} + 64]",
        "mov r9, gs:[{pattern} + 72]",
        "mov r10, gs:[{pattern} + 80]",
        "mov r11, gs:[{pattern} + 88]",
        "mov r12, gs:[{pattern} + 96]",
        "mov r13, gs:[{pattern} + 104]",
        "mov r14, gs:[{pattern} + 112]",
        "mov r15, gs:[{pattern} + 120]",
        "2:",
        "cmp byte ptr gs:[{event}], 0",
        "jne 3f",
        "dec dword ptr gs:[{budget}]",
        "jz 3f",
        "cmp byte ptr gs:[{halt}], 0",
        "je 2b",
        "hlt",
        "jmp 2b",
        "3:",
        "mov gs:[{found}], rax",
        "mov gs:[{found} + 8], rcx",
        "mov gs:[{found} + 16], rdx",
        "mov gs:[{found} + 24], rbx",
        "mov gs:[{found} + 32], rsp",
        "mov gs:[{found} + 40], rbp",
        "mov gs:[{found} + 48], rsi",
        "mov gs:[{found} + 56], rdi",
        "mov gs:[{found} + 64], r8",
        "mov gs:[{found} + 72], r9",
        "mov gs:[{found} + 80], r10",
        "mov gs:[{found} + 88], r11",
        "mov gs:[{found} + 96], r12",
        "mov gs:[{found} + 104], r13",
        "mov gs:[{found} + 112], r14",
        "mov gs:[{found} + 120], r15",
        "mov rsp, gs:[{saved}]",
        "pushfq",
        "pop qword ptr gs:[{found_flags}]",
        "popfq",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        flags = const FLAGS,
        saved = const offset_of!(Hold, saved_stack),
        pattern = const offset_of!(Hold, pattern),
        event = const offset_of!(Hold, event),
        budget = const offset_of!(Hold, budget),
        halt = const offset_of!(Hold, halt),
        found = const offset_of!(Hold, found),
        found_flags = const offset_of!(Hold, found_flags),
    )
}
