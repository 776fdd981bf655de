//! Interrupts as fast as they come, and the states in which they find a CPU: running, halted, with interrupts held back, and in the
//! one instruction after they are let through again.

use guest_kernel::pattern::scramble;

use crate::arch;

/// For how many turns interrupts are held back at most.
const MOST_TURNS: u64 = 4096;

/// What a CPU does next.
pub struct Storm {
    state: u64,
    halts: bool,
}

impl Storm {
    /// Each CPU has its own sequence. Every other one halts now and then; the others run all the time.
    pub fn new() -> Self {
        let number = arch::number() as u64;
        Storm { state: scramble(number), halts: number % 2 == 1 }
    }

    /// One of the states.
    pub fn step(&mut self) {
        self.state = scramble(self.state);
        let turns = self.state >> 16 & (MOST_TURNS - 1);
        match self.state % 4 {
            0 => {}
            1 => arch::pend(turns, false),
            2 => arch::pend(turns, self.halts),
            _ => arch::pend(0, self.halts),
        }
    }
}
