//! The interrupt controllers: the local one with its timer, by registers (x2APIC) or by memory (xAPIC), and the I/O APIC.

use core::fmt;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use guest_kernel::tick::{Arm, Mode};

use super::interrupts::{SPURIOUS, TICK};
use super::{counter, cpu, cpuid, interrupts_off};

const APIC_BASE: u32 = 0x1b;
const ENABLE: u64 = 1 << 11;
const X2APIC: u64 = 1 << 10;
const LOCAL: usize = 0xfee0_0000;
const IO: usize = 0xfec0_0000;
const TSC_DEADLINE: u32 = 0x6e0;

const ID: u32 = 0x20;
const TASK_PRIORITY: u32 = 0x80;
const PROCESSOR_PRIORITY: u32 = 0xa0;
const END_OF_INTERRUPT: u32 = 0xb0;
const SPURIOUS_VECTOR: u32 = 0xf0;
const IN_SERVICE: u32 = 0x100;
const REQUESTED: u32 = 0x200;
const COMMAND: u32 = 0x300;
const COMMAND_TARGET: u32 = 0x310;
const LVT_TIMER: u32 = 0x320;
const LVT_LINT0: u32 = 0x350;
const LVT_LINT1: u32 = 0x360;
const LVT_ERROR: u32 = 0x370;
const INITIAL_COUNT: u32 = 0x380;
const CURRENT_COUNT: u32 = 0x390;
const DIVIDE: u32 = 0x3e0;

/// Holds back vectors below 0x20, which are exceptions and so not held back: harmless, but not zero. CR8 shows it too, but is
/// never written: QEMU's emulation of nested virtualization dies of that when an interrupt is pending.
const PRIORITY: u32 = 0x10;
const MASKED: u32 = 1 << 16;
const SENDING: u32 = 1 << 12;
const DIVIDE_BY_ONE: u32 = 0b1011;

static BY_REGISTERS: AtomicBool = AtomicBool::new(false);
static INTERVAL: AtomicU32 = AtomicU32::new(0);

/// Switches the local controller on, with all its sources masked.
pub fn start(by_registers: bool) {
    let base = cpu::read_msr(APIC_BASE) | ENABLE;
    cpu::write_msr(APIC_BASE, base);
    if by_registers {
        cpu::write_msr(APIC_BASE, base | X2APIC);
    }
    BY_REGISTERS.store(by_registers, Ordering::Relaxed);
    for entry in [LVT_TIMER, LVT_LINT0, LVT_LINT1, LVT_ERROR] {
        write(entry, MASKED);
    }
    write(TASK_PRIORITY, PRIORITY);
    write(SPURIOUS_VECTOR, 0x100 | u32::from(SPURIOUS));
    write(DIVIDE, DIVIDE_BY_ONE);
}

/// Whether the controller is reached by registers.
pub fn is_by_registers() -> bool {
    BY_REGISTERS.load(Ordering::Relaxed)
}

fn read(register: u32) -> u32 {
    if is_by_registers() {
        return cpu::read_msr(0x800 + (register >> 4)) as u32;
    }
    // SAFETY: the controller's page, mapped uncached.
    unsafe { ptr::with_exposed_provenance::<u32>(LOCAL + register as usize).read_volatile() }
}

fn write(register: u32, value: u32) {
    if is_by_registers() {
        return cpu::write_msr(0x800 + (register >> 4), u64::from(value));
    }
    // SAFETY: the controller's page, mapped uncached.
    unsafe { ptr::with_exposed_provenance_mut::<u32>(LOCAL + register as usize).write_volatile(value) }
}

/// Interrupts another CPU: the lower half of the command register says how.
pub fn command(target: u32, command: u32) {
    if is_by_registers() {
        // Unlike a store to the controller's page, it may overtake the stores before it.
        core::sync::atomic::fence(Ordering::SeqCst);
        return cpu::write_msr(0x830, u64::from(target) << 32 | u64::from(command));
    }
    interrupts_off(|| {
        write(COMMAND_TARGET, target << 24);
        write(COMMAND, command);
        while read(COMMAND) & SENDING != 0 {
            core::hint::spin_loop();
        }
    });
}

/// The names of the registers that nobody changes once the kernel runs.
pub const CONSTANT_REGISTERS: [&str; 6] = ["id", "spurious", "lint0", "lint1", "error", "divide"];

