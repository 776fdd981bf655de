//! The main loop: a slice of scrubbing, a while of holding live registers, a look at everything else, and round again.

use guest_kernel::options::{End, Load, MOST_CPUS, Options, SelfTest};
use guest_kernel::protocol::{Processors, Report};
use guest_kernel::ranges::Ranges;
use guest_kernel::scrub::{Memory, PassEnd, Scrubber};
use guest_kernel::tick::{TickFault, TickWatch};

use crate::arch::{self, Machine};
use crate::console::{damage, report};
use crate::live::Live;
use crate::others::{self, Others};
use crate::processors::{self, Settings};
use crate::time::Seen;

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
    let cpus = options.cpus.unwrap_or_else(arch::present).min(MOST_CPUS);
    if cpus > arch::present() {
        refuse("cpus");
    }
    if options.hotplug && cpus < 2 {
        refuse("hotplug");
    }
    if let Some(what) = options.self_test
        && what.takes_processors()
        && cpus < 2
    {
        refuse(what.name());
    }
    let mut oracle = Oracle::new(boot, options, cpus);
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
    live: Live,
    around: Around,
    ram: PhysicalMemory,
    scrubber: Scrubber,
    mismatches: u64,
    self_test: Option<SelfTest>,
    beats: u64,
    next_beat: u64,
}

/// What the first CPU watches besides itself.
struct Around {
    khz: u64,
    machine: Machine,
    others: Option<Others>,
    watchdog: Option<TickWatch>,
    pauses: u64,
    paused: bool,
}

impl Around {
    /// To be called after each look at the time.
    fn look(&mut self, seen: Seen) {
        if let Some(ms) = seen.paused {
            self.pauses += 1;
            self.paused = true;
            report(&Report::Pause { n: self.pauses, ms, told: self.machine.told_of_pause() });
        }
        if let (Some(watch), Some(found)) = (&mut self.watchdog, self.machine.watchdog()) {
            match watch.look(found, seen.ran) {
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
        if let Some(others) = &mut self.others {
            others.look(seen.ran);
        }
    }
}

impl Oracle {
    fn new(boot: &Boot, options: Options, cpus: usize) -> Self {
        let (machine, processor) = Machine::start(&options);
        let khz = processor.khz();
        let settings = Settings { options, khz, count: cpus };
        let others = (cpus > 1).then(|| Others::start(&settings));
        report(&Report::Start {
            details: format_args!(
                "arch={} memory_mib={} free_mib={} stride={} tick_ms={} khz={khz} {}",
                arch::NAME,
                boot.memory >> 20,
                boot.free.bytes() >> 20,
                options.stride,
                options.tick_ms,
                machine.features(&processor)
            ),
        });
        let watchdog = machine.watchdog().map(|seen| TickWatch::new(seen, options.lost_ms * khz));
        let live = Live::new(processor, &settings);
        // Only now, as no interrupt is taken while a line is written, which may take seconds.
        processors::go();
        let around = Around { khz, machine, others, watchdog, pauses: 0, paused: false };
        Oracle {
            khz,
            live,
            around,
            ram: PhysicalMemory,
            scrubber: Scrubber::new(&boot.free, options.stride),
            mismatches: 0,
            self_test: options.self_test,
            beats: 0,
            next_beat: arch::counter() + 1000 * khz,
            options,
        }
    }

    fn round(&mut self) {
        if self.options.load == Load::Checks {
            self.scrub();
        }
        let Oracle { live, around, .. } = self;
        live.interrupts(|seen| around.look(seen));
        let paused = core::mem::take(&mut around.paused);
        live.check(paused);
        if paused {
            around.machine.check();
        }
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
        let seen = self.live.look();
        self.around.look(seen);
        seen.now
    }

    fn beat(&mut self) {
        self.live.processor.check_every_second();
        self.around.machine.check();
        let cpus = processors::count();
        let cycles = self.around.others.as_ref().and_then(Others::cycles);
        report(&Report::Beat {
            n: self.beats,
            ticks: self.live.processor.ticks().count,
            passes: self.scrubber.passes(),
            sum: self.scrubber.sum(),
            clock_ms: self.live.time.elapsed_ms(&self.live.processor),
            processors: (cpus > 1).then(|| Processors { cpus, ipis: processors::ipis(), cycles }),
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
            SelfTest::Tsc => self.live.time.pretend_counter_ahead(60_000 * self.khz),
            SelfTest::Clock => {
                self.live.time.pretend_clock_ahead(1_000_000_000);
                self.live.processor.strike(what);
            }
            SelfTest::Ipi => self.live.ring.strike_lose(),
            SelfTest::IpiTwice => self.live.ring.strike_double(),
            SelfTest::Behind => processors::COUNTER.pretend_ahead(60_000 * self.khz),
            SelfTest::Processor => others::strike(),
            SelfTest::Pause => {
                let until = arch::counter() + 1000 * self.khz;
                while arch::counter() < until {}
            }
            other => {
                self.live.processor.strike(other);
                self.around.machine.strike(other);
            }
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
