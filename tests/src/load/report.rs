//! What a load says: that it lives, that it stood still, that something was lost.
use anyhow::{Context, Result};
use guest_kernel::protocol::{DAMAGE, Speaker};
use std::fmt::{self, Write as _};
use std::io::Write;
use std::time::{Duration, Instant};

/// How many lines about damage a load prints: the first tell the most, and a serial port is slow.
const MOST_DAMAGE: u64 = 20;

/// When a load speaks.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// From one sign of life to the next.
    pub every: Duration,
    /// No progress for longer than this is a pause.
    pub pause: Duration,
}

/// The voice of one load.
pub struct Report<W> {
    of: &'static str,
    pace: Pace,
    output: W,
    beats: u64,
    pauses: u64,
    damaged: u64,
    progress: Instant,
    spoken: Instant,
}

impl<W: Write> Report<W> {
    /// For a load of that name.
    pub fn new(of: &'static str, pace: Pace, output: W) -> Self {
        let now = Instant::now();
        Self { of, pace, output, beats: 0, pauses: 0, damaged: 0, progress: now, spoken: now }
    }

    /// The load begins.
    pub fn start(&mut self, details: fmt::Arguments<'_>) -> Result<()> {
        self.progress = Instant::now();
        self.spoken = self.progress;
        let of = self.of;
        self.say(format_args!("{} start of={of} {details}", Speaker::Load))
    }

    /// The load has got something done; the details are for the sign of life, if one is due.
    pub fn progress(&mut self, details: fmt::Arguments<'_>) -> Result<()> {
        self.progress_at(Instant::now(), details)
    }

    fn progress_at(&mut self, now: Instant, details: fmt::Arguments<'_>) -> Result<()> {
        let of = self.of;
        let still = now.saturating_duration_since(self.progress);
        self.progress = now;
        if still > self.pace.pause {
            self.pauses += 1;
            let (n, ms) = (self.pauses, still.as_millis());
            self.say(format_args!("{} pause n={n} of={of} ms={ms}", Speaker::Load))?;
        }
        if now.saturating_duration_since(self.spoken) >= self.pace.every {
            self.spoken = now;
            self.beats += 1;
            let n = self.beats;
            self.say(format_args!("{} line n={n} of={of} {details}", Speaker::Load))?;
        }
        Ok(())
    }

    /// The load is to stand still for that long, to keep to its pace: that is no pause, but what comes on top of it is.
    pub fn rests(&mut self, rest: Duration) {
        self.progress += rest;
    }

    /// How long the load has not got anything done.
    pub fn still(&self) -> Duration {
        self.progress.elapsed()
    }

    /// Something was lost.
    pub fn damage(&mut self, what: &str, details: fmt::Arguments<'_>) -> Result<()> {
        self.damaged += 1;
        if self.damaged > MOST_DAMAGE {
            return Ok(());
        }
        let of = self.of;
        self.say(format_args!("{DAMAGE} {what} of={of} {details}"))
    }

    fn say(&mut self, line: fmt::Arguments<'_>) -> Result<()> {
        // One write per line: other processes write to the same port.
        let mut text = String::new();
        writeln!(text, "{line}").context("cannot compose a line")?;
        self.output.write_all(text.as_bytes()).and_then(|()| self.output.flush()).context("cannot report")
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use guest_kernel::protocol::Line;

    /// Speaks whenever it can.
    pub const ALWAYS: Pace = Pace { every: Duration::ZERO, pause: Duration::from_secs(3600) };

    #[test]
    fn progress_gives_signs_of_life_when_due_and_pauses_when_it_was_late() {
        let pace = Pace { every: Duration::from_secs(1), pause: Duration::from_secs(2) };
        let mut said = Vec::new();
        let mut report = Report::new("test", pace, &mut said);
        report.start(format_args!("a=1")).expect("a start");
        let begin = report.spoken;
        for (ms, count) in [(500, 1), (1000, 2), (1500, 3), (6500, 4)] {
            report.progress_at(begin + Duration::from_millis(ms), format_args!("count={count}")).expect("a line");
        }
        let expected = "LOAD start of=test a=1\nLOAD line n=1 of=test count=2\nLOAD pause n=1 of=test ms=5000\n\
                        LOAD line n=2 of=test count=4\n";
        assert_eq!(String::from_utf8(said).expect("text"), expected);
    }

    #[test]
    fn a_pause_that_falls_into_a_rest_is_noticed() {
        let pace = Pace { every: Duration::from_secs(60), pause: Duration::from_secs(2) };
        let mut said = Vec::new();
        let mut report = Report::new("test", pace, &mut said);
        report.start(format_args!("a=1")).expect("a start");
        let mut now = report.spoken;
        for rested in [5, 8] {
            report.rests(Duration::from_secs(5));
            now += Duration::from_secs(rested);
            report.progress_at(now, format_args!("count=1")).expect("a line");
        }
        assert_eq!(String::from_utf8(said).expect("text"), "LOAD start of=test a=1\nLOAD pause n=1 of=test ms=3000\n");
    }

    #[test]
    fn damage_is_told_but_does_not_flood_the_port() {
        let mut said = Vec::new();
        let mut report = Report::new("test", ALWAYS, &mut said);
        for number in 0..1000 {
            report.damage("thing", format_args!("number={number}")).expect("a line");
        }
        let said = String::from_utf8(said).expect("text");
        assert_eq!(said.lines().count(), 20);
        assert!(said.lines().all(|line| Line::parse(line).is_some_and(|line| line.is_damage())), "{said}");
    }
}
