//! What every CPU does and watches, the first as well as the others; and the main loop of the others.

use core::sync::atomic::Ordering;

use guest_kernel::options::Load;

use crate::arch::{self, Processor};
use crate::others;
use crate::processors::{self, PROGRESS, Ring, Settings};
use crate::storm::Storm;
use crate::time::{Seen, Time};

/// How many states of the storm a CPU goes through until it looks at all else.
const STORM_STEPS: u32 = 32;
/// In how many rounds of the storm registers are held once.
const STORM_HOLDS: u64 = 8;

/// A CPU and what it keeps.
pub struct Live {
    pub processor: Processor,
    pub time: Time,
    pub ring: Ring,
    storm: Storm,
    load: Load,
    rest: u64,
    rounds: u64,
    ticks: u64,
}

impl Live {
    /// Starts now.
    pub fn new(processor: Processor, settings: &Settings) -> Self {
        let Settings { options, khz, .. } = settings;
        Live {
            time: Time::new(&processor, options),
            ring: Ring::new(*khz, options.lost_ms),
            storm: Storm::new(),
            load: options.load,
            rest: options.rest,
            rounds: 0,
            ticks: processor.ticks().count,
            processor,
        }
    }

    /// A look at time and at the interrupts to the next CPU. Between them is a tick, except in a storm: each also wakes the CPU
    /// that receives it, so that they would be all that there is.
    pub fn look(&mut self) -> Seen {
        let seen = self.time.look(&mut self.processor);
        let ticks = self.processor.ticks().count;
        let send = self.load == Load::IpiStorm || ticks != core::mem::replace(&mut self.ticks, ticks);
        self.ring.look(seen.ran, send);
        seen
    }

    /// Lets interrupts come, and holds live values while they do. Calls back after each look on the way.
    pub fn interrupts(&mut self, mut on_look: impl FnMut(Seen)) {
        self.rounds += 1;
        let hold = match self.load {
            Load::Checks => true,
            Load::IpiStorm => {
                for _ in 0..STORM_STEPS {
                    self.storm.step();
                    let seen = self.look();
                    on_look(seen);
                }
                self.rounds.is_multiple_of(STORM_HOLDS)
            }
        };
        if hold {
            // Both of the states a CPU can be frozen in get their share: running and halted.
            let halted = match self.load {
                Load::Checks => self.rounds.is_multiple_of(2),
                Load::IpiStorm => self.rounds.is_multiple_of(2 * STORM_HOLDS),
            };
            self.processor.hold_registers(halted);
        }
        let seen = self.look();
        on_look(seen);
        for _ in 0..self.rest {
            self.processor.hold_registers(true);
            let seen = self.look();
            on_look(seen);
        }
    }

    /// Everything of this CPU, a part of it in each round, all of it after a pause.
    pub fn check(&mut self, paused: bool) {
        self.processor.check_live();
        if paused {
            self.processor.check_everything();
        } else {
            self.processor.check_in_turn(self.rounds);
        }
        self.time.look_at_clock(&self.processor);
    }
}

/// The main loop of all CPUs but the first.
pub fn run() -> ! {
    let number = arch::number();
    let Some(settings) = processors::settings() else { arch::end(guest_kernel::options::End::PowerOff) };
    if settings.options.hotplug && number == settings.count - 1 {
        others::live_until_switched_off();
    }
    let processor = Processor::start(&settings.options, Some(settings.khz));
    PROGRESS[number].store(1, Ordering::SeqCst);
    processors::await_go();
    let mut live = Live::new(processor, &settings);
    let mut next_second = arch::counter() + 1000 * settings.khz;
    loop {
        let (mut paused, mut now) = (false, 0);
        live.interrupts(|seen| {
            paused |= seen.paused.is_some();
            now = seen.now;
        });
        live.check(paused);
        if now >= next_second {
            live.processor.check_every_second();
            next_second = now + 1000 * settings.khz;
        }
        PROGRESS[number].fetch_add(1, Ordering::SeqCst);
        others::stall_if_asked(number);
    }
}
