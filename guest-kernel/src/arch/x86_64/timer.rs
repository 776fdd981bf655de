//! The platform's old timer, the PIT: it tells the counter's frequency where nobody else does, and then serves as a watchdog
//! that wakes the CPU should the local timer have been lost, through the I/O APIC, which is so watched too.

use super::interrupts::{WATCHDOG, WATCHDOG_TICKS};
use super::{apic, counter, cpu, cpuid, pvclock};

const CHANNEL: u16 = 0x40;
const COMMAND: u16 = 0x43;
const HZ: u64 = 1_193_182;
/// The interrupt is pin 0 or, as boards wire it and QEMU tells, pin 2.
pub const PINS: [u32; 2] = [0, 2];

/// The counter's frequency.
pub fn khz(has_clock: bool) -> u64 {
    if has_clock {
        return pvclock::khz();
    }
    // What no platform says and no timer tells is guessed; all limits are then as wrong as the guess.
    cpuid::counter_khz().or_else(measure).unwrap_or(1_000_000)
}

fn start() {
    cpu::write_port(COMMAND, 0x34); // channel 0, both bytes, rate generator
    cpu::write_port(CHANNEL, 0); // 65536: 18.2 per second
    cpu::write_port(CHANNEL, 0);
}

fn read() -> u16 {
    cpu::write_port(COMMAND, 0);
    u16::from_le_bytes([cpu::read_port(CHANNEL), cpu::read_port(CHANNEL)])
}

/// Lets it count for a twentieth of a second.
fn measure() -> Option<u64> {
    start();
    let (first, began) = (read(), counter());
    let (mut last, mut counts) = (first, 0u64);
    for _ in 0..1_000_000 {
        let now = read();
        counts += u64::from(last.wrapping_sub(now));
        last = now;
        if counts >= HZ / 20 {
            return Some((counter() - began) * HZ / counts / 1000);
        }
        if counts == 0 && counter() - began > 1_000_000_000 {
            return None;
        }
    }
    None
}

/// Starts the watchdog.
pub fn start_watchdog() {
    start();
    for pin in PINS {
        apic::redirect(pin, WATCHDOG);
    }
}

/// Whether it ticks at all, asked within its first second. Interrupts must be on.
pub fn is_ticking(khz: u64) -> bool {
    let until = counter() + 1000 * khz;
    while counter() < until {
        if WATCHDOG_TICKS.with(|ticks| ticks.count) > 0 {
            return true;
        }
    }
    false
}

/// Lets it tick once more and no further: for the self-test.
pub fn stop_watchdog() {
    cpu::write_port(COMMAND, 0x30); // channel 0, both bytes, interrupt at the end of the count
    cpu::write_port(CHANNEL, 0);
    cpu::write_port(CHANNEL, 0);
}
