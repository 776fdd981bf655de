//! A guest's serial log, read while it grows: signs of life, gaps between them, damage, pauses.
use crate::moment::Moment;
use anyhow::{Context, Result};
use guest_kernel::protocol::{Details, Line, Speaker};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::PathBuf;

/// What one of the loads inside a guest has said so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// How many signs of life there were.
    pub beats: u64,
    /// How long it made no progress, in milliseconds each time.
    pub pauses: Vec<u64>,
    /// The last sign of life.
    pub last: String,
    /// What the clocks were, where it is that which the load tells.
    pub moments: Vec<Moment>,
}

/// The clocks in a sign of life.
fn moment(details: Details<'_>) -> Option<Moment> {
    Some(Moment {
        counter: details.number("counter")?,
        width: details.number("width")?,
        realtime: details.number("realtime")?,
        monotonic: details.number("monotonic")?,
        boottime: details.number("boottime")?,
    })
}

impl Load {
    /// A number of the last sign of life.
    pub fn number(&self, key: &str) -> Option<u64> {
        number(&self.last, key)
    }
}

/// A number of a sign of life.
fn number(line: &str, key: &str) -> Option<u64> {
    match Line::parse(line)? {
        Line::Beat { details, .. } => details.number(key),
        _ => None,
    }
}

/// What a guest has said so far.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    position: u64,
    unfinished: Vec<u8>,
    next: Option<u64>,
    /// Whether the guest has said that it is up.
    pub started: bool,
    /// How many signs of life there were.
    pub beats: u64,
    /// The last sign of life.
    pub last: String,
    /// What was wrong, as the guest put it; a missing or repeated sign of life is damage too.
    pub damage: Vec<String>,
    /// How long the guest saw itself not running, in milliseconds each time.
    pub pauses: Vec<u64>,
    /// What the guest said when it ended itself.
    pub end: Option<String>,
    /// What the loads in it have said, by their names.
    pub loads: BTreeMap<String, Load>,
}

impl Log {
    /// A log that need not exist yet.
    pub fn new(path: PathBuf) -> Self {
        Self {
            path,
            position: 0,
            unfinished: Vec::new(),
            next: None,
            started: false,
            beats: 0,
            last: String::new(),
            damage: Vec::new(),
            pauses: Vec::new(),
            end: None,
            loads: BTreeMap::new(),
        }
    }

    /// Takes in what was added since the last call.
    pub fn read_on(&mut self) -> Result<()> {
        let file = match File::open(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            file => file,
        };
        let mut file = file.with_context(|| format!("cannot open {}", self.path.display()))?;
        let mut read = || {
            file.seek(SeekFrom::Start(self.position))?;
            file.read_to_end(&mut self.unfinished)
        };
        let added = read().with_context(|| format!("cannot read {}", self.path.display()))?;
        self.position += added as u64;
        let Some(end) = self.unfinished.iter().rposition(|&byte| byte == b'\n') else { return Ok(()) };
        let lines: Vec<u8> = self.unfinished.drain(..=end).collect();
        for line in String::from_utf8_lossy(&lines).lines() {
            self.take(line);
        }
        Ok(())
    }

