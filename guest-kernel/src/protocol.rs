//! The protocol on the guest's serial port: one event per line. [`Report`] writes a line, [`Line`] reads one, and this file
//! is the only place that knows what it looks like.
//!
//! ```text
//! ORACLE start version=1 …                                     the checks begin
//! ORACLE line n=7 ticks=350 passes=3 sum=0x1f… clock_ms=7003    once per second of guest time, `n` without a gap
//! ORACLE pause n=1 ms=5210 told=1                              the guest did not run for that long
//! ORACLE end lines=20 how=poweroff                             the guest ends itself, as it was told to
//! DAMAGE msr name=lstar expected=0x… found=0x…                 something is not as it was left
//! ```
//!
//! With more than one CPU a line has `cpus=` and `ipis=` besides, and damage says by `vcpu=N` which CPU has found it.
//!
//! A Linux guest's init speaks the same shape, with `LINUX` for `ORACLE`. So do the loads inside such a guest, with `LOAD`; their
//! lines have `of=NAME` besides, and each load counts its own lines and pauses.

use core::fmt;

/// The version that `ORACLE start` carries.
pub const VERSION: u32 = 1;
/// How every line about damage begins.
pub const DAMAGE: &str = "DAMAGE";

const ORACLE: &str = "ORACLE";
const LINUX: &str = "LINUX";
const LOAD: &str = "LOAD";
const START: &str = "start";
const LINE: &str = "line";
const PAUSE: &str = "pause";
const END: &str = "end";

/// Which guest says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Speaker {
    /// This kernel.
    Oracle,
    /// The init of a Linux guest.
    Linux,
    /// A load inside a Linux guest; `of` says which.
    Load,
}

impl Speaker {
    /// The word that begins this speaker's lines.
    pub const fn name(self) -> &'static str {
        match self {
            Speaker::Oracle => ORACLE,
            Speaker::Linux => LINUX,
            Speaker::Load => LOAD,
        }
    }
}

impl fmt::Display for Speaker {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// A line to write; `Display` gives it without the line break.
#[derive(Debug, Clone, Copy)]
pub enum Report<'a> {
    /// The checks begin; the details say what is there to be checked.
    Start {
        /// `key=value` pairs.
        details: fmt::Arguments<'a>,
    },
    /// The sign of life, once per second of guest time.
    Beat {
        /// 0, 1, 2 … without a gap.
        n: u64,
        /// Timer ticks since the start.
        ticks: u64,
        /// Completed passes over RAM.
        passes: u64,
        /// The running checksum over RAM.
        sum: u64,
        /// Guest time since the start: by kvmclock where there is one, else by the counter.
        clock_ms: u64,
        /// What there is to say where there is more than one CPU.
        processors: Option<Processors>,
    },
    /// The guest saw that it had not run for a while.
    Pause {
        /// 1, 2, 3 … without a gap.
        n: u64,
        /// For how long, by the counter.
        ms: u64,
        /// Whether the host said so too (kvmclock's guest-stopped flag).
        told: bool,
    },
    /// The guest ends itself.
    End {
        /// How many beats it has reported.
        lines: u64,
        /// What it is about to do.
        how: &'a str,
    },
    /// Something is not as it was left.
    Damage {
        /// One word for what it is.
        what: &'a str,
        /// `key=value` pairs.
        details: fmt::Arguments<'a>,
        /// Which CPU has found it, where there is more than one.
        vcpu: Option<usize>,
    },
}

