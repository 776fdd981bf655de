//! The demo's result, for machines (JSON) and for people (a timeline per VM).
use crate::architecture::Architecture;
use crate::phases::{BLACKOUT_BEGINS, PHASES};
use anyhow::{Context, Result};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;

/// Width of the longest bar.
const WIDTH: f64 = 40.0;

/// Passed or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Results {
    /// Every guest came through every update unharmed.
    Pass,
    /// Not so.
    Fail,
}

/// The whole result.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Passed or not.
    pub result: Results,
    /// Architecture of the host.
    pub arch: &'static str,
    /// The updates in their order.
    pub updates: Vec<UpdateReport>,
}

/// One live update.
#[derive(Clone, Debug, Serialize)]
pub struct UpdateReport {
    /// Release of the kernel before.
    pub from: String,
    /// Release of the kernel after.
    pub to: String,
    /// How many updates the VMs have come through.
    pub generation: u64,
    /// The longest blackout of its guests.
    pub blackout_ms: f64,
    /// The same kexec to the same init without VMs.
    pub bare_kexec_ms: f64,
    /// The guests.
    pub guests: Vec<GuestReport>,
}

/// One guest in it.
#[derive(Clone, Debug, Serialize)]
pub struct GuestReport {
    /// The VM's name.
    pub name: String,
    /// `oracle` or `linux`.
    pub kind: &'static str,
    /// What it found wrong so far.
    pub damage: Vec<String>,
    /// From the request to pause to its first instruction under the new kernel.
    pub blackout_ms: f64,
    /// Size of its document.
    pub document_bytes: u64,
    /// Milliseconds per phase.
    pub phases: BTreeMap<String, f64>,
}

impl Report {
    /// Nothing has happened yet.
    pub fn new(architecture: Architecture) -> Self {
        Self { result: Results::Fail, arch: architecture.name(), updates: Vec::new() }
    }

    /// As the `--json` option writes it.
    pub fn to_json(&self) -> Result<String> {
        let mut text = serde_json::to_string_pretty(self).context("cannot encode the result")?;
        text.push('\n');
        Ok(text)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.updates.iter().try_for_each(|update| writeln!(f, "{update}"))
    }
}

impl fmt::Display for UpdateReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { from, to, generation, blackout_ms, bare_kexec_ms, guests } = self;
        writeln!(
            f,
            "Linux {from} -> {to}, generation {generation}: blackout {blackout_ms:.0} ms, bare kexec {bare_kexec_ms:.0} ms"
        )?;
        guests.iter().try_for_each(|guest| write!(f, "{guest}"))
    }
}

impl fmt::Display for GuestReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, kind, damage, blackout_ms, document_bytes, phases } = self;
        writeln!(
            f,
            "  {name} ({kind}): blackout {blackout_ms:.0} ms, document {document_bytes} bytes, damage: {}",
            match damage.len() {
                0 => "none".into(),
                count => format!("{count}, first: {}", damage[0]),
            }
        )?;
        let longest = phases.values().copied().fold(1.0, f64::max);
        let mut dark = false;
        for phase in PHASES {
            dark |= *phase == BLACKOUT_BEGINS;
            let Some(milliseconds) = phases.get(*phase) else { continue };
            // A phase too short for a bar still gets a mark.
            let bar = (if dark { "#" } else { "=" }).repeat((milliseconds / longest * WIDTH).round().max(1.0) as usize);
            writeln!(f, "    {phase:<18}{milliseconds:>10.1} ms  {bar}")?;
        }
        writeln!(f, "    (= the guest runs, # it stands still)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_result_has_exactly_the_promised_fields() {
        let report = Report {
            result: Results::Pass,
            arch: "x86_64",
            updates: vec![UpdateReport {
                from: "7.2".into(),
                to: "7.3".into(),
                generation: 1,
                blackout_ms: 2.5,
                bare_kexec_ms: 2.0,
                guests: vec![GuestReport {
                    name: "a".into(),
                    kind: "oracle",
                    damage: vec![],
                    blackout_ms: 2.5,
                    document_bytes: 9,
                    phases: [("prepared".to_owned(), 1.0)].into(),
                }],
            }],
        };
        let expected = serde_json::json!({"result": "pass", "arch": "x86_64", "updates": [{
            "from": "7.2", "to": "7.3", "generation": 1, "blackout_ms": 2.5, "bare_kexec_ms": 2.0,
            "guests": [{"name": "a", "kind": "oracle", "damage": [], "blackout_ms": 2.5, "document_bytes": 9,
                        "phases": {"prepared": 1.0}}]}]});
        let written: serde_json::Value =
            serde_json::from_str(&report.to_json().expect("it can be encoded")).expect("it is JSON");
        assert_eq!(written, expected);
    }
}
