//! The other CPUs: their numbers, their stacks, and how they are switched on and off.

use core::arch::{asm, global_asm};
use core::ptr;
use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use guest_kernel::options::MOST_CPUS;

use super::boot::STACK;
use super::{apic, cpuid, interrupts, memory, tables};

/// The page at which another CPU begins, in real mode.
pub const TRAMPOLINE: u64 = 0x8000;
/// The stacks for interrupts, then the main one.
const STACKS: usize = tables::ALL_STACKS + STACK;

const INIT: u32 = 0x4500;
const START: u32 = 0x4600;
const FIXED: u32 = 0x4000;

/// The numbers of the interrupt controllers; the first CPU's comes first.
static IDS: [AtomicU32; MOST_CPUS] = [const { AtomicU32::new(0) }; MOST_CPUS];
static COUNT: AtomicUsize = AtomicUsize::new(1);
/// Where the stacks of the others begin.
static ALL_STACKS: AtomicU64 = AtomicU64::new(u64::MAX);
/// The main stack of the CPU that is being started.
static NEXT_STACK: AtomicU64 = AtomicU64::new(0);

/// There is a CPU with this number. The one that asks is known already.
pub fn add(id: u32) {
    let count = COUNT.load(Ordering::Relaxed);
    let own = cpuid::initial_apic_id();
    IDS[0].store(own, Ordering::Relaxed);
    if id != own && count < MOST_CPUS {
        IDS[count].store(id, Ordering::Relaxed);
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
    start + ((present() - 1) * STACKS) as u64
}

/// This CPU's number, by the stack that it is on: no register is free to keep it.
#[inline(always)]
pub fn number() -> usize {
    let stack: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, rsp", out(reg) stack, options(nomem, nostack, preserves_flags)) };
    let start = ALL_STACKS.load(Ordering::Relaxed);
    // An address may be the end of a stack, but not its start.
    if stack > start { ((stack - start - 1) as usize / STACKS + 1).min(MOST_CPUS - 1) } else { 0 }
}

/// Makes a CPU that may never have run wait for its start.
pub fn make_startable(number: usize) {
    let code = ptr::with_exposed_provenance_mut::<u8>(TRAMPOLINE as usize);
    let (start, end) = ((&raw const trampoline_start).addr(), (&raw const trampoline_end).addr());
    // SAFETY: the page is RAM that is kept out of use, and the code fits.
    unsafe { ptr::copy_nonoverlapping(&raw const trampoline_start, code, end - start) };
    switch_off(number);
}

/// Stops a CPU at whatever it is doing: it waits for its start.
pub fn switch_off(number: usize) {
    apic::command(IDS[number].load(Ordering::Relaxed), INIT);
}

/// It does, as soon as it has heard of it.
pub fn is_off(_number: usize) -> bool {
    true
}

/// Starts a CPU that waits for it.
pub fn switch_on(number: usize) {
    let start = ALL_STACKS.load(Ordering::Relaxed) + ((number - 1) * STACKS) as u64;
    NEXT_STACK.store(start + STACKS as u64, Ordering::SeqCst);
    apic::command(IDS[number].load(Ordering::Relaxed), START | (TRAMPOLINE >> 12) as u32);
}

/// CPUs are stopped from outside.
pub fn stop_if_asked() {}

/// Interrupts another CPU, by one of the ways.
pub fn send_ipi(number: usize, lane: u64) {
    apic::command(IDS[number].load(Ordering::Relaxed), FIXED | u32::from(interrupts::IPI) | lane as u32);
}

unsafe extern "C" {
    static trampoline_start: u8;
    static trampoline_end: u8;
}

// From real mode to Rust in long mode, with the first CPU's page tables.
global_asm!(
    ".pushsection .boot, \"ax\", @progbits",
    ".code16",
    "trampoline_start:",
    "cli",
    "cld",
    "mov ax, cs",
    "mov ds, ax",
    ".byte 0x66, 0x0f, 0x01, 0x16", // LGDT with all 32 bits of the address
    ".word trampoline_gdt_pointer - trampoline_start",
    "mov eax, cr0",
    "or eax, 1",
    "mov cr0, eax",
    ".byte 0x66, 0xea", // a far jump to 32-bit code
    ".long processor_entry",
    ".word 24",
    "trampoline_gdt_pointer:",
    ".word 31",
    ".long boot_gdt",
    "trampoline_end:",
    ".code32",
    "processor_entry:",
    "mov eax, 16",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "mov eax, offset {root}",
    "mov cr3, eax",
    "mov eax, 0x20", // CR4.PAE
    "mov cr4, eax",
    "mov ecx, 0xc0000080", // EFER.LME
    "rdmsr",
    "or eax, 0x100",
    "wrmsr",
    "mov eax, 0x80010033", // PG, WP, NE, ET, MP, PE: caches on
    "mov cr0, eax",
    ".byte 0xea", // a far jump to 64-bit code
    ".long processor_long_mode",
    ".word 8",
    ".code64",
    "processor_long_mode:",
    "xor eax, eax",
    "mov fs, eax",
    "mov gs, eax",
    "xor ebp, ebp",
    "mov rsp, [rip + {stack}]",
    "call {main}",
    "ud2",
    ".popsection",
    root = sym memory::ROOT,
    stack = sym NEXT_STACK,
    main = sym main,
);

extern "sysv64" fn main() -> ! {
    let start = ALL_STACKS.load(Ordering::Relaxed) + ((number() - 1) * STACKS) as u64;
    tables::load_own(start);
    crate::live::run()
}