/// What a sign of life says of all CPUs together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Processors {
    /// How many are in use.
    pub cpus: usize,
    /// Interrupts from one to another that have arrived since the start.
    pub ipis: u64,
    /// How often one was switched on again, where that is asked for.
    pub cycles: Option<u64>,
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Report::Start { details } => write!(formatter, "{ORACLE} {START} version={VERSION} {details}"),
            Report::Beat { n, ticks, passes, sum, clock_ms, processors } => {
                write!(
                    formatter,
                    "{ORACLE} {LINE} n={n} ticks={ticks} passes={passes} sum={sum:#018x} clock_ms={clock_ms}"
                )?;
                let Some(Processors { cpus, ipis, cycles }) = processors else { return Ok(()) };
                write!(formatter, " cpus={cpus} ipis={ipis}")?;
                cycles.map_or(Ok(()), |cycles| write!(formatter, " cycles={cycles}"))
            }
            Report::Pause { n, ms, told } => {
                write!(formatter, "{ORACLE} {PAUSE} n={n} ms={ms} told={}", u8::from(*told))
            }
            Report::End { lines, how } => write!(formatter, "{ORACLE} {END} lines={lines} how={how}"),
            Report::Damage { what, details, vcpu } => {
                write!(formatter, "{DAMAGE} {what} {details}")?;
                vcpu.map_or(Ok(()), |vcpu| write!(formatter, " vcpu={vcpu}"))
            }
        }
    }
}

/// A line that was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Line<'a> {
    /// The guest's checks begin.
    Start {
        /// Who says so.
        speaker: Speaker,
        /// All pairs of the line.
        details: Details<'a>,
    },
    /// The sign of life.
    Beat {
        /// Who says so.
        speaker: Speaker,
        /// Its number, without a gap.
        n: u64,
        /// All pairs of the line.
        details: Details<'a>,
    },
    /// The guest had not run for a while.
    Pause {
        /// Who says so.
        speaker: Speaker,
        /// Its number, without a gap.
        n: u64,
        /// How long, as the guest saw it.
        ms: u64,
        /// All pairs of the line.
        details: Details<'a>,
    },
    /// The guest ends itself.
    End {
        /// Who says so.
        speaker: Speaker,
        /// All pairs of the line.
        details: Details<'a>,
    },
    /// Something was not as the guest had left it.
    Damage {
        /// One word for what it is; empty if the line was cut.
        what: &'a str,
        /// The rest of the line.
        details: Details<'a>,
    },
    /// It begins like a line of the protocol and is none: bytes were lost on the way, which is damage too.
    Malformed {
        /// The whole line.
        text: &'a str,
    },
}

impl<'a> Line<'a> {
    /// Reads one line, with or without its line break. None if it is not of this protocol (a boot loader's or a kernel's message).
    pub fn parse(text: &'a str) -> Option<Self> {
        let text = text.trim_end_matches(['\r', '\n']);
        let (word, rest) = split_word(text);
        let speaker = match word {
            ORACLE => Speaker::Oracle,
            LINUX => Speaker::Linux,
            LOAD => Speaker::Load,
            DAMAGE => {
                let (what, details) = split_word(rest);
                return Some(Line::Damage { what, details: Details(details) });
            }
            _ => return None,
        };
        let (kind, rest) = split_word(rest);
        let details = Details(rest);
        let line = match kind {
            START => Some(Line::Start { speaker, details }),
            LINE => details.number("n").map(|n| Line::Beat { speaker, n, details }),
            PAUSE => {
                details.number("n").zip(details.number("ms")).map(|(n, ms)| Line::Pause { speaker, n, ms, details })
            }
            END => Some(Line::End { speaker, details }),
            _ => None,
        };
        Some(line.unwrap_or(Line::Malformed { text }))
    }

    /// Whether this line means that something was lost or changed.
    pub fn is_damage(&self) -> bool {
        matches!(self, Line::Damage { .. } | Line::Malformed { .. })
    }
}

/// The `key=value` pairs of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Details<'a>(&'a str);

impl<'a> Details<'a> {
    /// The value of the first pair with this key.
    pub fn value(&self, key: &str) -> Option<&'a str> {
        self.0
            .split_ascii_whitespace()
            .filter_map(|pair| pair.split_once('='))
            .find_map(|(name, value)| (name == key).then_some(value))
    }

    /// The value as a number: decimal, or hexadecimal after `0x`.
    pub fn number(&self, key: &str) -> Option<u64> {
        number(self.value(key)?)
    }

    /// As it stood in the line.
    pub fn text(&self) -> &'a str {
        self.0
    }
}

/// Decimal, or hexadecimal after `0x`. Stricter than `from_str_radix`, which takes a sign.
pub(crate) fn number(text: &str) -> Option<u64> {
    let (digits, radix) = text.strip_prefix("0x").map_or((text, 10), |digits| (digits, 16));
    if digits.starts_with('+') {
        return None;
    }
    u64::from_str_radix(digits, radix).ok()
}

