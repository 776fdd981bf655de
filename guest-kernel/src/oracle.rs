//! The main loop: a slice of scrubbing, a while of holding live registers, a look at everything else, and round again.

use guest_kernel::clock::{ClockFault, ClockLimits, ClockWatch, Look, Watch};
use guest_kernel::options::{End, Options, SelfTest};
use guest_kernel::protocol::Report;
use guest_kernel::ranges::Ranges;
use guest_kernel::scrub::{Memory, PassEnd, Scrubber};
use guest_kernel::tick::{TickFault, TickWatch};

use crate::arch::{self, Machine};
use crate::console::{damage, report};

/// How long a slice of scrubbing takes; the rest of a round, up to a tick, goes to the registers.
const SLICE_MS: u64 = 10;
/// While RAM is filled for the first time there is nothing to be noticed yet, and much to do.
const FILL_SLICE_MS: u64 = 100;
/// Lines of RAM between two looks at the counter.
const LINES_PER_LOOK: u64 = 32;
/// The self-test strikes after so many lines.
const SELF_TEST_AFTER: u64 = 2;

/// What the loader has told.
pub struct Boot {
    pub memory: u64,
    pub free: Ranges,
    pub command_line: &'static str,
}

/// Checks for ever, or as long as the options say.
pub fn run(boot: &Boot) -> ! {
    let options = Options::parse(boot.command_line).unwrap_or_else(|word| {
        damage("option", format_args!("word={word}"));
        arch::end(End::PowerOff)
    });
    if !arch::ENDS.contains(&options.end) {
        refuse(options.end.name());
    }
    if let Some(what) = options.self_test
        && SelfTest::offered_on(arch::NAME).all(|(_, offered)| offered != what)
    {
        refuse(what.name());
    }
    let mut oracle = Oracle::new(boot, options);
    loop {
        oracle.round();
    }
}

/// A test that asked for something must get it, so what cannot be had is damage.
pub fn refuse(word: &str) -> ! {
    damage("option", format_args!("refused={word}"));
    arch::end(End::PowerOff)
}

struct Oracle {
    options: Options,
    khz: u64,
    machine: Machine,
    ram: PhysicalMemory,
    scrubber: Scrubber,
    mismatches: u64,
    watch: Watch,
    clock: Option<ClockWatch>,
    clock_start: u64,
    ticks: TickWatch,
    watchdog: Option<TickWatch>,
    self_test: Option<SelfTest>,
    rounds: u64,
    beats: u64,
    next_beat: u64,
    pauses: u64,
    paused: bool,
}

impl Oracle {
    fn new(boot: &Boot, options: Options) -> Self {
        let machine = Machine::start(&options);
        let khz = machine.khz();
        let lost = options.lost_ms * khz;
        report(&Report::Start {
            details: format_args!(
                "arch={} memory_mib={} free_mib={} stride={} tick_ms={} khz={khz} {}",
                arch::NAME,
                boot.memory >> 20,
                boot.free.bytes() >> 20,
                options.stride,
                options.tick_ms,
                machine.features()
            ),
        });
        let first_clock = machine.clock();
        let limits = ClockLimits { total_ms: options.clock_ms, drift_ppm: options.clock_ppm };
        let now = arch::counter();
        Oracle {
            khz,
            ram: PhysicalMemory,
            scrubber: Scrubber::new(&boot.free, options.stride),
            mismatches: 0,
            watch: Watch::new(khz, now, options.pause_ms),
            clock: first_clock.map(|(counter, ns)| ClockWatch::new(khz, counter, ns, limits)),
            clock_start: first_clock.map_or(0, |(_, ns)| ns),
            ticks: TickWatch::new(machine.ticks(), lost),
            watchdog: machine.watchdog().map(|seen| TickWatch::new(seen, lost)),
            self_test: options.self_test,
            rounds: 0,
            beats: 0,
            next_beat: now + 1000 * khz,
            pauses: 0,
            paused: false,
            machine,
            options,
        }
    }

    fn round(&mut self) {
        self.rounds += 1;
        self.scrub();
        // Both of the states a CPU can be frozen in get their share: running and halted.
        self.machine.hold_registers(self.rounds.is_multiple_of(2));
        self.look();
        self.machine.check_live();
        if core::mem::take(&mut self.paused) {
            self.machine.check_everything();
        } else {
            self.machine.check_in_turn(self.rounds);
        }
        self.look_at_clock();
        if self.look() >= self.next_beat {
            self.beat();
        }
    }

    fn scrub(&mut self) {
        let slice = if self.scrubber.passes() == 0 { FILL_SLICE_MS } else { SLICE_MS };
        let until = self.look() + slice * self.khz;
        loop {
            let mut mismatches = self.mismatches;
            let end = self.scrubber.step(&mut self.ram, LINES_PER_LOOK, |word| {
                mismatches += 1;
                damage(
                    "ram",
                    format_args!(
                        "at={:#x} expected={:#018x} found={:#018x} pass={}",
                        word.address, word.expected, word.found, word.pass
                    ),
                );
            });
            self.mismatches = mismatches;
            if let Some(PassEnd { sum, expected }) = end {
                // Single words were reported already; a wrong sum alone means that some were left out.
                if core::mem::take(&mut self.mismatches) == 0 && sum != expected {
                    damage("sum", format_args!("expected={expected:#018x} found={sum:#018x}"));
                }
            }
            if self.look() >= until {
                return;
            }
        }
    }

