//! `vmm restore --all`: brings back the VMs that the last kernel handed over.
//!
//! The work is done by a supervisor, a process of its own that holds what was handed over until the VMs run; the
//! command that the operator started only relays what it says. So nothing is lost with the operator's terminal. With
//! `--foreground`, for a service manager, the command is the supervisor.

mod allowance;
mod guardian;
mod keeper;
mod supervisor;
mod vm_process;
mod work;

use std::fs::OpenOptions;
use std::io::{self, BufRead, BufReader};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use kho_abi::document::timeline::Phase;
use rustix::io::FdFlags;
use serde_json::{Value, json};

use self::supervisor::Supervisor;
use super::kept::KeptVm;
use super::run::adopt_descriptor;
use super::signals::{self, Signals};
use super::{clock, report};
use crate::cli::{LogArgs, RestoreArgs, status};
use crate::control::client::Client;
use crate::control::keeper::{KeeperClient, KeeperClientError, KeeperError, RestoredMachine};
use crate::control::socket::RunDir;
use crate::handover::luo::IncomingSession;

/// The raw counter when init was reached, as init itself noted it.
const INIT_COUNTER: &str = "KHO_VMM_INIT_COUNTER";

/// How long whoever comes after a keeper that has ended may take: it may start a VM three times, each of which may take a minute.
const SUCCESSION: Duration = Duration::from_secs(300);
/// How long a VM has to say how it is.
const STATUS_PATIENCE: Duration = Duration::from_secs(10);
/// How often to look what has become of a VM whose keeper has ended.
const LOOK: Duration = Duration::from_millis(50);

/// What the supervisor said when it could not do its work.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct SupervisorError {
    message: String,
    help: Option<String>,
}

impl SupervisorError {
    /// What the operator can do about it.
    pub fn help(&self) -> Option<String> {
        self.help.clone()
    }
}

/// Carries out the verb, or the part of it that this process is for.
pub fn restore(dir: &RunDir, arguments: &RestoreArgs, log: LogArgs, started: u64) -> anyhow::Result<u8> {
    if let Some(name) = &arguments.name {
        return again(dir, name, arguments.json);
    }
    let init_reached = std::env::var(INIT_COUNTER).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(started);
    if !arguments.supervise && !arguments.foreground {
        return front(dir, arguments, log, init_reached);
    }
    if arguments.supervise {
        // Away from the operator's terminal and its signals.
        if let Err(error) = rustix::process::setsid() {
            tracing::debug!(%error, "this is a session of its own already");
        }
    }
    let signals = Signals::hold().context("cannot hold back signals")?;
    let session = arguments.index_session.map(adopt_descriptor).transpose()?;
    let session = session.map(|file| IncomingSession::adopt(file, kho_abi::names::INDEX_SESSION));
    let json = arguments.json || arguments.supervise;
    let relay = |event: &Value| show(event, json);
    let (detached, set_clock) = (arguments.supervise, !arguments.no_set_clock);
    let supervisor = Supervisor { dir, log, detached, init_reached, set_clock, relay: &relay };
    match supervisor.supervise(signals, session) {
        Ok(status) => Ok(status),
        Err(error) => {
            relay(&json!({
                "event": "result", "result": "failed", "error": format!("{error:#}"), "help": crate::help(&error),
                "vms": [],
            }));
            Err(error)
        }
    }
}

/// Tries again to restore a VM that is kept.
fn again(dir: &RunDir, name: &str, json: bool) -> anyhow::Result<u8> {
    match ask(dir, name) {
        Ok(Answer { attempts, blackout_ms }) => {
            if json {
                let result = json!({
                    "event": "result", "result": "restored", "name": name, "attempts": attempts, "blackout_ms": blackout_ms,
                });
                report::print_json(&result);
            } else {
                report::print(&format!("{name} runs again, after {:.1} s", blackout_ms.unwrap_or_default() / 1e3));
            }
            Ok(status::DONE)
        }
        Err(KeeperClientError::Refused(error @ KeeperError::NotRestored { .. })) => {
            if json {
                let result = json!({"event": "result", "result": "kept", "name": name, "error": error.to_string()});
                report::print_json(&result);
            } else {
                report::print(&format!("{name}: {error}"));
            }
            Ok(status::KEPT)
        }
        Err(error) => Err(error.into()),
    }
}

/// How it went.
struct Answer {
    /// How often the VM was started, where that is known.
    attempts: Option<u32>,
    blackout_ms: Option<f64>,
}

