//! The verbs about VMs that run: list, status, pause, resume, stop, balloon.

use std::time::{Duration, Instant};

use anyhow::bail;
use serde_json::{Map, Value, json};

use super::kept::KeptVm;
use super::report;
use crate::cli::status;
use crate::control::balloon::BalloonStatus;
use crate::control::client::{Client, ClientError};
use crate::control::interface::MachineStatus;
use crate::control::keeper::KeeperClient;
use crate::control::socket::RunDir;

/// How long a VM has to answer. It answers at once unless it is being frozen, or in trouble.
const PATIENCE: Duration = Duration::from_secs(10);

fn base_fields(vm: &MachineStatus) -> Value {
    json!({
        "name": vm.name,
        "state": vm.state.name(),
        "pid": vm.pid,
        "memory": vm.memory,
        "cpus": vm.cpus,
        "generation": vm.generation,
    })
}

fn kept_fields(vm: &KeptVm) -> Value {
    json!({
        "name": vm.name,
        "state": "kept",
        "pid": vm.pid,
        "memory": vm.memory,
        "cpus": Value::Null,
        "generation": vm.generation,
        "reason": vm.reason,
        "attempts": vm.attempts,
    })
}

/// `vmm list`.
pub fn list(dir: &RunDir, json: bool) -> anyhow::Result<u8> {
    let mut rows = vec![["NAME", "STATE", "PID", "MEMORY", "CPUS", "GENERATION", ""].map(str::to_owned).to_vec()];
    let mut values = Vec::new();
    let mut silent = Vec::new();
    for name in dir.names("sock") {
        match Client::connect(dir, &name, PATIENCE).and_then(|mut client| client.status()) {
            Ok(vm) => {
                values.push(base_fields(&vm));
                let (pid, cpus, generation) = (vm.pid.to_string(), vm.cpus.to_string(), vm.generation.to_string());
                rows.push(vec![vm.name, vm.state.name().into(), pid, report::bytes(vm.memory), cpus, generation]);
            }
            // The socket of a process that is gone, or just going.
            Err(error) if error.is_gone() => {}
            Err(error) => silent.push((name, error)),
        }
    }
    for vm in KeptVm::all(dir) {
        values.push(kept_fields(&vm));
        let (pid, generation) = (vm.pid.to_string(), vm.generation.to_string());
        rows.push(vec![vm.name, "kept".into(), pid, report::bytes(vm.memory), "-".into(), generation, vm.reason]);
    }
    if json {
        report::print_json(&Value::Array(values));
    } else {
        report::print(&report::table(&rows));
    }
    if silent.is_empty() {
        return Ok(status::DONE);
    }
    let names: Vec<&str> = silent.iter().map(|(name, _)| name.as_str()).collect();
    let names = names.join(", ");
    match silent.pop() {
        Some((_, error)) => Err(anyhow::Error::from(error).context(format!("no answer from {names}"))),
        None => Ok(status::DONE),
    }
}

/// `vmm status`.
pub fn status(dir: &RunDir, name: &str, json: bool) -> anyhow::Result<u8> {
    let asked = Client::connect(dir, name, PATIENCE).and_then(|mut client| Ok((client.status()?, client.balloon()?)));
    let (vm, balloon) = match asked {
        Ok(told) => told,
        Err(error) => {
            let Some(kept) = KeptVm::read(dir, name).filter(|_| error.is_gone()) else { return Err(error.into()) };
            if json {
                report::print_json(&kept_fields(&kept));
            } else {
                report::print(&format!(
                    "{name}: not restored, its memory ({}) is kept by process {}\n  reason: {}\n  attempts: {}",
                    report::bytes(kept.memory),
                    kept.pid,
                    kept.reason,
                    kept.attempts
                ));
            }
            return Ok(status::DONE);
        }
    };
    let timeline = vm.timeline();
    if json {
        let base = report::with_fields(base_fields(&vm), report::timeline_fields(timeline.as_ref()));
        let more = [
            ("document_bytes", json!(vm.document_bytes)),
            ("serial_dropped_bytes", json!(vm.serial_dropped)),
            ("balloon", balloon.as_ref().map_or(Value::Null, balloon_fields)),
        ];
        let more = more.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        report::print_json(&report::with_fields(base, more));
    } else {
        let mut text = format!(
            "{name}: {}, process {}, {} of memory, {} vCPU(s), generation {}\n",
            vm.state.name(),
            vm.pid,
            report::bytes(vm.memory),
            vm.cpus,
            vm.generation
        );
        if let Some(balloon) = balloon {
            text.push_str(&balloon_text(&balloon));
        }
        if let Some(dropped) = vm.serial_dropped.filter(|&dropped| dropped > 0) {
            text.push_str(&format!("serial port: {dropped} bytes of output were dropped, as nobody read them\n"));
        }
        if let Some(timeline) = timeline.filter(|timeline| !timeline.marks.is_empty()) {
            text.push_str(&format!("last live update, a document of {}:\n", report::bytes(vm.document_bytes)));
            text.push_str(&report::timeline_text(&timeline));
        }
        report::print(&text);
    }
    Ok(status::DONE)
}