    fn take(&mut self, text: &str) {
        match Line::parse(text) {
            None => {}
            Some(Line::Start { speaker: Speaker::Load, details }) => {
                let of = details.value("of").unwrap_or_default();
                if self.loads.insert(of.to_owned(), Load::default()).is_some() {
                    self.damage.push(format!("a load started again: {text}"));
                }
            }
            Some(Line::Beat { n, speaker: Speaker::Load, details }) => {
                let load = Self::load(&mut self.loads, details);
                load.beats += 1;
                load.last = text.trim_end().to_owned();
                load.moments.extend(moment(details));
                if load.beats != n {
                    self.damage.push(format!("the load should have said line {}, but said: {text}", load.beats));
                    load.beats = n;
                }
            }
            Some(Line::Pause { ms, speaker: Speaker::Load, details, .. }) => {
                Self::load(&mut self.loads, details).pauses.push(ms);
            }
            Some(Line::Start { .. }) if self.started => self.damage.push(format!("the guest started again: {text}")),
            Some(Line::Start { .. }) => self.started = true,
            Some(Line::Beat { n, speaker, .. }) => {
                if let Some(expected) = self.next.filter(|expected| *expected != n) {
                    self.damage.push(format!("{speaker} should have said line {expected}, but said: {text}"));
                }
                self.next = Some(n + 1);
                self.beats += 1;
                self.last = text.trim_end().to_owned();
            }
            Some(Line::Pause { ms, .. }) => self.pauses.push(ms),
            Some(Line::End { details, .. }) => self.end = Some(details.text().to_owned()),
            Some(Line::Damage { .. }) => self.damage.push(text.to_owned()),
            Some(Line::Malformed { .. }) => self.damage.push(format!("not a whole line: {text}")),
        }
    }
}

impl Log {
    /// A number of the last sign of life.
    pub fn number(&self, key: &str) -> Option<u64> {
        number(&self.last, key)
    }

    fn load<'a>(loads: &'a mut BTreeMap<String, Load>, details: Details<'_>) -> &'a mut Load {
        loads.entry(details.value("of").unwrap_or_default().to_owned()).or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn read(parts: &[&str]) -> Log {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("guest.log");
        let mut log = Log::new(path.clone());
        log.read_on().expect("no file yet is no error");
        let mut file = File::create(path).expect("a log");
        for part in parts {
            file.write_all(part.as_bytes()).expect("a line");
            log.read_on().expect("the log");
        }
        log
    }

    #[test]
    fn signs_of_life_are_counted_across_torn_writes() {
        let log = read(&["booting\nLINUX start x=1\nLINUX li", "ne n=1 a=2\nLINUX line n=2\n", "LINUX line n=3"]);
        assert_eq!((log.beats, log.started, log.damage.len()), (2, true, 0));
    }

    #[test]
    fn gaps_repetitions_and_second_starts_are_damage() {
        for text in [
            "ORACLE line n=1\nORACLE line n=3\n",
            "ORACLE line n=1\nORACLE line n=1\n",
            "LINUX start a=1\nLINUX start a=1\n",
        ] {
            assert_eq!(read(&[text]).damage.len(), 1, "{text}");
        }
    }

    #[test]
    fn what_the_guest_reports_is_kept() {
        let log = read(&["DAMAGE ram at=0x1\nORACLE pause n=1 ms=250\nORACLE end lines=3 how=reset\n"]);
        assert_eq!(log.damage, ["DAMAGE ram at=0x1"]);
        assert_eq!(log.pauses, [250]);
        assert_eq!(log.end.as_deref(), Some("lines=3 how=reset"));
    }

    #[test]
    fn loads_are_counted_each_by_itself() {
        let log = read(&[
            "LOAD start of=a x=1\nLOAD line n=1 of=a told=5\nLINUX line n=7\nLOAD start of=b\nLOAD line n=1 of=b\n",
            "LOAD pause n=1 of=b ms=900\nLOAD line n=2 of=a told=9\n",
        ]);
        assert_eq!(log.damage, [""; 0]);
        assert_eq!((log.beats, log.loads["a"].beats, log.loads["b"].beats), (1, 2, 1));
        assert_eq!(log.loads["a"].number("told"), Some(9));
        assert_eq!(log.loads["b"].pauses, [900]);
        assert!(log.pauses.is_empty() && !log.started);
    }

    #[test]
    fn a_load_that_starts_again_or_leaves_out_a_line_is_damage() {
        assert_eq!(read(&["LOAD start of=a\nLOAD start of=a\n"]).damage.len(), 1);
        assert_eq!(read(&["LOAD start of=a\nLOAD line n=2 of=a\nLOAD line n=3 of=a\n"]).damage.len(), 1);
    }
}
