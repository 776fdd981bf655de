//! Time as the guest sees it: the counter that must not go back, the pauses in it, and the host's clock that must agree with it.

use core::sync::atomic::{AtomicU64, Ordering};

/// Looks at the counter again and again.
#[derive(Debug, Clone, Copy)]
pub struct Watch {
    khz: u64,
    start: u64,
    last: u64,
    pause: u64,
}

/// What a look at the counter tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// The guest has been running for so many counts since the last look.
    Ran(u64),
    /// It has not been running for so many milliseconds.
    Paused(u64),
    /// The counter has gone back by so many counts.
    Back(u64),
}

impl Watch {
    /// Starts at a counter value. A step of more than `pause_ms` is a pause.
    pub fn new(khz: u64, now: u64, pause_ms: u64) -> Self {
        Watch { khz, start: now, last: now, pause: pause_ms * khz }
    }

    /// The counter now.
    pub fn look(&mut self, now: u64) -> Look {
        let last = core::mem::replace(&mut self.last, now);
        match now.checked_sub(last) {
            None => Look::Back(last - now),
            Some(step) if step > self.pause => Look::Paused(step / self.khz),
            Some(step) => Look::Ran(step),
        }
    }

    /// Milliseconds from the start to the last look.
    pub fn elapsed_ms(&self) -> u64 {
        self.last.saturating_sub(self.start) / self.khz
    }

    /// Pretends that the counter was further than it is: for the self-test.
    pub fn pretend_ahead(&mut self, counts: u64) {
        self.last += counts;
    }
}

/// What is wrong with the host's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClockFault {
    /// It has gone back by so many nanoseconds.
    Back(u64),
    /// It has diverged from the counter by so many microseconds (positive: it is ahead) in total.
    Diverged(i64),
    /// It has moved against the counter by so many microseconds since the last look.
    Jumped(i64),
}

/// Compares the host's clock with the counter.
#[derive(Debug, Clone, Copy)]
pub struct ClockWatch {
    khz: u64,
    start: (u64, u64),
    last_ns: u64,
    last_by_counter: i64,
    last_difference: i64,
    limits: ClockLimits,
}

/// What the clock is allowed.
#[derive(Debug, Clone, Copy)]
pub struct ClockLimits {
    /// How far it may be from the counter in total, in milliseconds, …
    pub total_ms: u64,
    /// … and how much further per million since the start: a kernel measures the counter's frequency anew at each boot.
    pub drift_ppm: u64,
}

/// A clock whose source the host has just changed may be this much behind what the old one said; guests allow for it.
const BACK_NS: u64 = 1_000_000;
/// A look further off the one before than this is a jump; looks are at most some seconds of running time apart.
const JUMP_NS: i64 = 20_000_000;
impl ClockWatch {
    /// Starts with a pair of readings taken together.
    pub fn new(khz: u64, counter: u64, ns: u64, limits: ClockLimits) -> Self {
        ClockWatch { khz, start: (counter, ns), last_ns: ns, last_by_counter: 0, last_difference: 0, limits }
    }

    /// Another pair of readings. After a fault it goes on from here, so that one step is reported once.
    pub fn look(&mut self, counter: u64, ns: u64) -> Result<(), ClockFault> {
        let by_counter = u128::from(counter.saturating_sub(self.start.0)) * 1_000_000 / u128::from(self.khz.max(1));
        let by_counter = i64::try_from(by_counter).unwrap_or(i64::MAX);
        let by_clock = i64::try_from(ns.saturating_sub(self.start.1)).unwrap_or(i64::MAX);
        let difference = by_clock.saturating_sub(by_counter);
        let step = difference.saturating_sub(core::mem::replace(&mut self.last_difference, difference));
        let since = by_counter.saturating_sub(core::mem::replace(&mut self.last_by_counter, by_counter));
        let last_ns = core::mem::replace(&mut self.last_ns, ns);
        if ns.saturating_add(BACK_NS) < last_ns {
            self.restart(counter, ns);
            return Err(ClockFault::Back(last_ns - ns));
        }
        if step.saturating_abs() > JUMP_NS.saturating_add(self.drift(since)) {
            self.restart(counter, ns);
            return Err(ClockFault::Jumped(step / 1000));
        }
        let total = i64::try_from(self.limits.total_ms).unwrap_or(i64::MAX).saturating_mul(1_000_000);
        if difference.saturating_abs() > total.saturating_add(self.drift(by_counter)) {
            self.restart(counter, ns);
            return Err(ClockFault::Diverged(difference / 1000));
        }
        Ok(())
    }

