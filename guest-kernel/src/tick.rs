//! The tick chain: each tick of a one-shot timer arms the next, so one that is lost breaks the chain for good. The timer's mode
//! changes every second, as each is saved and restored in its own way.

use crate::pattern::scramble;

/// A timer's mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Counts down once.
    OneShot,
    /// Counts down again and again.
    Periodic,
    /// Fires when the counter reaches a value.
    Deadline,
}

impl Mode {
    /// The word in the protocol.
    pub const fn name(self) -> &'static str {
        match self {
            Mode::OneShot => "one-shot",
            Mode::Periodic => "periodic",
            Mode::Deadline => "deadline",
        }
    }
}

/// What the interrupt handler has to do with the timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arm {
    /// Nothing: it goes on by itself.
    Leave,
    /// Start the next countdown.
    Again,
    /// Fire at this counter value.
    At(u64),
    /// Change to this mode first; the value is for [`Mode::Deadline`].
    Change(Mode, u64),
}

/// What a tick means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fired {
    /// What the handler has to do.
    pub arm: Arm,
    /// It came so many counts before it was due, which is wrong.
    pub early: Option<u64>,
}

/// What the interrupt handler keeps.
#[derive(Debug, Clone, Copy)]
pub struct Chain {
    khz: u64,
    interval: u64,
    pause: u64,
    modes: &'static [Mode],
    mode: Mode,
    next_mode: u64,
    last: u64,
    due: u64,
    lenient: u32,
    ticks: Ticks,
}

/// Counts of the chain, and the proof that none was left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ticks {
    /// Ticks since the start.
    pub count: u64,
    /// Follows from the count, and only by going through all values before.
    pub link: u64,
}

impl Ticks {
    /// One tick more.
    pub fn next(self) -> Self {
        let count = self.count.wrapping_add(1);
        Ticks { count, link: scramble(self.link ^ count) }
    }
}

impl Chain {
    /// A chain that starts now, in one-shot mode, and goes through the modes of the timer in turn.
    pub fn new(khz: u64, tick_ms: u64, pause_ms: u64, modes: &'static [Mode], now: u64) -> Self {
        let interval = tick_ms * khz;
        Chain {
            khz,
            interval,
            pause: pause_ms * khz,
            modes,
            mode: Mode::OneShot,
            next_mode: now + 1000 * khz,
            last: now,
            due: now + interval,
            lenient: 2,
            ticks: Ticks::default(),
        }
    }

    /// The mode the timer is in.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Counts from one tick to the next.
    pub fn interval(&self) -> u64 {
        self.interval
    }

    /// The count and its proof.
    pub fn ticks(&self) -> Ticks {
        self.ticks
    }

    /// A tick has come.
    pub fn fired(&mut self, now: u64) -> Fired {
        self.ticks = self.ticks.next();
        // KVM fires a one-shot timer whose count has run out once more when its state is restored, so a tick right after a
        // pause, or right after a periodic timer was replaced, may come early without anything being lost.
        if now.saturating_sub(self.last) > self.pause {
            self.lenient = 2;
        }
        self.last = now;
        let early = self.due.saturating_sub(now);
        // A countdown's length was only measured; a deadline is exact, but a host may deliver it a little early.
        let allowed = match self.mode {
            Mode::OneShot => self.interval / 2,
            Mode::Periodic => self.interval,
            Mode::Deadline => self.khz,
        };
        let early = (early > allowed && self.lenient == 0).then_some(early);
        self.lenient = self.lenient.saturating_sub(1);
        self.due = now + self.interval;
        let arm = if now >= self.next_mode {
            self.next_mode = now + 1000 * self.khz;
            self.lenient = 2;
            let mut rest = self.modes.iter().skip_while(|mode| **mode != self.mode).skip(1);
            self.mode = rest.next().or(self.modes.first()).copied().unwrap_or(self.mode);
            Arm::Change(self.mode, self.due)
        } else {
            match self.mode {
                Mode::OneShot => Arm::Again,
                Mode::Periodic => Arm::Leave,
                Mode::Deadline => Arm::At(self.due),
            }
        };
        Fired { arm, early }
    }

    /// Starts anew after a tick was lost: a change to the mode it is in.
    pub fn revive(&mut self, now: u64) -> Arm {
        (self.due, self.last, self.lenient) = (now + self.interval, now, 2);
        Arm::Change(self.mode, self.due)
    }
}

/// What the main loop keeps: the same chain, reckoned on its own, and how long ago the last tick was.
#[derive(Debug, Clone, Copy)]
pub struct TickWatch {
    seen: Ticks,
    waited: u64,
    limit: u64,
}

