//! The machine as the oracle's main loop sees it: everything set up, in order, and everything looked at.

use core::fmt;

use guest_kernel::options::{Options, SelfTest};
use guest_kernel::tick::{Chain, Mode, Ticks};

use super::cpuid::Snapshot;
use super::interrupts::{CHAIN, WATCHDOG_TICKS};
use super::platform::Platform;
use super::registers::{self, Registers};
use super::system::System;
use super::vectors::Vectors;
use super::watchpoints::{self, Watchpoints};
use super::{apic, counter, cpu, cpuid, platform, pvclock, timer};

/// In how many rounds the checks that cost an exit each have their turn.
const TURNS: u64 = 8;
/// The local timer's modes; the last is not on every CPU.
static ALL_MODES: [Mode; 3] = [Mode::OneShot, Mode::Periodic, Mode::Deadline];

/// See the file's comment.
pub struct Machine {
    khz: u64,
    has_clock: bool,
    has_watchdog: bool,
    has_deadline: bool,
    registers: Registers,
    vectors: Vectors,
    watchpoints: Watchpoints,
    system: System,
    cpuid: Snapshot,
    next_leaf: usize,
    platform: Platform,
}

impl Machine {
    /// Sets everything up and lets the ticks begin.
    pub fn start(options: &Options) -> Self {
        platform::mask_pics();
        let vectors = Vectors::new();
        let has_clock = pvclock::start();
        let khz = timer::khz(has_clock);
        apic::start(cpuid::has_x2apic() && !options.memory_mapped_apic);
        apic::measure_timer(khz, options.tick_ms);
        let registers = Registers::new(khz);
        let has_deadline = cpuid::has_deadline_timer();
        let system = System::new(has_clock);
        timer::start_watchdog();
        let platform = Platform::new();
        let watchpoints = Watchpoints::new();
        CHAIN.with(|chain| {
            let modes = if has_deadline { &ALL_MODES } else { &ALL_MODES[..2] };
            let new = Chain::new(khz, options.tick_ms, options.pause_ms, modes, counter());
            apic::arm(chain.insert(new).revive(counter()));
        });
        cpu::interrupts_on();
        let has_watchdog = timer::is_ticking(khz);
        // Last, as all control registers that CPUID repeats have to be final.
        let cpuid = Snapshot::new();
        Machine {
            khz,
            has_clock,
            has_watchdog,
            has_deadline,
            registers,
            vectors,
            watchpoints,
            system,
            cpuid,
            next_leaf: 0,
            platform,
        }
    }

    /// The counter's frequency.
    pub fn khz(&self) -> u64 {
        self.khz
    }

    /// What there is to be checked, as pairs.
    pub fn features(&self) -> Features<'_> {
        Features(self)
    }

    /// The ticks so far.
    pub fn ticks(&self) -> Ticks {
        CHAIN.with(|chain| chain.as_ref().map(Chain::ticks).unwrap_or_default())
    }

    /// The timer's state, as pairs.
    pub fn timer(&self) -> impl fmt::Display + use<> {
        apic::Timer
    }

    /// The timer's mode.
    pub fn timer_mode(&self) -> Mode {
        CHAIN.with(|chain| chain.as_ref().map_or(Mode::OneShot, Chain::mode))
    }

    /// Starts the ticks anew after one was lost.
    pub fn revive_ticks(&mut self) {
        CHAIN.with(|chain| {
            if let Some(chain) = chain {
                apic::arm(chain.revive(counter()));
            }
        });
    }

    /// The ticks of the second timer so far, if there is one.
    pub fn watchdog(&self) -> Option<Ticks> {
        self.has_watchdog.then(|| WATCHDOG_TICKS.with(|ticks| *ticks))
    }

    /// Starts the second timer anew.
    pub fn revive_watchdog(&mut self) {
        timer::start_watchdog();
    }

    /// The counter and the host's clock in nanoseconds, taken together.
    pub fn clock(&self) -> Option<(u64, u64)> {
        self.has_clock.then(pvclock::read)
    }

    /// Whether the host has said that the guest was stopped.
    pub fn told_of_pause(&self) -> bool {
        self.has_clock && pvclock::take_stopped()
    }

    /// Holds values in all general registers until there is an interrupt.
    pub fn hold_registers(&mut self, halted: bool) {
        self.registers.hold(halted);
    }

    /// What is looked at in every round.
    pub fn check_live(&mut self) {
        self.vectors.check();
        self.system.check_controls();
    }

    /// What costs more, a part in each round.
    pub fn check_in_turn(&mut self, round: u64) {
        match round % TURNS {
            0 => self.system.check_msrs(),
            1 => self.watchpoints.check(),
            _ => {
                self.cpuid.check(self.next_leaf);
                self.next_leaf = (self.next_leaf + 1) % self.cpuid.len().max(1);
            }
        }
    }

    /// Everything at once.
    pub fn check_everything(&mut self) {
        self.check_live();
        self.system.check_msrs();
        self.watchpoints.check();
        self.watchpoints.check_hit();
        for number in 0..self.cpuid.len() {
            self.cpuid.check(number);
        }
        self.platform.check();
    }

    /// What is looked at once per second.
    pub fn check_every_second(&mut self) {
        self.watchpoints.check_hit();
        self.platform.check();
    }

    /// Breaks something of the machine.
    pub fn strike(&mut self, what: SelfTest) {
        match what {
            SelfTest::Register => registers::strike(),
            SelfTest::X87 => self.vectors.strike("x87"),
            SelfTest::Xmm => self.vectors.strike("xmm"),
            SelfTest::Ymm => self.vectors.strike("ymm"),
            SelfTest::Tick => apic::mask_timer(),
            SelfTest::Watchdog => timer::stop_watchdog(),
            SelfTest::Msr => System::strike_msr(),
            SelfTest::Control => System::strike_control(),
            SelfTest::Debug => watchpoints::strike(),
            SelfTest::Cpuid => self.cpuid.strike(),
            SelfTest::Uart => Platform::strike_serial(),
            SelfTest::Image => Platform::strike_image(),
            SelfTest::Exception => cpu::undefined_instruction(),
            // The main loop's own, and those of other architectures.
            _ => {}
        }
    }
}

/// What [`Machine::features`] gives.
pub struct Features<'a>(&'a Machine);

impl fmt::Display for Features<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (machine, yes) = (self.0, u8::from);
        write!(
            formatter,
            "clock={} deadline={} x2apic={} watchdog={} hits={} avx={} avx512={} cpuid={}",
            yes(machine.has_clock),
            yes(machine.has_deadline),
            yes(apic::is_by_registers()),
            yes(machine.has_watchdog),
            yes(machine.watchpoints.has_hits()),
            yes(machine.vectors.has(2)),
            yes(machine.vectors.has(5)),
            machine.cpuid.len()
        )
    }
}