    /// The drift that is allowed over so many nanoseconds.
    fn drift(&self, ns: i64) -> i64 {
        (ns / 1_000_000).saturating_mul(i64::try_from(self.limits.drift_ppm).unwrap_or(i64::MAX))
    }

    fn restart(&mut self, counter: u64, ns: u64) {
        (self.start, self.last_by_counter, self.last_difference) = ((counter, ns), 0, 0);
    }

    /// Pretends that the clock was further than it is: for the self-test.
    pub fn pretend_ahead(&mut self, ns: u64) {
        self.last_ns += ns;
    }
}

/// Watches over two counters of the same frequency whose difference must stay as it is, to the count.
///
/// They cannot be read at one instant, so each look only gives bounds; all looks together narrow them down.
#[derive(Debug, Clone, Copy)]
pub struct DifferenceWatch {
    least: i64,
    most: i64,
}

impl DifferenceWatch {
    /// Starts with a look: the first counter before and after the other was read.
    pub fn new(before: u64, other: u64, after: u64) -> Self {
        let (least, most) = Self::bounds(before, other, after);
        DifferenceWatch { least, most }
    }

    fn bounds(before: u64, other: u64, after: u64) -> (i64, i64) {
        (other.wrapping_sub(after) as i64, other.wrapping_sub(before) as i64)
    }

    /// Another look. The error is by how many counts the difference has changed at least; it goes on from there.
    pub fn look(&mut self, before: u64, other: u64, after: u64) -> Result<(), i64> {
        let (least, most) = Self::bounds(before, other, after);
        let change = if least > self.most {
            least.wrapping_sub(self.most)
        } else if most < self.least {
            most.wrapping_sub(self.least)
        } else {
            (self.least, self.most) = (self.least.max(least), self.most.min(most));
            return Ok(());
        };
        (self.least, self.most) = (least, most);
        Err(change)
    }

    /// How far apart the bounds are: what a change may be and stay unnoticed.
    pub fn precision(&self) -> u64 {
        self.most.abs_diff(self.least)
    }

    /// Pretends that the difference was another: for the self-test.
    pub fn pretend_apart(&mut self, counts: i64) {
        self.least += counts;
        self.most += counts;
    }
}

/// The latest reading that any CPU has told the others: none may read an earlier one after it.
#[derive(Debug, Default)]
pub struct Latest(AtomicU64);

impl Latest {
    /// Nothing was read yet.
    pub const fn new() -> Self {
        Latest(AtomicU64::new(0))
    }

    /// Reads and tells. The reading must not be moved before the loads that come before it. Besides the reading: how far it is
    /// behind what another CPU had told before.
    pub fn look(&self, read: impl FnOnce() -> u64) -> (u64, u64) {
        let told = self.0.load(Ordering::SeqCst);
        let now = read();
        self.0.fetch_max(now, Ordering::SeqCst);
        (now, told.saturating_sub(now))
    }

    /// Takes a reading back, however late it is: after it was found to be wrong, so that it is reported once.
    pub fn restart(&self, now: u64) {
        self.0.store(now, Ordering::SeqCst);
    }

