//! The host's own CLOCK_REALTIME after a live update. The new kernel has it from a real-time clock that knows seconds only; what
//! the old kernel's said and how far the counter has run on since tell it to the microsecond. Guests that boot later, and whatever
//! else runs on the host, get it from there.

use std::io;
use std::mem::MaybeUninit;

use kho_abi::document::index::{ClockV1, IndexV2};
use rustix::time::{ClockId, Timespec};
use serde_json::{Value, json};

use crate::clock;

const SECOND: u64 = 1_000_000_000;
/// A clock that is off by no more than this is left alone.
const TOLERANCE_NS: u64 = 10_000_000;
/// How far off a clock may be that has just been set. It is set late where another process runs between the reckoning and the
/// call; then it is set again.
const PRECISION_NS: u64 = 1_000_000;
const TRIES: usize = 5;

/// Why the clock is not set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
enum Unset {
    #[error("the last kernel's vmm did not hand its clock over")]
    NotHandedOver,
    #[error("the counter's frequency was not handed over")]
    NoFrequency,
    #[error("the counter is behind what it was: it did not run on through the kexec")]
    Behind,
    #[error("what was handed over is no time")]
    NoTime,
    #[error("--no-set-clock was given")]
    NotWanted,
    #[error("another program has set it and keeps it synchronized")]
    Synchronized,
    #[error("the kernel refuses: {0}")]
    Refused(String),
}

/// What CLOCK_REALTIME is when the counter is at `now`.
fn expected_ns(then: Option<ClockV1>, frequency_hz: u64, now: u64) -> Result<u64, Unset> {
    let ClockV1 { counter, realtime_ns } = then.ok_or(Unset::NotHandedOver)?;
    let elapsed = now.checked_sub(counter).ok_or(Unset::Behind)?;
    let elapsed_ns = (u128::from(elapsed) * u128::from(SECOND)).checked_div(frequency_hz.into());
    let elapsed_ns = elapsed_ns.ok_or(Unset::NoFrequency)?;
    // What the kernel takes for a time has a sign.
    let sum = u64::try_from(elapsed_ns).ok().and_then(|elapsed| realtime_ns.checked_add(elapsed));
    sum.filter(|&sum| i64::try_from(sum).is_ok()).ok_or(Unset::NoTime)
}

/// Sets the clock where it is off and nobody else has set it, and tells what was done as an event.
pub fn settle(index: &IndexV2, wanted: bool) -> Value {
    let off = || {
        let (counter, found) = clock::read(ClockId::Realtime);
        let expected = expected_ns(index.clock, index.timeline.frequency_hz, counter)?;
        Ok((found.abs_diff(expected), i128::from(found) - i128::from(expected)))
    };
    let (distance, offset) = match off() {
        Ok(off) => off,
        Err(error) => return event("unknown", None, Some(&error)),
    };
    if distance <= TOLERANCE_NS {
        return event("right", Some(offset), None);
    }
    let allowed = if wanted { synchronized().and_then(refuse_synchronized) } else { Err(Unset::NotWanted) };
    let outcome = allowed.and_then(|()| {
        for _ in 0..TRIES {
            set(index)?;
            let (distance, _) = off()?;
            if distance <= PRECISION_NS {
                break;
            }
        }
        Ok(())
    });
    match outcome {
        Ok(()) => event("set", Some(offset), None),
        Err(error) => event("left", Some(offset), Some(&error)),
    }
}

fn set(index: &IndexV2) -> Result<(), Unset> {
    let ns = expected_ns(index.clock, index.timeline.frequency_hz, crate::arch::counter())?;
    // Set to a time, not moved by a difference: were somebody else to set it just before, both would be added up.
    let time = Timespec { tv_sec: (ns / SECOND) as i64, tv_nsec: (ns % SECOND) as i64 };
    rustix::time::clock_settime(ClockId::Realtime, time).map_err(|error| Unset::Refused(error.to_string()))
}

fn refuse_synchronized(synchronized: bool) -> Result<(), Unset> {
    if synchronized { Err(Unset::Synchronized) } else { Ok(()) }
}

