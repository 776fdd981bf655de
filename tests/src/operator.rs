//! What an operator does on the host: the verbs of `vmm`, and their JSON.
use crate::host::{Ended, Host, Process, Side, json_lines};
use crate::link::SHARE;
use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::Duration;

/// How long `vmm update` and the way to the next kernel may take: preparing gigabytes in an emulated host takes minutes.
const UPDATE_PATIENCE: Duration = Duration::from_secs(400);

/// Exit status of a guest's reset.
pub const GUEST_RESET: i32 = 10;
/// Exit status of a guest's triple fault.
pub const GUEST_TRIPLE_FAULT: i32 = 11;
/// Exit status of a VM that the operator ended.
pub const STOPPED: i32 = 12;
/// Exit status of `vmm restore` when nothing was handed over.
pub const NOTHING_HANDED_OVER: i32 = 21;
/// Exit status of `vmm restore` when VMs are kept in memory.
pub const KEPT: i32 = 22;

/// What `vmm restore --all --json` says in the end.
#[derive(Clone, Debug, Deserialize)]
pub struct Restored {
    /// `restored`, `kept` or `nothing`.
    pub result: String,
    /// How many live updates this host's VMs have come through.
    #[serde(default)]
    pub generation: u64,
    /// The release of the kernel that handed them over.
    pub kernel_from: Option<String>,
    /// The VMs.
    #[serde(default)]
    pub vms: Vec<RestoredVm>,
}

impl Restored {
    /// The VM of that name.
    pub fn vm(&self, name: &str) -> Result<&RestoredVm> {
        self.vms.iter().find(|vm| vm.name == name).with_context(|| format!("{name} is not among {:?}", self.vms))
    }
}

/// One VM in it.
#[derive(Clone, Debug, Deserialize)]
pub struct RestoredVm {
    /// Its name.
    pub name: String,
    /// `running` or `kept`.
    pub state: String,
    /// Why it is kept.
    pub reason: Option<String>,
    /// How often it was started.
    #[serde(default)]
    pub attempts: u32,
    /// Whether its memory is where it was: `same`, `moved` or `unknown`.
    pub frames: Option<String>,
    /// From the request to pause to the first instruction.
    pub blackout_ms: Option<f64>,
    /// Size of its document.
    #[serde(default)]
    pub document_bytes: u64,
    /// Milliseconds of each phase since the one before.
    #[serde(default)]
    pub phases: BTreeMap<String, f64>,
    /// Raw counter values.
    #[serde(default)]
    pub marks: Vec<(String, u64)>,
    /// Ticks of that counter per second.
    #[serde(default)]
    pub counter_hz: f64,
}

impl RestoredVm {
    /// Milliseconds between two phases.
    pub fn between(&self, from: &str, to: &str) -> Result<f64> {
        let find = |name: &str| {
            let mark = self.marks.iter().find(|(phase, _)| phase == name);
            mark.map(|(_, counter)| *counter)
                .with_context(|| format!("{} has no mark {name}: {:?}", self.name, self.marks))
        };
        Ok((find(to)? as f64 - find(from)? as f64) / self.counter_hz * 1e3)
    }

    /// The part of the blackout that is the monitor's: all but the kernels' own way from the reboot call to init.
    pub fn monitors_share(&self) -> Result<f64> {
        Ok(self.between("pause-asked", "first-instruction")? - self.between("reboot-called", "init-reached")?)
    }
}

/// Options of a live update that tests vary.
#[derive(Clone, Debug, Default)]
pub struct Update<'a> {
    /// Added to the next kernel's command line. Words of the form NAME=VALUE without a dot become PID 1's environment.
    pub append: &'a str,
    /// Environment of `vmm update`.
    pub env: &'a [(&'a str, &'a str)],
    /// Further options of `vmm update`.
    pub options: &'a [&'a str],
}

/// Runs a program before the guests, as operators of busy hosts are told to: beside eight vCPUs without rest it has a ninth of a
/// processor to look at the next kernel and to load it with, which then takes half a minute.
const BEFORE_GUESTS: [&str; 4] = ["sh", "-c", "renice -n -20 -p $$ && exec \"$@\"", "sh"];

/// Starts `vmm update` to a kernel. PID 1 will restore by itself; `output` receives what `vmm restore` says.
pub fn start_update(host: &mut Host, to: Side, output: &str, update: &Update<'_>) -> Result<Process> {
    let kernel = Host::image(to);
    let initrd = format!("{SHARE}/initrd");
    let append = format!("{} {}", host.restoring_command_line(output), update.append);
    let mut argv = BEFORE_GUESTS.to_vec();
    argv.extend(["vmm", "update", "--json", "--kernel", &kernel, "--initrd", &initrd, "--append", append.trim()]);
    argv.extend(update.options);
    host.spawn_with(&argv, update.env)
}

