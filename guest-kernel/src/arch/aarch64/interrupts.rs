//! What happens when the CPU is interrupted: ticks, expected interrupts, and damage.

use guest_kernel::options::{End, MOST_CPUS};
use guest_kernel::tick::Chain;

use super::cpu::{counter, read_register};
use super::exceptions::Frame;
use super::{debug, gic, its, number, registers, timer};
use crate::console::damage;
use crate::irq_cell::IrqCell;
use crate::processors;

/// The tick chain of each CPU, once it is set up.
pub static CHAINS: [IrqCell<Option<Chain>>; MOST_CPUS] = [const { IrqCell::new(None) }; MOST_CPUS];

/// Called by the vectors, with interrupts off.
pub extern "C" fn handle(frame: &mut Frame) {
    match frame.vector {
        1 | 5 => interrupt(frame),
        vector => exception(frame, vector),
    }
}

fn exception(frame: &mut Frame, vector: u64) {
    let (syndrome, address) = (read_register!("esr_el1"), read_register!("far_el1"));
    if debug::hit(frame, syndrome, address) {
        return;
    }
    let (pc, pstate) = (frame.elr, frame.spsr);
    damage(
        "exception",
        format_args!("vector={vector} esr={syndrome:#x} pc={pc:#x} far={address:#x} pstate={pstate:#x}"),
    );
    super::end(End::PowerOff)
}

fn interrupt(frame: &mut Frame) {
    registers::wake(frame);
    match gic::acknowledge() {
        timer::TICK => {
            let now = counter();
            CHAINS[number()].with(|chain| {
                let Some(chain) = chain else { return };
                let mode = chain.mode();
                let fired = chain.fired(now);
                if let Some(early) = fired.early {
                    damage("tick", format_args!("early_counts={early} mode={}", mode.name()));
                }
                timer::arm(chain.mode(), fired.arm, chain.interval());
            });
            timer::put_off_watchdog();
            gic::end_of_interrupt(timer::TICK);
        }
        timer::WATCHDOG => {
            timer::watchdog_fired();
            gic::end_of_interrupt(timer::WATCHDOG);
        }
        gic::OWN => {
            gic::own_taken();
            gic::end_of_interrupt(gic::OWN);
        }
        id @ gic::IPI..=gic::LAST_IPI => {
            processors::ipi_taken(u64::from(id - gic::IPI));
            gic::end_of_interrupt(id);
        }
        gic::PARKED => gic::park(),
        gic::NONE => {}
        other => {
            if !its::taken(other) {
                damage("interrupt", format_args!("intid={other} pc={:#x}", frame.elr));
            }
            gic::end_of_interrupt(other);
        }
    }
}