/// Whether somebody has set this kernel's clock and stands for it. Time services take the mark of an unsynchronized clock away once
/// they know the time (systemd-timesyncd, ntpd, phc2sys, and chronyd as distributions set it up). What else sets a clock early in
/// boot has no better source than we have: the real-time clock, or the time of the last shutdown; the mark then stays.
fn synchronized() -> Result<bool, Unset> {
    let mut state = MaybeUninit::<libc::timex>::zeroed();
    // SAFETY: no mode is set, so that the call only fills the struct, which is ours.
    let status = unsafe { libc::adjtimex(state.as_mut_ptr()) };
    if status < 0 {
        return Err(Unset::Refused(io::Error::last_os_error().to_string()));
    }
    // SAFETY: zeroes are a valid value of this struct of integers, and the call has filled it.
    let state = unsafe { state.assume_init() };
    Ok(state.status & libc::STA_UNSYNC == 0)
}

fn event(action: &str, offset_ns: Option<i128>, reason: Option<&Unset>) -> Value {
    json!({
        "event": "clock", "action": action, "off_ms": offset_ns.map(|ns| (ns / 1000) as f64 / 1e3),
        "reason": reason.map(ToString::to_string),
    })
}

/// The event in words.
pub fn words(event: &Value) -> String {
    let off = event["off_ms"].as_f64().unwrap_or_default();
    let reason = event["reason"].as_str().unwrap_or_default();
    match event["action"].as_str() {
        Some("set") => format!("the host's clock was off by {off:+.1} ms and has been set"),
        Some("right") => format!("the host's clock is right ({off:+.1} ms)"),
        Some("left") => format!("the host's clock is off by {off:+.1} ms and has been left so: {reason}"),
        _ => format!("the host's clock has been left as it is: {reason}"),
    }
}

#[cfg(test)]
mod tests {
    use kho_abi::document::timeline::TimelineV3;

    use super::*;

    const THEN: ClockV1 = ClockV1 { counter: 1_000_000, realtime_ns: 1_700_000_000 * SECOND };

    #[test]
    fn time_goes_on_by_what_the_counter_has_counted() {
        assert_eq!(expected_ns(Some(THEN), 2_000_000, 1_000_001), Ok(THEN.realtime_ns + 500));
        assert_eq!(expected_ns(Some(THEN), 1_000_000_000, 1_000_000 + 7 * SECOND), Ok(THEN.realtime_ns + 7 * SECOND));
    }

    #[test]
    fn what_cannot_be_a_time_is_none() {
        assert_eq!(expected_ns(None, 1, 1), Err(Unset::NotHandedOver));
        assert_eq!(expected_ns(Some(THEN), 0, 1_000_001), Err(Unset::NoFrequency));
        assert_eq!(expected_ns(Some(THEN), 1, 999_999), Err(Unset::Behind));
        for realtime_ns in [THEN.realtime_ns, u64::MAX, i64::MAX.cast_unsigned()] {
            assert_eq!(expected_ns(Some(ClockV1 { realtime_ns, ..THEN }), 1, u64::MAX), Err(Unset::NoTime));
        }
    }

    #[test]
    fn a_clock_that_is_right_or_not_to_be_set_is_left_alone() {
        let frequency = crate::arch::counter_frequency();
        let (counter, realtime_ns) = clock::read(ClockId::Realtime);
        let index = |ahead: u64| IndexV2 {
            clock: Some(ClockV1 { counter, realtime_ns: realtime_ns + ahead }),
            timeline: TimelineV3::new(frequency),
            ..IndexV2::default()
        };
        let right = settle(&index(0), true);
        assert_eq!(right["action"], "right", "{right}");
        let left = settle(&index(60 * SECOND), false);
        assert_eq!((&left["action"], &left["reason"]), (&json!("left"), &json!("--no-set-clock was given")), "{left}");
        assert!(left["off_ms"].as_f64().is_some_and(|off| (-60_010.0..-59_990.0).contains(&off)), "{left}");
        assert!(words(&left).contains("off by -"), "{}", words(&left));
        let unknown = settle(&IndexV2::default(), true);
        assert_eq!((&unknown["action"], &unknown["off_ms"]), (&json!("unknown"), &Value::Null), "{unknown}");
    }
}
