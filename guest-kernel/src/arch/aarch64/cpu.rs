//! The instructions Rust has no words for.
//!
//! They are safe functions here, as this kernel is the machine's only program: what it does with devices and system registers
//! changes no memory that Rust objects live in, and that is what each `SAFETY` below refers to.

use core::arch::asm;

use guest_kernel::options::End;

/// Reads a system register.
macro_rules! read_register {
    ($name:expr) => {{
        let value: u64;
        // SAFETY: see the comment of cpu.rs.
        unsafe { core::arch::asm!(concat!("mrs {}, ", $name), out(reg) value, options(nostack)) };
        value
    }};
}

/// Writes a system register, and waits until it has its effect.
macro_rules! write_register {
    ($name:expr, $value:expr) => {{
        let value: u64 = $value;
        // SAFETY: see the comment of cpu.rs.
        unsafe { core::arch::asm!(concat!("msr ", $name, ", {}"), "isb", in(reg) value, options(nostack)) };
    }};
}
pub(super) use {read_register, write_register};

/// The virtual counter.
#[inline(always)]
pub fn counter() -> u64 {
    let value;
    // The barriers keep the reading behind what comes before it, the loads of what other CPUs have read among it.
    // SAFETY: reads a counter.
    unsafe { asm!("dsb ishld", "isb", "mrs {}, cntvct_el0", out(reg) value, options(nostack)) };
    value
}

/// The physical counter.
#[inline(always)]
pub fn physical_counter() -> u64 {
    let value;
    // SAFETY: reads a counter.
    unsafe { asm!("isb", "mrs {}, cntpct_el0", out(reg) value, options(nomem, nostack)) };
    value
}

/// Runs something with interrupts off, and leaves them as they were.
pub fn interrupts_off<R>(work: impl FnOnce() -> R) -> R {
    let masks: u64;
    // SAFETY: the mask is put back below. No `nomem`: what follows must not be moved before it.
    unsafe { asm!("mrs {}, daif", "msr daifset, #2", out(reg) masks, options(nostack)) };
    let result = work();
    // SAFETY: as it was.
    unsafe { asm!("msr daif, {}", in(reg) masks, options(nostack)) };
    result
}

/// Lets interrupts, errors and debug exceptions come.
pub fn interrupts_on() {
    // SAFETY: the vectors are in place before the first caller gets here.
    unsafe { asm!("msr daifclr, #15", options(nostack)) };
}

/// Holds interrupts back for so many turns, the last of them halted where that is asked for: what has come meanwhile wakes the
/// CPU, and is then let through.
pub fn pend(turns: u64, halted: bool) {
    interrupts_off(|| {
        for turn in 0..turns {
            // Not the hint for such loops: a hypervisor may want to hear of it.
            core::hint::black_box(turn);
        }
        if halted {
            // SAFETY: waits for an interrupt, and a tick is due.
            unsafe { asm!("wfi", options(nostack)) };
        }
    });
}

/// Stops for good.
pub fn halt() -> ! {
    loop {
        // SAFETY: nothing runs after it.
        unsafe { asm!("msr daifset, #15", "wfi", options(nostack)) };
    }
}

/// Everything written so far is seen by devices and table walks, too.
pub fn synchronize() {
    // SAFETY: a barrier.
    unsafe { asm!("dsb sy", "isb", options(nostack)) };
}

/// A call to the firmware (PSCI 1.0, DEN0022).
pub fn firmware(function: u64, arguments: [u64; 3]) -> u64 {
    let [first, second, third] = arguments;
    let result;
    // SAFETY: it starts or stops CPUs, or gives an error. The convention (SMCCC) lets it change x0 to x17.
    unsafe {
        asm!(
            "hvc #0",
            inout("x0") function => result,
            in("x1") first,
            in("x2") second,
            in("x3") third,
            clobber_abi("C"),
            options(nostack)
        );
    };
    result
}

/// The call that ends the machine. It comes back only where there is no such firmware.
pub fn firmware_end(how: End) {
    let function: u64 = if how == End::Reset { 0x8400_0009 } else { 0x8400_0008 };
    firmware(function, [0; 3]);
}

/// An instruction that no processor has.
pub fn undefined_instruction() {
    // SAFETY: its exception handler ends the kernel.
    unsafe { asm!("udf #0") };
}

/// Functions that read and write a device's register. Loads and stores of this form are those that a hypervisor can emulate from
/// the syndrome alone, which a compiler's choice need not be.
macro_rules! device {
    ($read:ident, $write:ident, $type:ty, $load:literal, $store:literal) => {
        pub fn $read(address: u64) -> $type {
            let value: $type;
            // SAFETY: see the file's comment.
            unsafe { asm!($load, value = out(reg) value, address = in(reg) address, options(nostack)) };
            value
        }

        pub fn $write(address: u64, value: $type) {
            // SAFETY: see the file's comment.
            unsafe { asm!($store, value = in(reg) value, address = in(reg) address, options(nostack)) };
        }
    };
}
device!(read_u8, write_u8, u8, "ldrb {value:w}, [{address}]", "strb {value:w}, [{address}]");
device!(read_u32, write_u32, u32, "ldr {value:w}, [{address}]", "str {value:w}, [{address}]");
device!(read_u64, write_u64, u64, "ldr {value:x}, [{address}]", "str {value:x}, [{address}]");