/// What is wrong with the ticks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TickFault {
    /// None has come for so many counts during which the guest was running.
    Lost {
        /// Counts of running time.
        waited: u64,
    },
    /// The count is not what the proof says.
    Broken {
        /// What the handler keeps.
        found: Ticks,
        /// What the main loop had seen before.
        before: Ticks,
    },
}

impl TickWatch {
    /// Lost means: not within so many counts of running time.
    pub fn new(seen: Ticks, limit: u64) -> Self {
        TickWatch { seen, waited: 0, limit }
    }

    /// Another look, after `ran` counts of running time. After a fault it goes on from here.
    pub fn look(&mut self, found: Ticks, ran: u64) -> Result<(), TickFault> {
        let before = self.seen;
        if found == before {
            self.waited += ran;
            if self.waited > self.limit {
                return Err(TickFault::Lost { waited: core::mem::take(&mut self.waited) });
            }
            return Ok(());
        }
        self.waited = 0;
        self.seen = found;
        // A wrong count must not become a loop without an end.
        let steps = found.count.wrapping_sub(before.count);
        let proof = (0..steps.min(100_000)).fold(before, |ticks, _| ticks.next());
        if proof == found { Ok(()) } else { Err(TickFault::Broken { found, before }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KHZ: u64 = 1000;

    const ALL: &[Mode] = &[Mode::OneShot, Mode::Periodic, Mode::Deadline];

    fn chain(modes: &'static [Mode]) -> Chain {
        Chain::new(KHZ, 20, 300, modes, 0)
    }

    #[test]
    fn modes_change_every_second_in_turn() {
        let mut chain = chain(ALL);
        let mut changes = [None; 4];
        let mut found = 0;
        for tick in 1..=204 {
            let Fired { arm, early } = chain.fired(tick * 20 * KHZ);
            assert_eq!(early, None);
            if let Arm::Change(mode, _) = arm {
                changes[found] = Some(mode);
                found += 1;
            }
        }
        assert_eq!(changes, [Some(Mode::Periodic), Some(Mode::Deadline), Some(Mode::OneShot), Some(Mode::Periodic)]);
    }

    #[test]
    fn mode_that_is_not_offered_is_left_out() {
        for (modes, without) in [
            (&[Mode::OneShot, Mode::Periodic] as &[Mode], Mode::Deadline),
            (&[Mode::OneShot, Mode::Deadline], Mode::Periodic),
        ] {
            let mut chain = chain(modes);
            let mut seen = [Mode::OneShot; 1000];
            for (tick, seen) in (1..).zip(&mut seen) {
                chain.fired(tick * 20 * KHZ);
                *seen = chain.mode();
            }
            assert!(!seen.contains(&without) && modes.iter().all(|mode| seen.contains(mode)), "{modes:?}");
        }
    }

    #[test]
    fn tick_before_its_time_is_early_except_after_a_pause() {
        let mut chain = chain(ALL);
        for tick in 1..10 {
            assert_eq!(chain.fired(tick * 20 * KHZ).early, None);
        }
        assert_eq!(chain.fired(181 * KHZ).early, Some(19 * KHZ));
        assert_eq!(chain.fired(5000 * KHZ).early, None);
        assert_eq!(chain.fired(5001 * KHZ).early, None);
    }

    #[test]
    fn ticks_without_a_gap_satisfy_the_watch() {
        let mut chain = chain(ALL);
        let mut watch = TickWatch::new(chain.ticks(), 5000 * KHZ);
        for tick in 1..100 {
            chain.fired(tick * 20 * KHZ);
            if tick % 3 == 0 {
                assert_eq!(watch.look(chain.ticks(), 60 * KHZ), Ok(()));
            }
        }
    }

    #[test]
    fn count_that_was_changed_breaks_the_chain() {
        let mut chain = chain(ALL);
        let mut watch = TickWatch::new(chain.ticks(), 5000 * KHZ);
        chain.fired(20 * KHZ);
        let mut found = chain.ticks();
        found.count += 1;
        assert!(matches!(watch.look(found, 0), Err(TickFault::Broken { .. })));
        found.count = 0;
        assert!(matches!(watch.look(found, 0), Err(TickFault::Broken { .. })));
    }

    #[test]
    fn tick_is_lost_only_by_running_time() {
        let chain = chain(ALL);
        let mut watch = TickWatch::new(chain.ticks(), 5000 * KHZ);
        for _ in 0..50 {
            assert_eq!(watch.look(chain.ticks(), 100 * KHZ), Ok(()));
        }
        assert_eq!(watch.look(chain.ticks(), 100 * KHZ), Err(TickFault::Lost { waited: 5100 * KHZ }));
        assert_eq!(watch.look(chain.ticks(), 100 * KHZ), Ok(()), "reported once, then waited for anew");
    }
}