/// Has a VM restored by whoever keeps it. Should that one die meanwhile, of this very VM or of whatever, the next one tries by itself: then
/// the answer is what has become of the VM.
fn ask(dir: &RunDir, name: &str) -> Result<Answer, KeeperClientError> {
    let attempts = KeptVm::read(dir, name).map(|note| note.attempts);
    match KeeperClient::connect(dir).and_then(|mut keeper| keeper.restore(name)) {
        Ok(RestoredMachine { attempts, blackout_ms }) => Ok(Answer { attempts: Some(attempts), blackout_ms }),
        Err(KeeperClientError::Ended) => await_successor(dir, name, attempts),
        Err(error) => Err(error),
    }
}

/// Waits for what the successor of a keeper that has ended makes of a VM. It is not asked to try again: it has, or does not as that has
/// killed all who did.
fn await_successor(dir: &RunDir, name: &str, attempts: Option<u32>) -> Result<Answer, KeeperClientError> {
    tracing::warn!(vm = name, "the process that keeps it has ended: another one goes on");
    let deadline = Instant::now() + SUCCESSION;
    loop {
        // The note is there as long as it is kept, and a new one after each attempt.
        match KeptVm::read(dir, name) {
            None => {
                let asked = Client::connect(dir, name, STATUS_PATIENCE).and_then(|mut client| client.status());
                let Ok(status) = asked else { return Err(KeeperClientError::Ended) };
                let blackout_ms = status.timeline().and_then(|timeline| timeline.blackout_ms());
                return Ok(Answer { attempts: None, blackout_ms });
            }
            Some(note) if Some(note.attempts) != attempts => {
                return Err(KeeperError::NotRestored { reason: note.reason }.into());
            }
            Some(_) if Instant::now() >= deadline => return Err(KeeperClientError::Ended),
            Some(_) => thread::sleep(LOOK),
        }
    }
}

/// Starts the supervisor and relays what it says, up to its result.
fn front(dir: &RunDir, arguments: &RestoreArgs, log: LogArgs, init_reached: u64) -> anyhow::Result<u8> {
    dir.create()?;
    let mut command = vmm(log);
    command.args(["restore", "--all", "--supervise"]).env(INIT_COUNTER, init_reached.to_string());
    if arguments.no_set_clock {
        command.arg("--no-set-clock");
    }
    command.stdout(Stdio::piped()).stderr(supervisor_log(dir)?);
    let mut supervisor = command.spawn().context("cannot start the process that restores")?;
    let output = supervisor.stdout.take().context("cannot listen to the process that restores")?;
    for line in BufReader::new(output).lines() {
        let line = line.context("cannot listen to the process that restores")?;
        let event: Value = serde_json::from_str(&line).context("the process that restores says something odd")?;
        show(&event, arguments.json);
        if event["event"] == "result" {
            // It may well live on, where VMs are kept: this does not wait for it.
            return conclude(&event);
        }
    }
    let ended = supervisor.wait().context("cannot wait for the process that restores")?;
    Err(SupervisorError {
        message: format!("the process that restores ended without a result ({ended})"),
        help: Some(format!("see {}; `vmm list` shows what runs", dir.supervisor_log().display())),
    }
    .into())
}

/// Turns the result into the exit status.
fn conclude(result: &Value) -> anyhow::Result<u8> {
    match result["result"].as_str() {
        Some("restored") => Ok(status::DONE),
        Some("kept") => Ok(status::KEPT),
        Some("nothing") => Ok(status::NOTHING_HANDED_OVER),
        _ => Err(SupervisorError {
            message: result["error"].as_str().unwrap_or("the restore failed").to_owned(),
            help: result["help"].as_str().map(str::to_owned),
        }
        .into()),
    }
}

/// Has a supervisor of its own take over an index session that has been retrieved already, and returns its process.
pub fn supervise_session(session: IncomingSession) -> io::Result<u32> {
    let session = OwnedFd::from(session);
    let dir = RunDir::from_environment();
    // Nobody waits for this one, so it is not told how to log.
    let mut command = this_program();
    command.args(["restore", "--all", "--supervise", "--index-session", &session.as_raw_fd().to_string()]);
    command.stdout(Stdio::null()).stderr(supervisor_log(&dir)?);
    inherit(&mut command, session.as_raw_fd());
    command.spawn().map(|child: Child| child.id())
}

fn supervisor_log(dir: &RunDir) -> io::Result<Stdio> {
    let path = dir.supervisor_log();
    Ok(OpenOptions::new().append(true).create(true).mode(0o600).open(path)?.into())
}