fn balloon_fields(balloon: &BalloonStatus) -> Value {
    let BalloonStatus { target, actual, backed, statistics, statistics_age_ms } = balloon;
    let statistics: Map<_, _> = statistics.iter().map(|one| (one.name.clone(), json!(one.value))).collect();
    json!({
        "target": target,
        "actual": actual,
        "backed": backed,
        "statistics": statistics,
        "statistics_age_ms": statistics_age_ms,
    })
}

fn balloon_text(balloon: &BalloonStatus) -> String {
    let BalloonStatus { target, actual, backed, statistics, statistics_age_ms } = balloon;
    let [target, actual, backed] = [target, actual, backed].map(|bytes| report::bytes(*bytes));
    let mut text =
        format!("balloon: {actual} of {target} asked for; {backed} of the guest's memory are in use on the host\n");
    if let Some(age) = statistics_age_ms {
        let values: Vec<_> = statistics
            .iter()
            .map(|one| match one.name.strip_suffix("_bytes") {
                Some(name) => format!("{} {}", name.replace('_', " "), report::bytes(one.value)),
                None => format!("{} {}", one.name.replace('_', " "), one.value),
            })
            .collect();
        text.push_str(&format!("  the guest's memory, {:.1} s ago: {}\n", *age as f64 / 1e3, values.join(", ")));
    }
    text
}

/// `vmm balloon`.
pub fn balloon(dir: &RunDir, name: &str, bytes: u64) -> anyhow::Result<u8> {
    Client::connect(dir, name, PATIENCE)?.set_balloon(bytes)?;
    Ok(status::DONE)
}

/// `vmm pause`.
pub fn pause(dir: &RunDir, name: &str) -> anyhow::Result<u8> {
    Client::connect(dir, name, PATIENCE)?.pause()?;
    Ok(status::DONE)
}

/// `vmm resume`.
pub fn resume(dir: &RunDir, name: &str) -> anyhow::Result<u8> {
    Client::connect(dir, name, PATIENCE)?.resume()?;
    Ok(status::DONE)
}

/// `vmm discard`.
pub fn discard(dir: &RunDir, name: &str) -> anyhow::Result<u8> {
    KeeperClient::connect(dir)?.discard(name)?;
    Ok(status::DONE)
}

/// `vmm stop`: returns when the VM has ended.
pub fn stop(dir: &RunDir, name: &str) -> anyhow::Result<u8> {
    let connected = Client::connect(dir, name, PATIENCE);
    if let (Err(ClientError::NotThere { .. }), Some(kept)) = (&connected, KeptVm::read(dir, name)) {
        bail!(
            "VM {name} does not run: its memory is kept by process {}; `vmm discard {name}` gives it up for good",
            kept.pid
        );
    }
    let mut client = connected?;
    match client.stop() {
        // It may be quicker to end than to answer.
        Ok(()) | Err(ClientError::Closed { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    let deadline = Instant::now() + PATIENCE;
    while !client.watch().is_closed() {
        if Instant::now() >= deadline {
            bail!("VM {name} has been told to end and has not yet");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(status::DONE)
}
