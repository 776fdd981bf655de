//! What the operator sees: phases as they happen, tables, timelines; or the same as JSON for programs.

use std::io::{self, IsTerminal, Write};
use std::time::Instant;

use kho_abi::document::timeline::{Phase, TimelineV3};
use serde_json::{Map, Value, json};

/// Takes back what is on a terminal's current line.
const CLEAR: &str = "\r\x1b[K";

/// Writes a line to the standard output stream. Nobody listening is no reason to stop what is reported on.
fn put(line: &str) {
    let mut stdout = io::stdout().lock();
    if let Err(error) = writeln!(stdout, "{line}").and_then(|()| stdout.flush()) {
        tracing::debug!(%error, "nobody reads the standard output stream");
    }
}

/// The running report of one verb.
#[derive(Debug)]
pub struct Report {
    json: bool,
    terminal: bool,
    /// On a terminal, whether a line says what is being done right now.
    pending: bool,
    started: Instant,
    held: Option<Vec<String>>,
}

impl Report {
    /// A report that begins now.
    pub fn new(json: bool) -> Self {
        let terminal = !json && io::stdout().is_terminal();
        Self { json, terminal, pending: false, started: Instant::now(), held: None }
    }

    /// Milliseconds since it began.
    pub fn elapsed_ms(&self) -> f64 {
        milliseconds(self.started.elapsed().as_secs_f64() * 1000.0)
    }

    /// Keeps all lines back until [`release`](Self::release): while guests are paused, nothing may wait for a reader,
    /// who may be slow or stuck.
    pub fn hold(&mut self) {
        self.held.get_or_insert_default();
    }

    /// Writes what was kept back.
    pub fn release(&mut self) {
        for line in self.held.take().unwrap_or_default() {
            self.line(line);
        }
    }

    fn line(&mut self, line: String) {
        match &mut self.held {
            Some(held) => held.push(line),
            None => {
                let lead = if std::mem::take(&mut self.pending) { CLEAR } else { "" };
                put(&format!("{lead}{line}"));
            }
        }
    }

    /// Says on a terminal what is being done, until the next line takes its place.
    pub fn doing(&mut self, text: &str) {
        if self.terminal && self.held.is_none() {
            let lead = if self.pending { CLEAR } else { "" };
            let mut stdout = io::stdout().lock();
            self.pending = write!(stdout, "{lead}            … {text}").and_then(|()| stdout.flush()).is_ok();
        }
    }

    /// A phase was reached.
    pub fn phase(&mut self, phase: Phase, counter: u64, text: &str) {
        let ms = self.elapsed_ms();
        self.line(if self.json {
            json!({"event": "phase", "phase": phase.name(), "ms": ms, "counter": counter}).to_string()
        } else {
            format!("{ms:>9.1} ms  {text}")
        });
    }

    /// Something that is no phase: for programs the event, for people the text.
    pub fn event(&mut self, event: Value, text: &str) {
        let ms = self.elapsed_ms();
        self.line(if self.json { event.to_string() } else { format!("{ms:>9.1} ms  {text}") });
    }

    /// How it ended: for programs the result, for people the text, which may have several lines or none.
    pub fn result(&mut self, result: Value, text: &str) {
        if self.json {
            self.line(result.to_string());
        } else {
            for line in text.lines() {
                self.line(line.to_owned());
            }
        }
        // What follows, if anything, is an error on the other stream: not behind a line about what was being done.
        if std::mem::take(&mut self.pending) {
            let mut stdout = io::stdout().lock();
            drop(write!(stdout, "{CLEAR}").and_then(|()| stdout.flush()));
        }
    }
}

/// Prints JSON as a verb's whole output.
pub fn print_json(value: &Value) {
    put(&value.to_string());
}

/// Prints text as a verb's whole output.
pub fn print(text: &str) {
    put(text.trim_end());
}

/// Microseconds are as precise as any of these measurements are.
fn milliseconds(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// A timeline for programs: `phases` (name to milliseconds since the phase before), `marks`, `counter_hz`, `blackout_ms`.
pub fn timeline_fields(timeline: Option<&TimelineV3>) -> Map<String, Value> {
    let phases: Map<String, Value> = timeline
        .map(TimelineV3::phases)
        .unwrap_or_default()
        .into_iter()
        .map(|(phase, ms)| (phase.name().to_owned(), json!(milliseconds(ms))))
        .collect();
    let marks: Vec<Value> = timeline
        .map(|timeline| timeline.marks.iter().map(|(phase, counter)| json!([phase.name(), counter])).collect())
        .unwrap_or_default();
    let mut fields = Map::new();
    fields.insert("phases".to_owned(), phases.into());
    fields.insert("marks".to_owned(), marks.into());
    fields.insert("counter_hz".to_owned(), json!(timeline.map(|timeline| timeline.frequency_hz)));
    fields.insert("blackout_ms".to_owned(), json!(timeline.and_then(TimelineV3::blackout_ms).map(milliseconds)));
    fields
}

/// `base` with the fields of `more`.
pub fn with_fields(base: Value, more: Map<String, Value>) -> Value {
    match base {
        Value::Object(mut fields) => {
            fields.extend(more);
            Value::Object(fields)
        }
        other => other,
    }
}

/// A timeline for people: a line per phase, and the blackout.
pub fn timeline_text(timeline: &TimelineV3) -> String {
    let mut text = String::new();
    for (phase, ms) in timeline.phases() {
        text.push_str(&format!("  {:<18} {ms:>10.1} ms\n", phase.name()));
    }
    if let Some(blackout) = timeline.blackout_ms() {
        text.push_str(&format!("  {:<18} {blackout:>10.1} ms  (pause asked to first instruction)\n", "blackout"));
    }
    text
}

/// A table for people: columns as wide as they need.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width = |column| rows.iter().filter_map(|row| row.get(column)).map(|cell: &String| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or_default()).collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// Bytes for people.
pub fn bytes(count: u64) -> String {
    match count {
        _ if count >= 1 << 30 && count.is_multiple_of(1 << 28) => format!("{} GiB", count as f64 / f64::from(1 << 30)),
        _ if count >= 1 << 20 => format!("{} MiB", count >> 20),
        _ if count >= 1 << 10 => format!("{} KiB", count >> 10),
        _ => format!("{count} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeline_is_told_with_every_phase_and_the_blackout() {
        let mut timeline = TimelineV3::new(1_000_000);
        timeline.mark(Phase::PauseAsked, 1_000);
        timeline.mark(Phase::VcpusStopped, 1_500);
        timeline.mark(Phase::FirstInstruction, 3_001_000);
        let fields = timeline_fields(Some(&timeline));
        assert_eq!(fields["blackout_ms"], json!(3000.0));
        assert_eq!(fields["phases"]["vcpus-stopped"], json!(0.5));
        assert_eq!(fields["marks"][0], json!(["pause-asked", 1000]));
        assert!(timeline_text(&timeline).contains("blackout"));
        assert_eq!(timeline_fields(None)["blackout_ms"], Value::Null);
    }

    #[test]
    fn table_aligns_its_columns() {
        let rows = [vec!["NAME".to_owned(), "STATE".to_owned()], vec!["oracle".to_owned(), "running".to_owned()]];
        assert_eq!(table(&rows), "NAME    STATE\noracle  running\n");
    }

    #[test]
    fn sizes_are_told_without_loss_of_meaning() {
        for (count, text) in
            [(0, "0 bytes"), (2048, "2 KiB"), (64 << 20, "64 MiB"), (1 << 30, "1 GiB"), (7 << 29, "3.5 GiB")]
        {
            assert_eq!(bytes(count), text);
        }
    }
}