/// This very program, even where its file has been replaced or deleted meanwhile.
fn this_program() -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("vmm").stdin(Stdio::null());
    command
}

fn vmm(log: LogArgs) -> Command {
    let mut command = this_program();
    command.args(log.arguments());
    command
}

/// Lets the command have `descriptor`, and the signals that this process holds back.
fn inherit(command: &mut Command, descriptor: i32) {
    let prepare = move || {
        // SAFETY: the caller keeps the file open until the command has been started, and the child has a copy of it.
        let file = unsafe { BorrowedFd::borrow_raw(descriptor) };
        rustix::io::fcntl_setfd(file, FdFlags::empty())?;
        signals::release_in_child()
    };
    // SAFETY: between fork and exec this makes two system calls, which are async-signal-safe, and allocates nothing.
    unsafe { command.pre_exec(prepare) };
}

/// Shows an event: to programs as it is, to people in words.
fn show(event: &Value, json: bool) {
    if json {
        report::print_json(event);
    } else if let Some(text) = words(event) {
        report::print(&text);
    }
}

/// An event in words.
fn words(event: &Value) -> Option<String> {
    let text = |key: &str| event[key].as_str().unwrap_or_default();
    let line = |what: String| Some(format!("{:>9.1} ms  {what}", event["ms"].as_f64().unwrap_or_default()));
    match text("event") {
        "phase" if text("phase") == Phase::IndexRetrieved.name() => line(format!(
            "{} VM(s) were handed over by kernel {}",
            event["vms"].as_u64().unwrap_or_default(),
            text("kernel_from")
        )),
        "phase" => line(format!("{}: {}", text("vm"), text("phase"))),
        "clock" => line(clock::words(event)),
        "attempt-failed" => line(format!("{}: attempt {} failed: {}", text("vm"), event["attempt"], text("reason"))),
        "frames" => line(match event["result"].as_str() {
            Some("same") => format!("{}: its memory is where it was, neither copied nor moved", text("vm")),
            _ => format!("{}: where its memory is: {}", text("vm"), text("reason")),
        }),
        "running" => line(match event["blackout_ms"].as_f64() {
            Some(blackout) => format!("{}: runs again, after {blackout:.1} ms", text("vm")),
            None => format!("{}: runs again", text("vm")),
        }),
        "kept" => line(format!("{}: NOT restored, its memory is kept: {}", text("vm"), text("reason"))),
        "result" => match text("result") {
            "restored" => Some("all VMs are restored".to_owned()),
            "kept" => Some("some VMs are not restored; `vmm list` tells which, and why".to_owned()),
            "nothing" => Some("nothing was handed over by the last kernel".to_owned()),
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_decides_the_exit_status() {
        for (result, expected) in [("restored", 0), ("kept", 22), ("nothing", 21)] {
            assert_eq!(conclude(&json!({"result": result})).unwrap(), expected);
        }
        let error = conclude(&json!({"result": "failed", "error": "what: why", "help": "do"})).unwrap_err();
        assert_eq!(error.to_string(), "what: why");
        assert_eq!(error.downcast_ref::<SupervisorError>().unwrap().help().as_deref(), Some("do"));
    }

    #[test]
    fn vm_that_is_kept_again_by_a_successor_is_told_to_be_and_not_tried_again() {
        let folder = tempfile::tempdir().unwrap();
        let dir = RunDir::at(folder.path());
        let (name, pid) = ("a".to_owned(), std::process::id());
        KeptVm { name, reason: "no".into(), pid, attempts: 4, memory: 1 << 30, generation: 2 }.write(&dir).unwrap();
        match await_successor(&dir, "a", Some(1)) {
            Err(KeeperClientError::Refused(KeeperError::NotRestored { reason })) => assert_eq!(reason, "no"),
            other => panic!("{:?}", other.map(|answer| answer.attempts)),
        }
        KeptVm::clear(&dir, "a");
        let ended = await_successor(&dir, "a", Some(4)).map(|answer| answer.attempts).unwrap_err();
        assert!(matches!(ended, KeeperClientError::Ended) && ended.help().is_some(), "{ended}");
    }

    #[test]
    fn events_are_told_in_words() {
        let event = json!({"event": "kept", "vm": "a", "ms": 12.34, "reason": "no"});
        assert_eq!(words(&event).unwrap(), "     12.3 ms  a: NOT restored, its memory is kept: no");
        assert_eq!(words(&json!({"event": "unknown"})), None);
    }
}