fn split_word(text: &str) -> (&str, &str) {
    text.split_once(' ').unwrap_or((text, ""))
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::string::ToString;

    #[test]
    fn beat_reads_back_as_written() {
        let beat = |processors| Report::Beat { n: 7, ticks: 350, passes: 3, sum: 0xabc, clock_ms: 7003, processors };
        let text = beat(None).to_string();
        let Some(Line::Beat { speaker: Speaker::Oracle, n: 7, details }) = Line::parse(&text) else { panic!("{text}") };
        assert_eq!(details.number("ticks"), Some(350));
        assert_eq!(details.number("passes"), Some(3));
        assert_eq!(details.number("sum"), Some(0xabc));
        assert_eq!(details.number("clock_ms"), Some(7003));
        assert_eq!(details.number("cpus"), None);
        for cycles in [None, Some(5)] {
            let text = beat(Some(Processors { cpus: 4, ipis: 800, cycles })).to_string();
            let Some(Line::Beat { n: 7, details, .. }) = Line::parse(&text) else { panic!("{text}") };
            let found = ["cpus", "ipis", "cycles"].map(|key| details.number(key));
            assert_eq!(found, [Some(4), Some(800), cycles], "{text}");
        }
    }

    #[test]
    fn start_pause_and_end_read_back_as_written() {
        let start = Report::Start { details: format_args!("arch=x86_64 memory_mib=256") }.to_string();
        let Some(Line::Start { details, .. }) = Line::parse(&start) else { panic!("{start}") };
        assert_eq!((details.number("version"), details.value("arch")), (Some(1), Some("x86_64")));
        let pause = Report::Pause { n: 2, ms: 5210, told: true }.to_string();
        assert!(matches!(Line::parse(&pause), Some(Line::Pause { n: 2, ms: 5210, .. })), "{pause}");
        let end = Report::End { lines: 20, how: "reset" }.to_string();
        let Some(Line::End { details, .. }) = Line::parse(&end) else { panic!("{end}") };
        assert_eq!((details.number("lines"), details.value("how")), (Some(20), Some("reset")));
    }

    #[test]
    fn damage_keeps_its_detail() {
        let damage = |vcpu| {
            Report::Damage { what: "msr", details: format_args!("name=lstar expected=0x1 found=0x2"), vcpu }.to_string()
        };
        let text = damage(None);
        let line = Line::parse(&text).unwrap();
        assert!(line.is_damage());
        let Line::Damage { what: "msr", details } = line else { panic!("{text}") };
        assert_eq!((details.value("name"), details.number("found")), (Some("lstar"), Some(2)));
        assert_eq!(details.text(), "name=lstar expected=0x1 found=0x2");
        let text = damage(Some(3));
        let Some(Line::Damage { details, .. }) = Line::parse(&text) else { panic!("{text}") };
        assert_eq!(details.number("vcpu"), Some(3));
    }

    #[test]
    fn linux_speaks_the_same_shape() {
        let line = Line::parse("LINUX line n=12 uptime_ms=12044\r\n").unwrap();
        assert!(matches!(line, Line::Beat { speaker: Speaker::Linux, n: 12, .. }));
        assert!(!line.is_damage());
    }

    #[test]
    fn other_text_is_not_of_the_protocol() {
        for text in
            ["", "Linux version 7.3", "[    0.1] ORACLE line n=1", "ORACLES line n=1", "oracle line n=1", "DAMAGED x"]
        {
            assert_eq!(Line::parse(text), None, "{text}");
        }
    }

    #[test]
    fn lines_with_lost_bytes_are_damage() {
        for text in
            ["ORACLE line n=", "ORACLE lin", "ORACLE", "ORACLE line ticks=4", "LINUX pause n=1", "ORACLE line n=+4"]
        {
            assert!(matches!(Line::parse(text), Some(Line::Malformed { .. })), "{text}");
        }
        assert!(Line::parse("DAMAGE").unwrap().is_damage());
    }
}
