//! The machine and each of its CPUs as the main loops see them: everything set up, in order, and everything looked at.

use core::fmt;

use guest_kernel::clock::DifferenceWatch;
use guest_kernel::options::{End, Options, SelfTest};
use guest_kernel::tick::{Chain, Mode, Ticks};

use super::debug::Debug;
use super::devicetree::BOARD;
use super::gic::Gic;
use super::interrupts::CHAINS;
use super::its::Its;
use super::platform::Platform;
use super::registers::{self, Registers};
use super::simd::Simd;
use super::system::System;
use super::{counter, cpu, gic, number, present, timer};
use crate::console::damage;
use crate::oracle::refuse;
use crate::processors;

/// In how many rounds the checks that cost an exit each have their turn.
const TURNS: u64 = 8;

/// What a CPU has to itself.
pub struct Processor {
    khz: u64,
    registers: Registers,
    simd: Simd,
    system: System,
    debug: Debug,
    gic: Gic,
    difference: DifferenceWatch,
    next_row: usize,
    next_kept: usize,
}

impl Processor {
    /// Sets this CPU up and lets its ticks begin.
    pub fn start(options: &Options, _khz: Option<u64>) -> Self {
        let Some(board) = BOARD.get() else { super::end(End::PowerOff) };
        let khz = timer::khz();
        let simd = Simd::new();
        let mut gic = Gic::new(&board);
        CHAINS[number()].with(|chain| {
            let chain = chain.insert(Chain::new(khz, options.tick_ms, options.pause_ms, timer::MODES, counter()));
            let arm = chain.revive(counter());
            timer::arm(chain.mode(), arm, chain.interval());
        });
        timer::start_watchdog(4 * options.lost_ms * khz);
        cpu::interrupts_on();
        gic.finish();
        let debug = Debug::new();
        Processor {
            khz,
            registers: Registers::new(),
            simd,
            // Last, as all that is kept has to be final.
            system: System::new(),
            debug,
            gic,
            difference: DifferenceWatch::new(counter(), cpu::physical_counter(), counter()),
            next_row: 0,
            next_kept: 0,
        }
    }

    /// The counter's frequency.
    pub fn khz(&self) -> u64 {
        self.khz
    }

    /// The ticks so far.
    pub fn ticks(&self) -> Ticks {
        CHAINS[number()].with(|chain| chain.as_ref().map(Chain::ticks).unwrap_or_default())
    }

    /// The timer's state, as pairs.
    pub fn timer(&self) -> impl fmt::Display + use<> {
        Timer
    }

    /// The timer's mode.
    pub fn timer_mode(&self) -> Mode {
        CHAINS[number()].with(|chain| chain.as_ref().map_or(Mode::OneShot, Chain::mode))
    }

    /// Starts the ticks anew after one was lost.
    pub fn revive_ticks(&mut self) {
        CHAINS[number()].with(|chain| {
            if let Some(chain) = chain {
                let arm = chain.revive(counter());
                timer::arm(chain.mode(), arm, chain.interval());
            }
        });
    }

    /// There is no clock here besides the counters.
    pub fn clock(&self) -> Option<(u64, u64)> {
        None
    }

    /// Holds values in all general registers until there is an interrupt.
    pub fn hold_registers(&mut self, halted: bool) {
        let before = self.ticks().count;
        self.registers.hold(halted);
        // After a long pause both timers are due at once; if only the second has come, the tick is lost.
        if timer::take_watchdog_fired() && !gic::happens(|| self.ticks().count != before) {
            damage("tick", format_args!("lost=1 mode={} {}", self.timer_mode().name(), self.timer()));
            self.revive_ticks();
        }
    }

    /// What is looked at in every round.
    pub fn check_live(&mut self) {
        self.simd.check();
        self.gic.check_interface();
        timer::check_watchdog();
        if let Err(counts) = self.difference.look(counter(), cpu::physical_counter(), counter()) {
            damage("clock", format_args!("difference={counts}"));
        }
    }

    /// What costs more, a part in each round.
    pub fn check_in_turn(&mut self, round: u64) {
        match round % TURNS {
            0 => self.system.check(),
            1 => {
                self.system.check_identification(self.next_row);
                self.next_row = (self.next_row + 1) % System::ROWS;
            }
            _ => {
                self.gic.check(self.next_kept);
                self.next_kept = (self.next_kept + 1) % self.gic.len().max(1);
            }
        }
    }

