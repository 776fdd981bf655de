//! The first CPU's view of the others: it starts them, sees that none stands still, and switches one off and on again and again.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use guest_kernel::options::MOST_CPUS;
use guest_kernel::pattern::scramble;

use crate::arch;
use crate::console::damage;
use crate::processors::{self, COUNTER, LOST, PROGRESS, Settings};

/// How often the CPU that is switched off and on has begun to run.
static BEGINNINGS: AtomicU64 = AtomicU64::new(0);
/// The CPU after the first is to stand still: for the self-test.
static STALL: AtomicBool = AtomicBool::new(false);

/// Each state of the CPU that is switched off and on lasts so many milliseconds at most.
const STATE_MS: u64 = 20;

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// It runs until it is told to stop.
    Runs,
    /// It has been told to stop.
    Stops,
    /// It is off until it is switched on.
    IsOff,
    /// It has been switched on.
    Starts,
}

/// The CPU that is switched off and on.
struct Cycled {
    state: State,
    /// When to go on, in counts of running time.
    left: u64,
    beginnings: u64,
}

/// See the file's comment.
pub struct Others {
    settings: Settings,
    seen: [u64; MOST_CPUS],
    waited: [u64; MOST_CPUS],
    cycled: Option<Cycled>,
}

impl Others {
    /// Starts them one after the other. They wait for [`processors::go`].
    pub fn start(settings: &Settings) -> Self {
        processors::set_up(*settings);
        let mut others = Others { settings: *settings, seen: [0; MOST_CPUS], waited: [0; MOST_CPUS], cycled: None };
        for (number, progress) in PROGRESS.iter().enumerate().take(settings.ring()).skip(1) {
            arch::make_startable(number);
            others.await_start(number, || progress.load(Ordering::SeqCst) > 0);
        }
        if settings.options.hotplug {
            let number = settings.count - 1;
            arch::make_startable(number);
            others.await_start(number, || BEGINNINGS.load(Ordering::SeqCst) > 0);
            others.cycled = Some(Cycled { state: State::Runs, left: 0, beginnings: 1 });
        }
        others
    }

    /// Switches a CPU on, and waits.
    fn await_start(&mut self, number: usize, has_started: impl Fn() -> bool) {
        let limit = LOST * self.settings.options.lost_ms * self.settings.khz;
        // A processor that is not ready yet ignores the first call.
        for _ in 0..2 {
            arch::switch_on(number);
            let start = arch::counter();
            while arch::counter() - start < limit {
                if has_started() {
                    return;
                }
                core::hint::spin_loop();
            }
        }
        damage("processor", format_args!("started=0 of={number}"));
    }

    /// How often a CPU was switched on again, where that is asked for.
    pub fn cycles(&self) -> Option<u64> {
        self.cycled.as_ref().map(|cycled| cycled.beginnings - 1)
    }

    /// None must stand still. To be called after `ran` counts of running time.
    pub fn look(&mut self, ran: u64) {
        let limit = LOST * self.settings.options.lost_ms * self.settings.khz;
        for (number, progress) in PROGRESS.iter().enumerate().take(self.settings.ring()).skip(1) {
            let progress = progress.load(Ordering::SeqCst);
            if progress != core::mem::replace(&mut self.seen[number], progress) {
                self.waited[number] = 0;
                continue;
            }
            self.waited[number] += ran;
            if self.waited[number] > limit {
                let waited = core::mem::take(&mut self.waited[number]);
                let details = format_args!("stuck=1 of={number} waited_ms={}", waited / self.settings.khz);
                damage("processor", details);
            }
        }
        let (number, khz, limit) = (self.settings.count - 1, self.settings.khz, limit);
        let Some(cycled) = &mut self.cycled else { return };
        cycled.left = cycled.left.saturating_sub(ran);
        let beginnings = BEGINNINGS.load(Ordering::SeqCst);
        let expected = cycled.beginnings + u64::from(cycled.state == State::Starts);
        if beginnings != cycled.beginnings && beginnings != expected {
            damage("processor", format_args!("beginnings={beginnings} expected={expected} of={number}"));
            cycled.beginnings = beginnings;
        }
        let is_over = cycled.left == 0;
        // How long a state lasts is of no pattern, and some last no time at all.
        let random = scramble(beginnings * 4 + cycled.state as u64);
        let pause = if random.is_multiple_of(4) { 0 } else { random % (STATE_MS * khz) };
        (cycled.state, cycled.left) = match cycled.state {
            State::Runs if is_over => {
                arch::switch_off(number);
                (State::Stops, limit)
            }
            State::Stops if arch::is_off(number) => (State::IsOff, pause),
            State::IsOff if is_over => {
                arch::switch_on(number);
                (State::Starts, limit)
            }
            State::Starts if beginnings == expected => {
                cycled.beginnings = beginnings;
                (State::Runs, pause)
            }
            state @ (State::Stops | State::Starts) if is_over => {
                let what = if state == State::Stops { "stopped" } else { "started" };
                damage("processor", format_args!("{what}=0 of={number}"));
                if state == State::Starts {
                    arch::switch_on(number);
                }
                (state, limit)
            }
            state => (state, cycled.left),
        };
    }
}

/// The main loop of the CPU that is switched off and on: it may end at any instruction, so it holds nothing that others wait for.
pub fn live_until_switched_off() -> ! {
    BEGINNINGS.fetch_add(1, Ordering::SeqCst);
    loop {
        let (now, behind) = COUNTER.look(arch::counter);
        if behind > 0 {
            damage("tsc", format_args!("behind={behind} now={now}"));
            COUNTER.restart(now);
        }
        arch::stop_if_asked();
    }
}

/// Makes another CPU stand still: for the self-test.
pub fn strike() {
    STALL.store(true, Ordering::SeqCst);
}

/// Stands still if it is this CPU's turn.
pub fn stall_if_asked(number: usize) {
    while number == 1 && STALL.load(Ordering::SeqCst) {
        core::hint::spin_loop();
    }
}
