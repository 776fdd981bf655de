//! The instructions Rust has no words for.
//!
//! They are safe functions here, as this kernel is the machine's only program: what it does with ports, model-specific and
//! control registers changes no memory that Rust objects live in, and that is what each `SAFETY` below refers to.

use core::arch::asm;

/// The raw time-stamp counter.
#[inline(always)]
pub fn counter() -> u64 {
    let (low, high): (u32, u32);
    // The fence keeps the reading behind the loads and stores before it.
    // SAFETY: reads a counter.
    unsafe { asm!("lfence", "rdtsc", out("eax") low, out("edx") high, options(nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

/// Runs something with interrupts off, and leaves them as they were.
pub fn interrupts_off<R>(work: impl FnOnce() -> R) -> R {
    let flags: u64;
    // SAFETY: the flags are put back below. No `nomem`: what follows must not be moved before it.
    unsafe { asm!("pushfq", "pop {}", "cli", out(reg) flags) };
    let result = work();
    if flags & 1 << 9 != 0 {
        interrupts_on();
    }
    result
}

/// Lets interrupts come.
pub fn interrupts_on() {
    // SAFETY: the tables are loaded before the first caller gets here.
    unsafe { asm!("sti") };
}

/// Holds interrupts back for so many turns. Those that have come meanwhile are let through at once, or by an instruction that
/// halts the CPU: the processor puts them off until it has begun.
pub fn pend(turns: u64, halted: bool) {
    interrupts_off(|| {
        for turn in 0..turns {
            // Not the hint for such loops: a hypervisor may want to hear of it.
            core::hint::black_box(turn);
        }
        if halted {
            // SAFETY: as in `interrupts_on`, and a tick is due.
            unsafe { asm!("sti", "hlt") };
        }
    });
}

/// Stops for good.
pub fn halt() -> ! {
    loop {
        // SAFETY: nothing runs after it.
        unsafe { asm!("cli", "hlt") };
    }
}

pub fn read_port(port: u16) -> u8 {
    let value;
    // SAFETY: see the file's comment.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack)) };
    value
}

pub fn write_port(port: u16, value: u8) {
    // SAFETY: see the file's comment.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack)) };
}

/// All bytes in one instruction, so that a VMM takes them in one exit.
pub fn write_port_string(port: u16, bytes: &[u8]) {
    // SAFETY: reads within the slice alone.
    unsafe {
        asm!("rep outsb", in("dx") port, inout("rsi") bytes.as_ptr() => _, inout("rcx") bytes.len() => _, options(nostack))
    };
}

pub fn read_msr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: see the file's comment; callers know from CPUID that it exists.
    unsafe { asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high, options(nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

pub fn write_msr(msr: u32, value: u64) {
    // SAFETY: see the file's comment; callers know from CPUID that it exists.
    unsafe { asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack)) };
}

/// Functions that read, and where asked for write, a register by `mov`.
macro_rules! register {
    ($read:ident, $name:literal) => {
        pub fn $read() -> u64 {
            let value;
            // SAFETY: see the file's comment.
            unsafe { asm!(concat!("mov {}, ", $name), out(reg) value, options(nostack)) };
            value
        }
    };
    ($read:ident, $write:ident, $name:literal) => {
        register!($read, $name);
        pub fn $write(value: u64) {
            // SAFETY: see the file's comment.
            unsafe { asm!(concat!("mov ", $name, ", {}"), in(reg) value, options(nostack)) };
        }
    };
}
register!(read_cr0, "cr0");
register!(read_cr2, write_cr2, "cr2");
register!(read_cr3, write_cr3, "cr3");
register!(read_cr4, write_cr4, "cr4");
register!(read_cr8, "cr8");
register!(read_dr0, write_dr0, "dr0");
register!(read_dr1, write_dr1, "dr1");
register!(read_dr2, write_dr2, "dr2");
register!(read_dr3, write_dr3, "dr3");
register!(read_dr6, write_dr6, "dr6");
register!(read_dr7, write_dr7, "dr7");

/// Forgets cached translations.
pub fn flush_translations() {
    write_cr3(read_cr3());
}

pub fn read_xcr0() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: callers have set CR4.OSXSAVE.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

pub fn write_xcr0(value: u64) {
    // SAFETY: callers have set CR4.OSXSAVE and take the bits from CPUID.
    unsafe { asm!("xsetbv", in("ecx") 0, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack)) };
}

/// The descriptor-table registers: the limit, then the base.
pub fn read_table_registers() -> [(u16, u64); 2] {
    let mut raw = [[0u8; 10]; 2];
    // SAFETY: writes the ten bytes of the array's first entry.
    unsafe { asm!("sgdt [{}]", in(reg) raw[0].as_mut_ptr(), options(nostack)) };
    // SAFETY: writes the ten bytes of the array's second entry.
    unsafe { asm!("sidt [{}]", in(reg) raw[1].as_mut_ptr(), options(nostack)) };
    raw.map(|bytes| {
        let base = bytes[2..].iter().rev().fold(0, |base, byte| base << 8 | u64::from(*byte));
        (u16::from_le_bytes([bytes[0], bytes[1]]), base)
    })
}

/// CS, DS, ES, SS, FS, GS, TR and LDTR.
pub fn read_selectors() -> [u16; 8] {
    let (cs, ds, es, ss): (u16, u16, u16, u16);
    // SAFETY: reads registers.
    unsafe {
        asm!("mov {:x}, cs", "mov {:x}, ds", "mov {:x}, es", "mov {:x}, ss", out(reg) cs, out(reg) ds, out(reg) es, out(reg) ss, options(nomem, nostack))
    };
    let (fs, gs, tr, ldtr): (u16, u16, u16, u16);
    // SAFETY: reads registers.
    unsafe {
        asm!("mov {:x}, fs", "mov {:x}, gs", "str {:x}", "sldt {:x}", out(reg) fs, out(reg) gs, out(reg) tr, out(reg) ldtr, options(nomem, nostack))
    };
    [cs, ds, es, ss, fs, gs, tr, ldtr]
}

/// An instruction that no processor has.
pub fn undefined_instruction() {
    // SAFETY: its exception handler ends the kernel.
    unsafe { asm!("ud2") };
}
