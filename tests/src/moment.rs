//! The raw counter and clocks, read at one moment: by PID 1 of the host, and inside a guest.
use crate::arch::counter;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// A reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// The raw counter, in the middle of the reading.
    pub counter: u64,
    /// How much it counted on during the reading.
    pub width: u64,
    /// CLOCK_REALTIME in nanoseconds.
    pub realtime: u64,
    /// CLOCK_MONOTONIC.
    pub monotonic: u64,
    /// CLOCK_BOOTTIME.
    pub boottime: u64,
}

impl Moment {
    /// Of several readings the one that was interrupted least.
    pub fn now() -> Self {
        const TRIES: usize = 5;
        let clock = |clock| {
            let time = clock_gettime(clock);
            (time.tv_sec * 1_000_000_000 + time.tv_nsec).cast_unsigned()
        };
        let read = || {
            let before = counter();
            let [realtime, monotonic, boottime] = [ClockId::Realtime, ClockId::Monotonic, ClockId::Boottime].map(clock);
            let width = counter() - before;
            Self { counter: before + width / 2, width, realtime, monotonic, boottime }
        };
        let mut best = read();
        for _ in 1..TRIES {
            let other = read();
            if other.width < best.width {
                best = other;
            }
        }
        best
    }

    /// The counter's frequency in Hz, as CLOCK_REALTIME saw it from an earlier moment until this.
    pub fn frequency_since(&self, earlier: &Self) -> f64 {
        (self.counter - earlier.counter) as f64 / (self.realtime as f64 - earlier.realtime as f64) * 1e9
    }

    /// How many milliseconds a clock has gone ahead of a counter of that frequency since an earlier moment.
    pub fn ahead(&self, earlier: &Self, frequency: f64, clock: fn(&Self) -> u64) -> f64 {
        let counted = (self.counter - earlier.counter) as f64 / frequency * 1e3;
        (i128::from(clock(self)) - i128::from(clock(earlier))) as f64 / 1e6 - counted
    }

    /// By how many milliseconds that may be wrong, as neither reading took no time.
    pub fn uncertainty(&self, earlier: &Self, frequency: f64) -> f64 {
        (self.width + earlier.width) as f64 / 2.0 / frequency * 1e3
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EARLIER: Moment = Moment { counter: 1000, width: 4, realtime: 5_000_000_000, monotonic: 10, boottime: 20 };

    #[test]
    fn a_clock_that_was_set_is_ahead_of_the_counter_by_as_much() {
        let later = Moment { counter: 3000, realtime: 7_500_000_000, monotonic: 2_000_000_010, ..EARLIER };
        assert_eq!(later.ahead(&EARLIER, 1000.0, |moment| moment.realtime), 500.0);
        assert_eq!(later.ahead(&EARLIER, 1000.0, |moment| moment.monotonic), 0.0);
        assert_eq!(later.uncertainty(&EARLIER, 1000.0), 4.0);
        assert_eq!(later.frequency_since(&EARLIER), 800.0);
    }

    #[test]
    fn moments_of_this_machine_follow_each_other() {
        let earlier = Moment::now();
        let later = Moment::now();
        assert!(later.counter > earlier.counter && later.monotonic > earlier.monotonic, "{earlier:?} {later:?}");
    }
}