    /// Looks at the counter and at all that depends on it. Gives the counter.
    fn look(&mut self) -> u64 {
        let now = arch::counter();
        let ran = match self.watch.look(now) {
            Look::Ran(counts) => counts,
            Look::Paused(ms) => {
                self.pauses += 1;
                self.paused = true;
                report(&Report::Pause { n: self.pauses, ms, told: self.machine.told_of_pause() });
                0
            }
            Look::Back(counts) => {
                damage("tsc", format_args!("back={counts} now={now}"));
                0
            }
        };
        match self.ticks.look(self.machine.ticks(), ran) {
            Ok(()) => {}
            Err(TickFault::Lost { waited }) => {
                let (mode, timer) = (self.machine.timer_mode().name(), self.machine.timer());
                damage("tick", format_args!("lost=1 mode={mode} waited_ms={} {timer}", waited / self.khz));
                self.machine.revive_ticks();
            }
            Err(TickFault::Broken { found, before }) => {
                damage("tick", format_args!("count={} link={:#x} before={}", found.count, found.link, before.count));
            }
        }
        if let (Some(watch), Some(found)) = (&mut self.watchdog, self.machine.watchdog()) {
            match watch.look(found, ran) {
                Ok(()) => {}
                Err(TickFault::Lost { waited }) => {
                    self.machine.revive_watchdog();
                    damage("watchdog", format_args!("lost=1 waited_ms={}", waited / self.khz));
                }
                Err(TickFault::Broken { found, before }) => damage(
                    "watchdog",
                    format_args!("count={} link={:#x} before={}", found.count, found.link, before.count),
                ),
            }
        }
        now
    }

    fn look_at_clock(&mut self) {
        if let (Some(watch), Some((counter, ns))) = (&mut self.clock, self.machine.clock()) {
            match watch.look(counter, ns) {
                Ok(()) => {}
                Err(ClockFault::Back(ns)) => damage("clock", format_args!("back_ns={ns}")),
                Err(ClockFault::Jumped(us)) => damage("clock", format_args!("jumped_us={us}")),
                Err(ClockFault::Diverged(us)) => damage("clock", format_args!("diverged_us={us}")),
            }
        }
    }

    fn beat(&mut self) {
        self.machine.check_every_second();
        let clock_ms = match self.machine.clock() {
            Some((_, ns)) => ns.saturating_sub(self.clock_start) / 1_000_000,
            None => self.watch.elapsed_ms(),
        };
        report(&Report::Beat {
            n: self.beats,
            ticks: self.machine.ticks().count,
            passes: self.scrubber.passes(),
            sum: self.scrubber.sum(),
            clock_ms,
        });
        self.beats += 1;
        // After a pause of some seconds the lines that were due in it are not made up for.
        self.next_beat = (self.next_beat + 1000 * self.khz).max(self.look());
        if self.options.lines.is_some_and(|lines| self.beats >= lines) {
            report(&Report::End { lines: self.beats, how: self.options.end.name() });
            arch::end(self.options.end);
        }
        if self.beats >= SELF_TEST_AFTER
            // A bit in RAM can only be noticed where there is something written.
            && (self.self_test != Some(SelfTest::Ram) || self.scrubber.passes() > 0)
            && let Some(what) = self.self_test.take()
        {
            self.strike(what);
        }
    }

    /// Breaks one thing, so that a test can see it noticed.
    fn strike(&mut self, what: SelfTest) {
        match what {
            SelfTest::Ram => {
                let address = self.scrubber.word_ahead();
                let value = self.ram.read(address);
                self.ram.write(address, value ^ 1 << 40);
            }
            SelfTest::Tsc => self.watch.pretend_ahead(60_000 * self.khz),
            SelfTest::Clock => {
                if let Some(clock) = &mut self.clock {
                    clock.pretend_ahead(1_000_000_000);
                }
                self.machine.strike(what);
            }
            SelfTest::Pause => {
                let until = arch::counter() + 1000 * self.khz;
                while arch::counter() < until {}
            }
            other => self.machine.strike(other),
        }
    }
}

/// Guest-physical memory, which is mapped one to one.
struct PhysicalMemory;

impl Memory for PhysicalMemory {
    #[inline(always)]
    fn read(&self, address: u64) -> u64 {
        // SAFETY: the scrubber's ranges are free RAM, mapped one to one, that no Rust object lives in.
        unsafe { core::ptr::with_exposed_provenance::<u64>(address as usize).read_volatile() }
    }

    #[inline(always)]
    fn write(&mut self, address: u64, value: u64) {
        // SAFETY: as above.
        unsafe { core::ptr::with_exposed_provenance_mut::<u64>(address as usize).write_volatile(value) }
    }
}
