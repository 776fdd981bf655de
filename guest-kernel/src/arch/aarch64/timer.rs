//! The generic timer: the virtual one ticks. The physical one is put off by each tick, and so comes only when ticks do not: it
//! wakes the CPU then, and else has to keep what it is set to.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use guest_kernel::options::MOST_CPUS;
use guest_kernel::tick::{Arm, Mode};

use super::cpu::{interrupts_off, physical_counter, read_register, write_register};
use super::number;
use crate::console::damage;

/// The interrupts of the virtual and the physical timer.
pub const TICK: u32 = 27;
/// See [`TICK`].
pub const WATCHDOG: u32 = 30;

const ENABLE: u64 = 1;
const MASK: u64 = 2;
/// What the timer can do: count down, or wait for a value of the counter.
pub const MODES: &[Mode] = &[Mode::OneShot, Mode::Deadline];

/// The counter's frequency.
pub fn khz() -> u64 {
    (read_register!("cntfrq_el0") / 1000).max(1)
}

/// Does what the chain asks for.
pub fn arm(mode: Mode, arm: Arm, interval: u64) {
    match (mode, arm) {
        (Mode::Deadline, Arm::At(due) | Arm::Change(_, due)) => write_register!("cntv_cval_el0", due),
        _ => write_register!("cntv_tval_el0", interval),
    }
    write_register!("cntv_ctl_el0", ENABLE);
}

/// Keeps the ticks from coming: for the self-test.
pub fn mask_tick() {
    write_register!("cntv_ctl_el0", ENABLE | MASK);
}

/// The timer's state, as `(control, compare value)`.
pub fn state() -> (u64, u64) {
    (read_register!("cntv_ctl_el0"), read_register!("cntv_cval_el0"))
}

/// The second timer: how long it is put off, and until when it has been.
static DELAY: AtomicU64 = AtomicU64::new(0);
static DUE: [AtomicU64; MOST_CPUS] = [const { AtomicU64::new(0) }; MOST_CPUS];
static FIRED: [AtomicBool; MOST_CPUS] = [const { AtomicBool::new(false) }; MOST_CPUS];

/// Starts the second timer, with so many counts between the last tick and the wake-up.
pub fn start_watchdog(delay: u64) {
    DELAY.store(delay, Ordering::Relaxed);
    put_off_watchdog();
    write_register!("cntp_ctl_el0", ENABLE);
}

/// Puts the second timer off.
pub fn put_off_watchdog() {
    let due = physical_counter() + DELAY.load(Ordering::Relaxed);
    DUE[number()].store(due, Ordering::Relaxed);
    write_register!("cntp_cval_el0", due);
}

/// The second timer has come, and is put off again.
pub fn watchdog_fired() {
    FIRED[number()].store(true, Ordering::Relaxed);
    put_off_watchdog();
}

/// Whether the second timer has come; asking clears it.
pub fn take_watchdog_fired() -> bool {
    FIRED[number()].swap(false, Ordering::Relaxed)
}

/// Compares the second timer with what it was set to, and puts right what is wrong.
pub fn check_watchdog() {
    // A tick in between would set it anew.
    interrupts_off(|| {
        let (due, compare) = (DUE[number()].load(Ordering::Relaxed), read_register!("cntp_cval_el0"));
        // Bit 2 says that it is due.
        let control = read_register!("cntp_ctl_el0") & !4;
        if (control, compare) != (ENABLE, due) {
            damage("watchdog", format_args!("control={control} compare={compare} expected={due}"));
            write_register!("cntp_cval_el0", due);
            write_register!("cntp_ctl_el0", ENABLE);
        }
    });
}

/// Stops it: for the self-test.
pub fn stop_watchdog() {
    write_register!("cntp_ctl_el0", 0);
}