    /// Pretends that another CPU was further: for the self-test.
    pub fn pretend_ahead(&self, by: u64) {
        self.0.fetch_add(by, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KHZ: u64 = 2_000_000;
    const SECOND: u64 = KHZ * 1000;
    const LIMITS: ClockLimits = ClockLimits { total_ms: 50, drift_ppm: 250 };

    #[test]
    fn looks_tell_running_from_pauses_and_from_going_back() {
        let mut watch = Watch::new(KHZ, 1000, 300);
        assert_eq!(watch.look(2000), Look::Ran(1000));
        assert_eq!(watch.look(2000 + SECOND), Look::Paused(1000));
        assert_eq!(watch.look(2000 + SECOND), Look::Ran(0));
        assert_eq!(watch.look(2000), Look::Back(SECOND));
        assert_eq!(watch.look(2001), Look::Ran(1));
        assert_eq!(watch.elapsed_ms(), 0);
    }

    #[test]
    fn clock_that_agrees_has_no_fault_even_across_a_long_pause() {
        let mut clock = ClockWatch::new(KHZ, 500, 70, LIMITS);
        for second in [1, 2, 3, 60, 61] {
            assert_eq!(clock.look(500 + second * SECOND, 70 + second * 1_000_000_000 + 3_000_000), Ok(()));
        }
    }

    #[test]
    fn clock_that_goes_back_or_jumps_is_reported_once() {
        let mut clock = ClockWatch::new(KHZ, 0, 0, LIMITS);
        assert_eq!(clock.look(2 * SECOND, 2_000_000_000), Ok(()));
        assert_eq!(clock.look(2 * SECOND, 1_998_000_000), Err(ClockFault::Back(2_000_000)));
        assert_eq!(clock.look(3 * SECOND, 2_998_000_000), Ok(()));
        assert_eq!(clock.look(4 * SECOND, 4_098_000_000), Err(ClockFault::Jumped(100_000)));
        assert_eq!(clock.look(5 * SECOND, 5_098_000_000), Ok(()));
    }

    #[test]
    fn clock_that_creeps_away_is_reported_when_it_is_too_far() {
        let mut clock = ClockWatch::new(KHZ, 0, 0, LIMITS);
        let fault = (1..).find_map(|second| clock.look(second * SECOND, second * 1_005_000_000).err()).unwrap();
        let ClockFault::Diverged(microseconds) = fault else { panic!("{fault:?}") };
        assert!((50_000..60_000).contains(&microseconds), "{microseconds}");
    }

    #[test]
    fn clock_may_drift_as_much_as_it_is_allowed() {
        let mut clock = ClockWatch::new(KHZ, 0, 0, ClockLimits { total_ms: 50, drift_ppm: 2000 });
        assert_eq!((1..1000).find_map(|second| clock.look(second * SECOND, second * 1_001_400_000).err()), None);
        assert_eq!(clock.look(1100 * SECOND, 1100 * 1_001_400_000), Ok(()), "over a pause of 100 s too");
    }

    #[test]
    fn difference_of_two_counters_is_watched_to_the_count() {
        let mut watch = DifferenceWatch::new(1000, 51_500, 2000);
        assert_eq!(watch.precision(), 1000);
        assert_eq!(watch.look(10_000, 60_400, 10_500), Ok(()));
        assert_eq!(watch.look(20_000, 70_390, 20_400), Ok(()));
        assert_eq!(watch.precision(), 400);
        assert_eq!(watch.look(1 << 62, (1 << 62) + 49_981, (1 << 62) + 10), Err(-9), "it has become less");
        assert_eq!(watch.look(1 << 62, (1 << 62) + 49_981, (1 << 62) + 10), Ok(()), "reported once");
        assert_eq!(watch.look(100, 50_100, 110), Err(9), "it has become more");
    }

    #[test]
    fn reading_behind_another_processors_is_noticed() {
        let latest = Latest::new();
        assert_eq!(latest.look(|| 100), (100, 0));
        assert_eq!(latest.look(|| 100), (100, 0), "the same is not earlier");
        assert_eq!(latest.look(|| 93), (93, 7));
        assert_eq!(latest.look(|| 99), (99, 1), "what was told stays told");
        latest.restart(99);
        assert_eq!(latest.look(|| 99), (99, 0));
    }

    #[test]
    fn difference_may_be_negative_and_pretended() {
        let mut watch = DifferenceWatch::new(5000, 1000, 5010);
        assert_eq!(watch.look(6000, 2000, 6005), Ok(()));
        watch.pretend_apart(100);
        assert!(watch.look(7000, 3000, 7005).is_err());
    }
}