    /// Everything at once.
    pub fn check_everything(&mut self) {
        self.check_live();
        self.system.check();
        for row in 0..System::ROWS {
            self.system.check_identification(row);
        }
        for index in 0..self.gic.len() {
            self.gic.check(index);
        }
        self.check_every_second();
    }

    /// What is looked at once per second.
    pub fn check_every_second(&mut self) {
        self.debug.check();
        self.debug.check_hits();
        self.gic.check_own();
    }

    /// Breaks something of the CPU.
    pub fn strike(&mut self, what: SelfTest) {
        match what {
            SelfTest::Register => registers::strike(),
            SelfTest::Simd => self.simd.strike(false),
            SelfTest::Sve => self.simd.strike(true),
            SelfTest::Tick => timer::mask_tick(),
            SelfTest::Watchdog => timer::stop_watchdog(),
            SelfTest::SystemRegister => System::strike(),
            SelfTest::Debug => Debug::strike(),
            SelfTest::Cpuid => self.system.strike_identification(),
            SelfTest::Clock => self.difference.pretend_apart(1_000_000_000),
            SelfTest::Gic => self.gic.strike(),
            SelfTest::Sgi => self.gic.strike_own(),
            SelfTest::Exception => cpu::undefined_instruction(),
            // The main loop's own, the machine's, and those of other architectures.
            _ => {}
        }
    }
}

/// What the CPUs share.
pub struct Machine {
    its: Option<Its>,
    platform: Platform,
}

impl Machine {
    /// Sets everything up, with the first CPU.
    pub fn start(options: &Options) -> (Self, Processor) {
        let Some(board) = BOARD.get() else { super::end(End::PowerOff) };
        let platform = Platform::new(board.serial);
        let mut processor = Processor::start(options, None);
        let its = board.its.map(|address| Its::new(address, &mut processor.gic));
        let machine = Machine { its, platform };
        let refused = match options.self_test {
            Some(SelfTest::Sve) => !processor.simd.has_sve(),
            Some(SelfTest::Lpi) => machine.its.is_none(),
            Some(SelfTest::Uart) => !machine.platform.has_serial(),
            _ => false,
        };
        if let Some(what) = options.self_test
            && refused
        {
            refuse(what.name());
        }
        (machine, processor)
    }

    /// What there is to be checked, as pairs.
    pub fn features<'a>(&'a self, processor: &'a Processor) -> Features<'a> {
        Features(self, processor)
    }

    /// The second timer does not tick: see timer.rs.
    pub fn watchdog(&self) -> Option<Ticks> {
        None
    }

    /// Nothing to start anew.
    pub fn revive_watchdog(&mut self) {}

    /// Nobody tells.
    pub fn told_of_pause(&self) -> bool {
        false
    }

    /// What is looked at once per second, and after each pause.
    pub fn check(&mut self) {
        if let Some(its) = &mut self.its {
            its.check();
        }
        self.platform.check();
    }

    /// Breaks something of it.
    pub fn strike(&mut self, what: SelfTest) {
        match what {
            SelfTest::Lpi => {
                if let Some(its) = &mut self.its {
                    its.strike();
                }
            }
            SelfTest::Uart => self.platform.strike_serial(),
            SelfTest::Image => Platform::strike_image(),
            _ => {}
        }
    }
}

/// There is no clock here besides the counters.
pub fn clock_of_first() -> Option<(u64, u64)> {
    None
}

struct Timer;

impl fmt::Display for Timer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (control, compare) = timer::state();
        write!(formatter, "control={control:#x} compare={compare} now={}", counter())
    }
}

/// What [`Machine::features`] gives.
pub struct Features<'a>(&'a Machine, &'a Processor);

impl fmt::Display for Features<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Features(machine, processor) = self;
        let yes = u8::from;
        let [breakpoints, watchpoints] = processor.debug.has_hits();
        write!(
            formatter,
            "uart={} its={} breakpoints={} watchpoints={} vector_bits={} sve={} sysregs={} gic={} difference={}",
            yes(machine.platform.has_serial()),
            yes(machine.its.is_some()),
            yes(breakpoints),
            yes(watchpoints),
            processor.simd.bits(),
            yes(processor.simd.has_sve()),
            processor.system.len(),
            processor.gic.len(),
            processor.difference.precision(),
        )?;
        match processors::count() {
            1 => Ok(()),
            count => write!(formatter, " cpus={count} present={}", present()),
        }
    }
}
