//! Time as one CPU sees it, and its ticks.

use guest_kernel::clock::{ClockFault, ClockLimits, ClockWatch, Look, Watch};
use guest_kernel::options::Options;
use guest_kernel::tick::{TickFault, TickWatch};

use crate::arch::{self, Processor};
use crate::console::damage;
use crate::processors;

/// How far the clocks of two CPUs may be apart: the host has them agree, but each changes at its own CPU's next entry.
const APART_NS: u64 = 1_000_000;
/// For how long they may be further apart.
const APART_MS: u64 = 1000;

/// What a look tells.
#[derive(Clone, Copy, Default)]
pub struct Seen {
    /// The counter.
    pub now: u64,
    /// How many counts this CPU has been running since the last look.
    pub ran: u64,
    /// For how many milliseconds it has not been running.
    pub paused: Option<u64>,
}

/// What a CPU keeps of it.
pub struct Time {
    khz: u64,
    watch: Watch,
    ticks: TickWatch,
    clock: Option<ClockWatch>,
    clock_start: u64,
    clock_looked: u64,
    apart: u64,
}

impl Time {
    /// Starts now.
    pub fn new(processor: &Processor, options: &Options) -> Self {
        let khz = processor.khz();
        let first = processor.clock();
        let limits = ClockLimits { total_ms: options.clock_ms, drift_ppm: options.clock_ppm };
        let now = arch::counter();
        Time {
            khz,
            watch: Watch::new(khz, now, options.pause_ms),
            ticks: TickWatch::new(processor.ticks(), options.lost_ms * khz),
            clock: first.map(|(counter, ns)| ClockWatch::new(khz, counter, ns, limits)),
            clock_start: first.map_or(0, |(_, ns)| ns),
            clock_looked: now,
            apart: 0,
        }
    }

    /// Looks at the counter and at the ticks.
    pub fn look(&mut self, processor: &mut Processor) -> Seen {
        let (now, behind) = processors::COUNTER.look(arch::counter);
        let (ran, paused) = match self.watch.look(now) {
            Look::Ran(counts) => (counts, None),
            Look::Paused(ms) => (0, Some(ms)),
            Look::Back(counts) => {
                damage("tsc", format_args!("back={counts} now={now}"));
                (0, None)
            }
        };
        if behind > 0 {
            if processors::count() > 1 {
                damage("tsc", format_args!("behind={behind} now={now}"));
            }
            processors::COUNTER.restart(now);
        }
        match self.ticks.look(processor.ticks(), ran) {
            Ok(()) => {}
            Err(TickFault::Lost { waited }) => {
                let (mode, timer) = (processor.timer_mode().name(), processor.timer());
                damage("tick", format_args!("lost=1 mode={mode} waited_ms={} {timer}", waited / self.khz));
                processor.revive_ticks();
            }
            Err(TickFault::Broken { found, before }) => {
                damage("tick", format_args!("count={} link={:#x} before={}", found.count, found.link, before.count));
            }
        }
        Seen { now, ran, paused }
    }

    /// Looks at the host's clock.
    pub fn look_at_clock(&mut self, processor: &Processor) {
        let (Some(watch), Some((counter, ns))) = (&mut self.clock, processor.clock()) else { return };
        match watch.look(counter, ns) {
            Ok(()) => {}
            Err(ClockFault::Back(ns)) => damage("clock", format_args!("back_ns={ns}")),
            Err(ClockFault::Jumped(us)) => damage("clock", format_args!("jumped_us={us}")),
            Err(ClockFault::Diverged(us)) => damage("clock", format_args!("diverged_us={us}")),
        }
        if processors::count() > 1 {
            self.compare_clocks(processor);
        }
    }

    /// The other CPUs' clocks must say the same.
    fn compare_clocks(&mut self, processor: &Processor) {
        let mut counter = 0;
        let read = || {
            let (read, ns) = processor.clock().unwrap_or_default();
            counter = read;
            ns
        };
        let (ns, behind) = processors::CLOCK.look(read);
        if behind > APART_NS {
            damage("clock", format_args!("behind_ns={behind}"));
            processors::CLOCK.restart(ns);
        }
        let looked = core::mem::replace(&mut self.clock_looked, counter);
        let Some((first_counter, first_ns)) = arch::clock_of_first() else { return };
        let since = u128::from(first_counter.saturating_sub(counter)) * 1_000_000 / u128::from(self.khz);
        let apart = first_ns.abs_diff(ns.saturating_add(since as u64));
        if apart <= APART_NS {
            self.apart = 0;
            return;
        }
        // In the first moments under another kernel one CPU may have the new clock already, and the first one the old. Longer
        // steps are pauses.
        self.apart += counter.saturating_sub(looked).min(100 * self.khz);
        if self.apart > APART_MS * self.khz {
            damage("clock", format_args!("apart_us={} ns={ns}", apart / 1000));
            self.apart = 0;
        }
    }

    /// Milliseconds since the start.
    pub fn elapsed_ms(&self, processor: &Processor) -> u64 {
        match processor.clock() {
            Some((_, ns)) => ns.saturating_sub(self.clock_start) / 1_000_000,
            None => self.watch.elapsed_ms(),
        }
    }

    /// Pretends that the counter was further: for the self-test.
    pub fn pretend_counter_ahead(&mut self, counts: u64) {
        self.watch.pretend_ahead(counts);
    }

    /// Pretends that the clock was further: for the self-test.
    pub fn pretend_clock_ahead(&mut self, ns: u64) {
        if let Some(clock) = &mut self.clock {
            clock.pretend_ahead(ns);
        }
    }
}
