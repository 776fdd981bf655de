//! The machine and each of its CPUs as the main loops see them: everything set up, in order, and everything looked at.

use core::fmt;

use guest_kernel::options::{Options, SelfTest};
use guest_kernel::tick::{Chain, Mode, Ticks};

use super::cpuid::Snapshot;
use super::interrupts::{CHAINS, WATCHDOG_TICKS};
use super::platform::Platform;
use super::registers::{self, Registers};
use super::system::System;
use super::vectors::Vectors;
use super::watchpoints::{self, Watchpoints};
use super::{apic, counter, cpu, cpuid, number, platform, present, pvclock, timer};
use crate::kept::compare;
use crate::processors;

/// In how many rounds the checks that cost an exit each have their turn.
const TURNS: u64 = 8;
/// The local timer's modes; the last is not on every CPU.
static ALL_MODES: [Mode; 3] = [Mode::OneShot, Mode::Periodic, Mode::Deadline];

/// What a CPU has to itself.
pub struct Processor {
    khz: u64,
    has_clock: bool,
    has_deadline: bool,
    registers: Registers,
    vectors: Vectors,
    watchpoints: Watchpoints,
    system: System,
    cpuid: Snapshot,
    next_leaf: usize,
    apic: [u32; 6],
}

impl Processor {
    /// Sets this CPU up and lets its ticks begin. The first one finds out the counter's frequency.
    pub fn start(options: &Options, khz: Option<u64>) -> Self {
        let vectors = Vectors::new();
        let has_clock = pvclock::start();
        let is_first = khz.is_none();
        let khz = khz.unwrap_or_else(|| timer::khz(has_clock));
        apic::start(cpuid::has_x2apic() && !options.memory_mapped_apic);
        if is_first {
            apic::measure_timer(khz, options.tick_ms);
        }
        let registers = Registers::new(khz);
        let has_deadline = cpuid::has_deadline_timer();
        let system = System::new(has_clock);
        let watchpoints = Watchpoints::new();
        CHAINS[number()].with(|chain| {
            let modes = if has_deadline { &ALL_MODES } else { &ALL_MODES[..2] };
            let new = Chain::new(khz, options.tick_ms, options.pause_ms, modes, counter());
            apic::arm(chain.insert(new).revive(counter()));
        });
        cpu::interrupts_on();
        Processor {
            khz,
            has_clock,
            has_deadline,
            registers,
            vectors,
            watchpoints,
            system,
            // Last, as all control registers that CPUID repeats have to be final.
            cpuid: Snapshot::new(),
            next_leaf: 0,
            apic: apic::read_constant_registers(),
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
        apic::Timer
    }

    /// The timer's mode.
    pub fn timer_mode(&self) -> Mode {
        CHAINS[number()].with(|chain| chain.as_ref().map_or(Mode::OneShot, Chain::mode))
    }

    /// Starts the ticks anew after one was lost.
    pub fn revive_ticks(&mut self) {
        CHAINS[number()].with(|chain| {
            if let Some(chain) = chain {
                apic::arm(chain.revive(counter()));
            }
        });
    }

    /// The counter and the host's clock in nanoseconds, taken together.
    pub fn clock(&self) -> Option<(u64, u64)> {
        self.has_clock.then(pvclock::read)
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
        for number in 0..self.cpuid.len() {
            self.cpuid.check(number);
        }
        self.check_every_second();
    }

    /// What is looked at once per second.
    pub fn check_every_second(&mut self) {
        self.watchpoints.check_hit();
        compare("lapic", &apic::CONSTANT_REGISTERS, &mut self.apic, apic::read_constant_registers());
    }

    /// Breaks something of the CPU.
    pub fn strike(&mut self, what: SelfTest) {
        match what {
            SelfTest::Register => registers::strike(),
            SelfTest::X87 => self.vectors.strike("x87"),
            SelfTest::Xmm => self.vectors.strike("xmm"),
            SelfTest::Ymm => self.vectors.strike("ymm"),
            SelfTest::Tick => apic::mask_timer(),
            SelfTest::Msr => System::strike_msr(),
            SelfTest::Control => System::strike_control(),
            SelfTest::Debug => watchpoints::strike(),
            SelfTest::Cpuid => self.cpuid.strike(),
            SelfTest::Exception => cpu::undefined_instruction(),
            // The main loop's own, the machine's, and those of other architectures.
            _ => {}
        }
    }
}

/// What the CPUs share.
pub struct Machine {
    has_watchdog: bool,
    platform: Platform,
}

impl Machine {
    /// Sets everything up, with the first CPU.
    pub fn start(options: &Options) -> (Self, Processor) {
        platform::mask_pics();
        let processor = Processor::start(options, None);
        timer::start_watchdog();
        let platform = Platform::new();
        (Machine { has_watchdog: timer::is_ticking(processor.khz), platform }, processor)
    }

    /// What there is to be checked, as pairs.
    pub fn features<'a>(&'a self, processor: &'a Processor) -> Features<'a> {
        Features(self, processor)
    }

    /// The ticks of the second timer so far, if there is one.
    pub fn watchdog(&self) -> Option<Ticks> {
        self.has_watchdog.then(|| WATCHDOG_TICKS.with(|ticks| *ticks))
    }

    /// Starts the second timer anew.
    pub fn revive_watchdog(&mut self) {
        timer::start_watchdog();
    }

    /// Whether the host has said that the guest was stopped.
    pub fn told_of_pause(&self) -> bool {
        cpuid::has_kvm_clock() && pvclock::take_stopped()
    }

    /// What is looked at once per second, and after each pause.
    pub fn check(&mut self) {
        self.platform.check();
    }

    /// Breaks something of it.
    pub fn strike(&mut self, what: SelfTest) {
        match what {
            SelfTest::Watchdog => timer::stop_watchdog(),
            SelfTest::Uart => Platform::strike_serial(),
            SelfTest::Image => Platform::strike_image(),
            _ => {}
        }
    }
}

/// The first CPU's clock, and the counter, taken together; where a CPU has one.
pub fn clock_of_first() -> Option<(u64, u64)> {
    cpuid::has_kvm_clock().then(pvclock::read_first)
}

/// What [`Machine::features`] gives.
pub struct Features<'a>(&'a Machine, &'a Processor);

impl fmt::Display for Features<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Features(machine, processor) = self;
        let yes = u8::from;
        write!(
            formatter,
            "clock={} deadline={} x2apic={} watchdog={} hits={} avx={} avx512={} cpuid={}",
            yes(processor.has_clock),
            yes(processor.has_deadline),
            yes(apic::is_by_registers()),
            yes(machine.has_watchdog),
            yes(processor.watchpoints.has_hits()),
            yes(processor.vectors.has(2)),
            yes(processor.vectors.has(5)),
            processor.cpuid.len()
        )?;
        match processors::count() {
            1 => Ok(()),
            count => write!(formatter, " cpus={count} present={}", present()),
        }
    }
}
