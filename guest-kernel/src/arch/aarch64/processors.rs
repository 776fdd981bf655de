//! The other CPUs: their affinities, their stacks, and how they are switched on and off.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use guest_kernel::options::MOST_CPUS;

use super::{cpu, exceptions, gic, memory};

/// Of a CPU that is not the first.
const STACK: usize = 256 << 10;

/// PSCI (DEN0022), in the convention for 64 bits where there are two.
const CPU_OFF: u64 = 0x8400_0002;
const CPU_ON: u64 = 0xc400_0003;
const AFFINITY_INFO: u64 = 0xc400_0004;
const IS_OFF: u64 = 1;

/// The affinities; the first CPU's comes first.
static AFFINITIES: [AtomicU64; MOST_CPUS] = [const { AtomicU64::new(0) }; MOST_CPUS];
static COUNT: AtomicUsize = AtomicUsize::new(1);
/// Where the stacks of the others begin.
static ALL_STACKS: AtomicU64 = AtomicU64::new(u64::MAX);
/// One CPU is to switch itself off.
static OFF_ASKED: AtomicBool = AtomicBool::new(false);

/// There is a CPU with this affinity. The one that asks is known already.
pub fn add(affinity: u64) {
    let count = COUNT.load(Ordering::Relaxed);
    let own = gic::own_affinity();
    AFFINITIES[0].store(own, Ordering::Relaxed);
    if affinity != own && count < MOST_CPUS {
        AFFINITIES[count].store(affinity, Ordering::Relaxed);
        COUNT.store(count + 1, Ordering::Relaxed);
    }
}

/// How many there are.
pub fn present() -> usize {
    COUNT.load(Ordering::Relaxed)
}

/// Takes memory for the stacks of the others. Gives the end of what is in use.
pub fn take_stacks(start: u64) -> u64 {
    ALL_STACKS.store(start, Ordering::Relaxed);
    start + ((present() - 1) * STACK) as u64
}

/// This CPU's number, by the stack that it is on: no register is free to keep it.
#[inline(always)]
pub fn number() -> usize {
    let stack: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, sp", out(reg) stack, options(nomem, nostack, preserves_flags)) };
    let start = ALL_STACKS.load(Ordering::Relaxed);
    // An address may be the end of a stack, but not its start.
    if stack > start { ((stack - start - 1) as usize / STACK + 1).min(MOST_CPUS - 1) } else { 0 }
}

/// They all are.
pub fn make_startable(_number: usize) {}

/// Asks a CPU to stop.
pub fn switch_off(_number: usize) {
    OFF_ASKED.store(true, Ordering::SeqCst);
}

/// Stops, if this is the CPU that was asked. It never comes back: the CPU begins anew.
pub fn stop_if_asked() {
    if OFF_ASKED.swap(false, Ordering::SeqCst) {
        cpu::firmware(CPU_OFF, [0; 3]);
    }
}

/// Whether a CPU has stopped.
pub fn is_off(number: usize) -> bool {
    cpu::firmware(AFFINITY_INFO, [AFFINITIES[number].load(Ordering::Relaxed), 0, 0]) == IS_OFF
}

/// Starts a CPU that is off.
pub fn switch_on(number: usize) {
    let stack = ALL_STACKS.load(Ordering::Relaxed) + (number * STACK) as u64;
    let entry = processor_entry as *const () as u64;
    cpu::firmware(CPU_ON, [AFFINITIES[number].load(Ordering::Relaxed), entry, stack]);
}

/// Interrupts another CPU, by one of the ways.
pub fn send_ipi(number: usize, lane: u64) {
    gic::send(AFFINITIES[number].load(Ordering::Relaxed), gic::IPI + lane as u32);
}

unsafe extern "C" {
    fn processor_entry();
}

// To Rust with translation and caches on, by the first CPU's page tables. Until then nothing is read but the image.
global_asm!(
    ".pushsection .boot, \"ax\", @progbits",
    ".global processor_entry",
    "processor_entry:",
    "msr daifset, #15",
    "ldr x1, ={attributes}",
    "msr mair_el1, x1",
    "ldr x1, ={control}",
    "mrs x2, id_aa64mmfr0_el1", // as the first CPU does it
    "and x2, x2, #7",
    "mov x3, #5",
    "cmp x2, x3",
    "csel x2, x2, x3, lo",
    "bfi x1, x2, #32, #3",
    "msr tcr_el1, x1",
    "ldr x1, ={root} + ({space})",
    "msr ttbr0_el1, x1",
    "tlbi vmalle1",
    "dsb sy",
    "isb",
    "mrs x1, sctlr_el1",
    "mov x2, #0x1005", // translation, data cache, instruction cache
    "orr x1, x1, x2",
    "bic x1, x1, #2", // no faults for unaligned data
    "msr sctlr_el1, x1",
    "isb",
    "msr spsel, #1",
    "mov sp, x0",
    "mov x29, xzr",
    "mov x30, xzr",
    "b {main}",
    ".ltorg",
    ".popsection",
    attributes = const memory::ATTRIBUTES,
    control = const memory::TRANSLATION_CONTROL,
    root = sym memory::ROOT,
    space = const memory::ADDRESS_SPACE,
    main = sym main,
);

extern "C" fn main() -> ! {
    exceptions::load();
    crate::live::run()
}
