//! What happens when the CPU is interrupted: ticks, expected watchpoint hits, and damage.

use guest_kernel::options::{End, MOST_CPUS};
use guest_kernel::ring::LANES;
use guest_kernel::tick::{Chain, Ticks};

use super::tables::Frame;
use super::{apic, cpu, number, registers, watchpoints};
use crate::console::damage;
use crate::irq_cell::IrqCell;
use crate::processors;

/// The vector of the local timer.
pub const TICK: u8 = 0x40;
/// The vector of the platform's second timer.
pub const WATCHDOG: u8 = 0x41;
/// The first vector of the interrupts from one CPU to the next.
pub const IPI: u8 = 0x48;
const LAST_IPI: u8 = IPI + LANES as u8 - 1;
/// The vector the local interrupt controller uses when it changes its mind.
pub const SPURIOUS: u8 = 0xff;

/// The tick chain of each CPU, once it is set up.
pub static CHAINS: [IrqCell<Option<Chain>>; MOST_CPUS] = [const { IrqCell::new(None) }; MOST_CPUS];
/// The second timer's ticks.
pub static WATCHDOG_TICKS: IrqCell<Ticks> = IrqCell::new(Ticks { count: 0, link: 0 });

/// Called by the stubs, with interrupts off.
pub extern "sysv64" fn handle(frame: &mut Frame) {
    match frame.vector as u8 {
        1 => watchpoints::hit(frame.rip),
        TICK => {
            let now = cpu::counter();
            CHAINS[number()].with(|chain| {
                let Some(chain) = chain else { return };
                let mode = chain.mode();
                let fired = chain.fired(now);
                if let Some(early) = fired.early {
                    damage("tick", format_args!("early_counts={early} mode={}", mode.name()));
                }
                apic::arm(fired.arm);
            });
            registers::strike_if_asked(frame);
            apic::end_of_interrupt();
            registers::wake();
        }
        WATCHDOG => {
            WATCHDOG_TICKS.with(|ticks| *ticks = ticks.next());
            apic::end_of_interrupt();
            registers::wake();
        }
        vector @ IPI..=LAST_IPI => {
            processors::ipi_taken(u64::from(vector - IPI));
            apic::end_of_interrupt();
            registers::wake();
        }
        SPURIOUS => {}
        0..32 => {
            damage(
                "exception",
                format_args!(
                    "vector={} rip={:#x} error={:#x} cr2={:#x} rsp={:#x}",
                    frame.vector,
                    frame.rip,
                    frame.error,
                    cpu::read_cr2(),
                    frame.rsp
                ),
            );
            super::end(End::PowerOff)
        }
        vector => {
            damage("interrupt", format_args!("vector={vector} rip={:#x}", frame.rip));
            apic::end_of_interrupt();
        }
    }
}