/// Rehearses an update to a kernel. Fails unless everything but the reboot has happened.
pub fn rehearse(host: &mut Host, to: Side) -> Result<()> {
    let (kernel, initrd) = (Host::image(to), format!("{SHARE}/initrd"));
    let mut argv = BEFORE_GUESTS.to_vec();
    argv.extend(["vmm", "update", "--rehearse", "--json", "--reuse-cmdline", "--kernel", &kernel, "--initrd", &initrd]);
    let said = host.run(&argv)?.success()?;
    ensure!(result_line(&said.stdout)?["result"] == "rehearsed", "{said}");
    Ok(())
}

/// What `vmm check` says in the end of an update to a kernel. Fails when it would not let it go ahead.
pub fn check(host: &mut Host, to: Side) -> Result<String> {
    let (kernel, initrd) = (Host::image(to), format!("{SHARE}/initrd"));
    let append = host.restoring_command_line("unexpected");
    let said = host.run(&["vmm", "check", "--kernel", &kernel, "--initrd", &initrd, "--append", &append])?.success()?;
    said.stdout.lines().next_back().map(str::to_owned).context("`vmm check` said nothing")
}

/// Replaces the host's kernel under its VMs and waits until `vmm restore` is done. Fails when the update does not happen.
pub fn live_update(host: &mut Host, to: Side, update: &Update<'_>) -> Result<(Restored, Ended)> {
    let before = host.boots();
    let output = format!("restore-{before:02}");
    let process = start_update(host, to, &output, update)?;
    await_restore(host, to, before, &process, &output)
}

/// The same of an update that was started by [`start_update`], `before` so many boots.
pub fn await_restore(
    host: &mut Host,
    to: Side,
    before: u32,
    process: &Process,
    output: &str,
) -> Result<(Restored, Ended)> {
    host.wait_until("the next kernel", UPDATE_PATIENCE, |host| {
        if host.boots() == before && host.has_ended(process)? {
            let said = host.wait(process)?;
            bail!("`vmm update` ended without a kexec: {said}");
        }
        Ok((host.boots() > before).then_some(()))
    })?;
    host.arrived(to)?;
    let restore = host.restore_process(output)?;
    let ended = host.wait(&restore)?;
    let restored = restored(&ended)?;
    Ok((restored, ended))
}

/// The result in what `vmm restore --json` said.
pub fn restored(ended: &Ended) -> Result<Restored> {
    let last = result_line(&ended.stdout).with_context(|| format!("`vmm restore` gave no result: {ended}"))?;
    serde_json::from_value(last.clone()).with_context(|| format!("not a result of `vmm restore`: {last}"))
}

/// The line with `"event":"result"` in a command's JSON lines.
pub fn result_line(stdout: &str) -> Result<Value> {
    let lines = json_lines(stdout)?;
    lines.into_iter().rev().find(|line| line["event"] == "result").context("there is no result among its lines")
}

/// A live update all of whose VMs must come back.
pub fn live_update_of_all(host: &mut Host, to: Side, update: &Update<'_>) -> Result<Restored> {
    let (restored, ended) = live_update(host, to, update)?;
    ensure!(ended.code == Some(0) && restored.result == "restored", "not all VMs were restored: {ended}");
    // Every update proves that all of the memory is preserved; here it shows that it was.
    let moved = restored.vms.iter().find(|vm| vm.frames.as_deref() != Some("same"));
    ensure!(moved.is_none(), "the memory of a VM is not known to be where it was: {moved:?}");
    Ok(restored)
}

/// `vmm list --json`.
pub fn list(host: &mut Host) -> Result<Vec<Value>> {
    let said = host.run(&["vmm", "list", "--json"])?.success()?;
    serde_json::from_str(&said.stdout).with_context(|| format!("`vmm list` gave no list: {said}"))
}

/// `vmm status NAME --json`.
pub fn status(host: &mut Host, name: &str) -> Result<Value> {
    let said = host.run(&["vmm", "status", name, "--json"])?.success()?;
    serde_json::from_str(&said.stdout).with_context(|| format!("`vmm status` gave no status: {said}"))
}

/// Process id of the `vmm run` that runs a VM.
pub fn pid(host: &mut Host, name: &str) -> Result<i32> {
    let status = status(host, name)?;
    let pid = status["pid"].as_i64().with_context(|| format!("the status has no process id: {status}"))?;
    i32::try_from(pid).context("that is no process id")
}
