//! A timerfd whose expirations are counted against the clock: none may be lost, and none may come early.
use super::report::Report;
use anyhow::{Context, Result};
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime, timerfd_create,
    timerfd_settime,
};
use std::io::Write;

const SECOND: i128 = 1_000_000_000;

/// Expirations of a timer that began at a time and goes on at an interval, all in nanoseconds.
#[derive(Clone, Copy, Debug)]
struct Count {
    first: i128,
    interval: i128,
    counted: i128,
}

impl Count {
    fn due(&self, now: i128) -> i128 {
        if now < self.first { 0 } else { (now - self.first) / self.interval + 1 }
    }

    /// Adds what a read has brought, and checks the sum against the times just before and just after that read.
    fn add(&mut self, expirations: u64, before: i128, after: i128) -> Result<(), String> {
        self.counted += i128::from(expirations);
        let (least, most) = (self.due(before), self.due(after));
        if (least..=most).contains(&self.counted) {
            return Ok(());
        }
        let found = self.counted;
        // One loss is told once.
        self.counted = most;
        Err(format!("counted={found} least={least} most={most}"))
    }
}

fn now() -> i128 {
    let time = clock_gettime(ClockId::Monotonic);
    i128::from(time.tv_sec) * SECOND + i128::from(time.tv_nsec)
}

fn timespec(nanoseconds: i128) -> Result<Timespec> {
    Ok(Timespec {
        tv_sec: i64::try_from(nanoseconds / SECOND).context("that is not a time")?,
        tv_nsec: i64::try_from(nanoseconds % SECOND).context("that is not a time")?,
    })
}

/// Counts for ever.
pub fn run(hz: u64, report: &mut Report<impl Write>) -> Result<()> {
    let interval = SECOND / i128::from(hz);
    let mut count = Count { first: now() + interval, interval, counted: 0 };
    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::empty()).context("cannot create a timer")?;
    let setting = Itimerspec { it_interval: timespec(interval)?, it_value: timespec(count.first)? };
    timerfd_settime(&timer, TimerfdTimerFlags::ABSTIME, &setting).context("cannot start a timer")?;
    report.start(format_args!("hz={hz}"))?;
    loop {
        let mut expirations = [0; 8];
        let before = now();
        rustix::io::read(&timer, &mut expirations).context("cannot read a timer")?;
        if let Err(wrong) = count.add(u64::from_ne_bytes(expirations), before, now()) {
            report.damage("ticks", format_args!("{wrong}"))?;
        }
        report.progress(format_args!("ticks={}", count.counted))?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expirations_that_add_up_are_fine_even_after_a_pause() {
        let mut count = Count { first: 100, interval: 10, counted: 0 };
        assert_eq!(count.add(1, 95, 101), Ok(()));
        assert_eq!(count.add(1, 109, 110), Ok(()));
        // Not run from 111 to 1000.
        assert_eq!(count.add(89, 111, 1001), Ok(()));
    }

    #[test]
    fn a_lost_and_an_additional_expiration_are_damage_once() {
        let mut count = Count { first: 100, interval: 10, counted: 0 };
        assert_eq!(count.add(1, 110, 115), Err("counted=1 least=2 most=2".into()));
        assert_eq!(count.add(1, 115, 120), Ok(()));
        assert_eq!(count.add(2, 121, 131), Err("counted=5 least=3 most=4".into()));
    }

    #[test]
    fn a_timer_of_this_machine_ticks_as_counted() {
        let mut said = Limited(Vec::new());
        let mut report = Report::new("ticks", super::super::report::tests::ALWAYS, &mut said);
        assert!(run(1000, &mut report).is_err(), "it ends only when it cannot report any more");
        let said = String::from_utf8(said.0).expect("text");
        assert!(said.starts_with("LOAD start of=ticks hz=1000\nLOAD line n=1 "), "{said}");
        assert!(!said.contains("DAMAGE"), "{said}");
    }

    /// Takes in a little, and then no more.
    struct Limited(Vec<u8>);

    impl Write for Limited {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            if self.0.len() > 1000 {
                return Err(std::io::ErrorKind::StorageFull.into());
            }
            self.0.write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
}