/// Their values.
pub fn read_constant_registers() -> [u32; 6] {
    [ID, SPURIOUS_VECTOR, LVT_LINT0, LVT_LINT1, LVT_ERROR, DIVIDE].map(read)
}

pub fn end_of_interrupt() {
    write(END_OF_INTERRUPT, 0);
}

/// Measures the timer against the counter, and so how much it has to count for a tick.
pub fn measure_timer(khz: u64, tick_ms: u64) {
    const MS: u64 = 5;
    let mut results = [0; 3];
    for result in &mut results {
        write(INITIAL_COUNT, u32::MAX);
        let (count, start) = (read(CURRENT_COUNT), counter());
        while counter() < start + MS * khz {}
        let counts = u64::from(count.wrapping_sub(read(CURRENT_COUNT)));
        *result = counts * khz / (counter() - start).max(1);
        write(INITIAL_COUNT, 0);
    }
    // The middle one: a measurement in which the guest was not running is far off.
    results.sort_unstable();
    INTERVAL.store((results[1] * tick_ms).clamp(1000, u64::from(u32::MAX)) as u32, Ordering::Relaxed);
}

/// Programs the timer.
pub fn arm(arm: Arm) {
    match arm {
        Arm::Leave => {}
        Arm::Again => write(INITIAL_COUNT, INTERVAL.load(Ordering::Relaxed)),
        Arm::At(deadline) => cpu::write_msr(TSC_DEADLINE, deadline),
        Arm::Change(mode, deadline) => {
            write(INITIAL_COUNT, 0);
            let bits = match mode {
                Mode::OneShot => 0,
                Mode::Periodic => 1 << 17,
                Mode::Deadline => 2 << 17,
            };
            write(LVT_TIMER, bits | u32::from(TICK));
            if mode == Mode::Deadline {
                // A store to the controller's page and a write of a register are not ordered by themselves.
                core::sync::atomic::fence(Ordering::SeqCst);
                cpu::write_msr(TSC_DEADLINE, deadline);
            } else {
                write(INITIAL_COUNT, INTERVAL.load(Ordering::Relaxed));
            }
        }
    }
}

/// The timer and its interrupt, for whoever has to find out why it did not come.
pub struct Timer;

impl fmt::Display for Timer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A vector's bit is in a register of its own per 32 vectors.
        let (word, bit) = (u32::from(TICK) / 32 * 0x10, u32::from(TICK) % 32);
        write!(
            formatter,
            "lvt={:#x} initial={:#x} current={:#x} requested={} in_service={} tpr={:#x} ppr={:#x}",
            read(LVT_TIMER),
            read(INITIAL_COUNT),
            read(CURRENT_COUNT),
            read(REQUESTED + word) >> bit & 1,
            read(IN_SERVICE + word) >> bit & 1,
            read(TASK_PRIORITY),
            read(PROCESSOR_PRIORITY),
        )?;
        if cpuid::has_deadline_timer() {
            write!(formatter, " deadline={} now={}", cpu::read_msr(TSC_DEADLINE), counter())?;
        }
        Ok(())
    }
}

/// Keeps the timer from interrupting: for the self-test.
pub fn mask_timer() {
    write(LVT_TIMER, read(LVT_TIMER) | MASKED);
}

/// The lower half of an entry of the I/O APIC's table.
pub fn read_redirection(pin: u32) -> u32 {
    write_io(0, 0x10 + 2 * pin);
    // SAFETY: the controller's page, mapped uncached.
    unsafe { ptr::with_exposed_provenance::<u32>(IO + 0x10).read_volatile() }
}

/// This CPU's number among the controllers.
pub fn id() -> u32 {
    if is_by_registers() { read(ID) } else { read(ID) >> 24 }
}

/// Sends a pin to this CPU: an edge, active high.
pub fn redirect(pin: u32, vector: u8) {
    let id = id();
    write_io(0, 0x11 + 2 * pin);
    write_io(0x10, id << 24);
    write_io(0, 0x10 + 2 * pin);
    write_io(0x10, u32::from(vector));
}

fn write_io(offset: usize, value: u32) {
    // SAFETY: the controller's page, mapped uncached.
    unsafe { ptr::with_exposed_provenance_mut::<u32>(IO + offset).write_volatile(value) }
}
