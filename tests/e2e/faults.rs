//! A fault at every phase of a live update, in every process that reaches it: no guest is lost, and none runs twice.
use crate::console::attach;
use anyhow::{Context, Result, bail, ensure};
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use std::time::SystemTime;
use tests::architecture::Architecture;
use tests::check;
use tests::guests::{Guest, Running, await_beats};
use tests::host::{Ended, Host, HostConfig, PATIENCE, Side};
use tests::operator::{self, Restored, RestoredVm, Update};

mod before_commit {
    use super::*;
    on_one_architecture! { aarch64, no_fault_at_any_phase_before_the_reboot_harms_a_guest }
}
mod random {
    use super::*;
    on_one_architecture! { aarch64, random_faults_at_random_phases_lose_no_guest }
}
mod endings {
    use super::*;
    on_one_architecture! { aarch64, a_guest_that_ends_under_an_update_ends_once_and_the_others_go_on }
}
mod after_commit {
    use super::*;
    on_one_architecture! { aarch64, no_fault_at_any_phase_after_the_reboot_loses_a_guest }
}

const SIGKILL: i32 = 9;
/// What ends an update that takes too long, by their names and numbers.
const SIGNALS: [(&str, i32); 2] = [("SIGTERM", 15), ("SIGINT", 2)];

/// Something that can be asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Fault {
    process: String,
    phase: String,
    action: String,
}

impl Fault {
    fn point(&self) -> String {
        format!("{}.{}", self.process, self.phase)
    }

    /// As the variable has it, for one VM, or for all.
    fn entry(&self, vm: Option<&str>) -> String {
        let vm = vm.map_or_else(String::new, |vm| format!("/{vm}"));
        format!("{}{vm}={}", self.point(), self.action)
    }

    /// Whether it happens on behalf of no VM.
    fn concerns_all(&self) -> bool {
        ["init-reached", "index-retrieved"].contains(&self.phase.as_str())
    }

    /// Whether it concerns the time before the host's kernel is left.
    fn is_before_commit(&self) -> bool {
        let on_the_way_in = ["machine-built", "first-instruction"].contains(&self.phase.as_str());
        self.process == "update" || (self.process == "vm" && !on_the_way_in)
    }
}

/// All that can be asked for, as the program itself tells it.
fn faults(host: &mut Host) -> Result<Vec<Fault>> {
    let said = host.run(&["vmm", "faults"])?.success()?;
    let points: serde_json::Value = serde_json::from_str(&said.stdout)?;
    let mut faults = Vec::new();
    for point in points.as_array().context("no list of faults")? {
        let text = |key: &str| point[key].as_str().map(str::to_owned).context("a fault without a name");
        for action in point["actions"].as_array().into_iter().flatten().filter_map(|action| action.as_str()) {
            faults.push(Fault { process: text("process")?, phase: text("phase")?, action: action.to_owned() });
        }
    }
    Ok(faults)
}

/// A guest that is left out of all updates, and pauses with the others.
const BYSTANDER: &str = "bystander";

fn no_fault_at_any_phase_before_the_reboot_harms_a_guest(architecture: Architecture) -> Result<()> {
    Host::with(HostConfig::new("faults-before", architecture, 1024)?, |host| {
        let mut survivor = Guest::oracle("survivor", 64).start(host)?;
        let mut bystander = Guest::resting_oracle(BYSTANDER, 32).start(host)?;
        survivor.await_beats(host, 1)?;
        let faults = faults(host)?;
        let boots = host.boots();
        let mut signals = SIGNALS.into_iter().cycle();
        for fault in faults.iter().filter(|fault| fault.is_before_commit()) {
            let outcome = match fault.process.as_str() {
                "vm" => in_a_vm(host, fault),
                _ => in_the_update(host, fault, &mut signals),
            };
            outcome.with_context(|| format!("{fault:?}"))?;
            ensure!(host.boots() == boots, "{fault:?}: the host changed its kernel");
            survivor.await_beats(host, 1).with_context(|| format!("after {fault:?}"))?;
            let status = operator::status(host, "survivor")?;
            ensure!(status["state"] == "running", "after {fault:?}: {status}");
            bystander.await_beats(host, 1).with_context(|| format!("after {fault:?}"))?;
            host.wait_until("the next kernel to be unloaded", PATIENCE, |host| {
                Ok((host.read("/sys/kernel/kexec/loaded")?.trim() == "0").then_some(()))
            })?;
        }
        host.run(&["vmm", "stop", BYSTANDER])?.success()?;
        operator::live_update_of_all(host, Side::Newer, &Update::default())?;
        survivor.await_beats(host, 2)
    })
}

fn in_the_update(
    host: &mut Host,
    fault: &Fault,
    signals: &mut impl Iterator<Item = (&'static str, i32)>,
) -> Result<()> {
    let entry = match (fault.action.as_str(), fault.phase.as_str()) {
        // What is handed over is bad: it is for the next kernel to find that.
        ("flip", "document-written" | "preserved") => return Ok(()),
        ("flip", _) => fault.entry(Some("survivor")),
        _ => fault.entry(None),
    };
    let env = [("KHO_VMM_FAULT", entry.as_str())];
    let mut options = vec!["--skip", BYSTANDER];
    options.extend((fault.phase == "memory-digested").then_some("--digest"));
    let process = operator::start_update(
        host,
        Side::Newer,
        "unexpected",
        &Update { env: &env, options: &options, ..Update::default() },
    )?;
    let mut ended_by = "";
    if fault.action == "stall" {
        let (name, signal) = signals.next().context("a cycle has an end")?;
        ended_by = name;
        // Somebody has seen enough of it.
        host.wait_until("the update to stall", PATIENCE, |host| {
            ensure!(!host.has_ended(&process)?, "it has ended");
            Ok(host.stderr(&process)?.contains(&format!("a stall at {}", fault.point())).then_some(()))
        })?;
        host.signal(process.pid, signal)?;
    }
    let said = host.wait(&process)?;
    if fault.action == "kill" {
        ensure!(said.signal == Some(SIGKILL), "{said}");
        return Ok(());
    }
    let reason = failure(&said)?;
    let wanted = match fault.action.as_str() {
        "fail" => fault.point(),
        "stall" => ended_by.to_owned(),
        "flip" => "is not preserved".to_owned(),
        other => bail!("{other} is not known here"),
    };
    ensure!(reason.contains(&wanted), "{said}");
    Ok(())
}

fn in_a_vm(host: &mut Host, fault: &Fault) -> Result<()> {
    let entry = fault.entry(None);
    let mut culprit = Guest::oracle("culprit", 64).start_with(host, &[("KHO_VMM_FAULT", &entry)])?;
    culprit.await_beats(host, 1)?;
    let options = &["--timeout", "5", "--prepare-timeout", "5", "--skip", BYSTANDER];
    let process = operator::start_update(host, Side::Newer, "unexpected", &Update { options, ..Update::default() })?;
    let said = host.wait(&process)?;
    let reason = failure(&said)?;
    ensure!(reason.contains("culprit"), "{said}");
    if fault.action == "kill" {
        let ended = host.wait(&culprit.process)?;
        ensure!(ended.signal == Some(SIGKILL), "{ended}");
        return Ok(());
    }
    culprit.await_beats(host, 1)?;
    host.run(&["vmm", "stop", "culprit"])?.success()?;
    ensure!(culprit.status(host)? == operator::STOPPED, "the culprit did not stop");
    Ok(())
}

fn a_guest_that_ends_under_an_update_ends_once_and_the_others_go_on(architecture: Architecture) -> Result<()> {
    const CONSOLE: &str = "/run/leaver.console";
    Host::with(HostConfig::new("ends-meanwhile", architecture, 1024)?, |host| {
        std::fs::copy(&host.config().products.load, host.local("lab-load"))?;
        let mut other = Guest::resting_oracle("other", 64).start(host)?;
        other.await_beats(host, 1)?;
        // Its process takes its time, in which the guest comes to its end: while its memory is being preserved, and when it is to
        // stand still.
        for (phase, end, status) in [("prepared", "reboot", operator::GUEST_RESET), ("pause-asked", "poweroff", 0)] {
            let stall = format!("vm.{phase}=stall");
            let leaver = Guest::linux("leaver", 192).option("serial", &format!("socket={CONSOLE}"));
            let leaver = leaver.start_with(host, &[("KHO_VMM_FAULT", &stall)])?;
            host.wait_until("its console", PATIENCE, |host| {
                Ok((host.run(&["ls", CONSOLE])?.code == Some(0)).then_some(()))
            })?;
            let reader = attach(host, CONSOLE, &["--until", "LINUX line"])?;
            host.wait(&reader)?.success()?;
            let (boots, output) = (host.boots(), format!("ends-{phase}"));
            let rehearsed = phase == "prepared";
            let options: &[&str] = if rehearsed { &["--rehearse"] } else { &[] };
            let update = Update { options, ..Update::default() };
            let process = operator::start_update(host, Side::Newer, &output, &update)?;
            host.wait_until("the VM to take its time", PATIENCE, |host| {
                ensure!(!host.has_ended(&process)?, "the update has ended");
                Ok(host.stderr(&leaver.process)?.contains(&format!("a stall at vm.{phase}")).then_some(()))
            })?;
            let typist = attach(host, CONSOLE, &["--say", end])?;
            host.wait(&typist)?.success()?;
            if rehearsed {
                let said = host.wait(&process)?.success()?;
                let found = leaver.status(host)?;
                ensure!(found == status, "a guest that did {end} ended with {found}, not {status}");
                let told = said.stdout.lines().any(|line| line.contains("\"ended\"") && line.contains("leaver"));
                ensure!(told, "the update did not notice: {said}");
            } else {
                // In the blackout nothing is told. Who noticed does not hand it over.
                let (restored, ended) = operator::await_restore(host, Side::Newer, boots, &process, &output)?;
                let names: Vec<&str> = restored.vms.iter().map(|vm| vm.name.as_str()).collect();
                ensure!(ended.code == Some(0) && names == ["other"], "{ended}");
            }
            other.await_beats(host, 2)?;
        }
        let names = operator::list(host)?;
        ensure!(names.len() == 1 && names[0]["name"] == "other", "{names:?}");
        Ok(())
    })
}

/// Why an update has failed.
fn failure(said: &Ended) -> Result<String> {
    ensure!(said.code == Some(1), "{said}");
    let result = operator::result_line(&said.stdout)?;
    ensure!(result["result"] == "failed", "{said}");
    Ok(result["error"].as_str().unwrap_or_default().to_owned())
}

fn no_fault_at_any_phase_after_the_reboot_loses_a_guest(architecture: Architecture) -> Result<()> {
    Host::with(HostConfig::new("faults-after", architecture, 1024)?, |host| {
        let mut guests = [Guest::oracle("first", 64).start(host)?, Guest::oracle("second", 64).start(host)?];
        await_beats(host, &mut guests, 2)?;
        let faults = faults(host)?;
        let wanted = |fault: &&Fault| {
            let tried =
                fault.action == "kill" || fault.action == "fail" || (fault.action == "stall" && check::is_full());
            !fault.is_before_commit() && tried
        };
        let (vm, restore): (Vec<&Fault>, Vec<&Fault>) =
            faults.iter().filter(wanted).partition(|fault| fault.process == "vm");
        ensure!(vm.len() >= 4 && restore.len() >= 11, "these are not all: {faults:?}");
        // Of three attempts two may fail: each takes two faults.
        let mut sides = [Side::Newer, Side::Older].into_iter().cycle();
        for pair in restore.chunks(2).chain(vm.chunks(2)) {
            let entry = |(number, fault): (usize, &&Fault)| {
                let vm = (!fault.concerns_all()).then_some("first");
                format!("{}@{}", fault.entry(vm), number + 1)
            };
            let entries: Vec<String> = pair.iter().enumerate().map(entry).collect();
            let append = format!("KHO_VMM_FAULT={}", entries.join(","));
            let side = sides.next().context("a cycle has an end")?;
            update(host, side, &append, &mut guests).with_context(|| append.clone())?;
        }
        // And one fault too many: it is kept, by whoever has held it all the time, until somebody asks for it.
        let entries = [1, 2, 3].map(|attempt| format!("restore.files-retrieved/first=kill@{attempt}"));
        let append = format!("KHO_VMM_FAULT={}", entries.join(","));
        let side = sides.next().context("a cycle has an end")?;
        let (restored, ended) = operator::live_update(host, side, &Update { append: &append, ..Update::default() })?;
        ensure!(ended.code == Some(operator::KEPT) && restored.vm("first")?.state == "kept", "{ended}");
        for vm in restored.vms.iter().filter(|vm| vm.state == "kept") {
            host.run(&["vmm", "restore", &vm.name])?.success()?;
        }
        await_beats(host, &mut guests, 2)?;
        // Who keeps two VMs dies of the second attempt to restore one of them. Whoever comes after tries again, and does not bring back
        // what was given up by then.
        let entries = ["files-retrieved/first=fail@1", "files-retrieved/second=fail@1", "machine-built/second=kill@2"];
        let append = format!("KHO_VMM_FAULT={}", entries.map(|entry| format!("restore.{entry}")).join(","));
        let side = sides.next().context("a cycle has an end")?;
        let (restored, ended) = operator::live_update(host, side, &Update { append: &append, ..Update::default() })?;
        ensure!(restored.vms.len() == 2 && restored.vms.iter().all(|vm| vm.state == "kept"), "{ended}");
        let free = host.memory("MemFree")?;
        host.run(&["vmm", "discard", "first"])?.success()?;
        host.wait_until("its memory to be the host's again", PATIENCE, |host| {
            Ok((host.memory("MemFree")? > free + (48 << 20)).then_some(()))
        })?;
        let said = host.run(&["vmm", "restore", "second", "--json"])?.success()?;
        let result = operator::result_line(&said.stdout)?;
        ensure!(result["result"] == "restored" && said.stderr.contains("another one goes on"), "{said}");
        let [_, second] = &mut guests;
        second.await_beats(host, 2)?;
        let side = sides.next().context("a cycle has an end")?;
        let restored = operator::live_update_of_all(host, side, &Update::default())?;
        ensure!(restored.vms.len() == 1, "what was given up is there again: {restored:?}");
        second.await_beats(host, 2)
    })
}

/// How many updates, and of how many guests: 200 updates of eight guests take hours in an emulated host.
fn size() -> (u32, u32) {
    if check::is_full() { (200, 8) } else { (20, 3) }
}

fn random_faults_at_random_phases_lose_no_guest(architecture: Architecture) -> Result<()> {
    /// Chooses the seed, to see again what was seen.
    const SEED: &str = "KHO_VMM_SEED";
    let seed = match std::env::var(SEED) {
        Ok(seed) => seed.parse().with_context(|| format!("{SEED} is no number"))?,
        Err(_) => SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs(),
    };
    eprintln!("{SEED}={seed}");
    let mut random = SmallRng::seed_from_u64(seed);
    let (updates, count) = size();
    Host::with(HostConfig::new("faults-random", architecture, 1536)?, |host| {
        let mut guests = Vec::new();
        for number in 0..count {
            guests.push(Guest::resting_oracle(&format!("guest-{number}"), 32).start(host)?);
        }
        await_beats(host, &mut guests, 1)?;
        let faults: Vec<Fault> = faults(host)?.into_iter().filter(|fault| fault.action != "stall").collect();
        // A VM's own faults before the reboot are asked for when it is started, and a killed one is gone.
        let (before, after): (Vec<&Fault>, Vec<&Fault>) = faults
            .iter()
            .filter(|fault| fault.process != "vm" || !fault.is_before_commit())
            .filter(|fault| fault.action != "flip" || fault.phase == "prepared")
            .partition(|fault| fault.is_before_commit());
        let mut undone = 0;
        for _ in 0..updates {
            let first = before.choose(&mut random).filter(|_| random.random_bool(0.4));
            let mut entries = Vec::new();
            for attempt in 1..=random.random_range(0..=2) {
                let fault = after.choose(&mut random).context("nothing can be asked for")?;
                let vm = (!fault.concerns_all()).then(|| format!("guest-{}", random.random_range(0..count)));
                entries.push(format!("{}@{attempt}", fault.entry(vm.as_deref())));
            }
            let append = entries.join(",");
            let append = if append.is_empty() { append } else { format!("KHO_VMM_FAULT={append}") };
            let entry = first.map(|fault| fault.entry((fault.action == "flip").then_some("guest-0")));
            let env: Vec<(&str, &str)> = entry.iter().map(|entry| ("KHO_VMM_FAULT", entry.as_str())).collect();
            let what = format!("{SEED}={seed}: {env:?}, then {append}");
            // A digest of all memory takes an emulated processor longer than the rest: one in four, and where a fault waits for it.
            let is_digested = what.contains("digest") || random.random_bool(0.25);
            let options: &[&str] = if is_digested { &["--digest"] } else { &[] };
            let update = Update { append: &append, env: &env, options };
            one_at_random(host, &mut guests, first.is_some(), &update).with_context(|| what)?;
            undone += u32::from(first.is_some());
        }
        eprintln!("{updates} updates of {count} guests, {undone} of them undone; nothing lost");
        Ok(())
    })
}

fn one_at_random(host: &mut Host, guests: &mut [Running], undone: bool, update: &Update<'_>) -> Result<()> {
    if undone {
        let boots = host.boots();
        let process = operator::start_update(host, host.kernel().other(), "unexpected", update)?;
        let said = host.wait(&process)?;
        ensure!(said.code != Some(0) && host.boots() == boots, "it was not undone: {said}");
    } else {
        let (restored, ended) = operator::live_update(host, host.kernel().other(), update)?;
        restore_kept(host, update, &restored, &ended)?;
    }
    await_beats(host, guests, 1)?;
    let list = operator::list(host)?;
    ensure!(list.len() == guests.len() && list.iter().all(|vm| vm["state"] == "running"), "{list:?}");
    // What restores ends when it is done.
    host.wait_until("one process for each VM", PATIENCE, |host| {
        let found = host.run(&["pidof", "vmm"])?.stdout;
        Ok((found.split_whitespace().count() == guests.len()).then_some(()))
    })
}

fn update(host: &mut Host, side: Side, append: &str, guests: &mut [Running]) -> Result<()> {
    let update = Update { append, options: &["--digest"], ..Update::default() };
    let (restored, ended) = operator::live_update(host, side, &update)?;
    restore_kept(host, &update, &restored, &ended)?;
    ensure!(restored.vms.len() == guests.len(), "not all VMs are in the result: {ended}");
    // Guests that ran twice would tell of steps back, and have said the same twice.
    await_beats(host, guests, 2)
}

/// What cannot be taken over, or is found to be something else, is not tried again but kept, until somebody asks for it.
fn restore_kept(host: &mut Host, update: &Update<'_>, restored: &Restored, ended: &Ended) -> Result<()> {
    let is_kept = |vm: &&RestoredVm| vm.state == "kept";
    let may_be = |vm: &RestoredVm| {
        let keeping = ["files-retrieved", "digest-checked"];
        keeping.iter().any(|phase| update.append.contains(&format!("restore.{phase}/{}=fail", vm.name)))
    };
    let code = if restored.vms.iter().any(|vm| is_kept(&vm)) { operator::KEPT } else { 0 };
    ensure!(ended.code == Some(code), "{ended}");
    for vm in restored.vms.iter().filter(is_kept) {
        ensure!(may_be(vm), "{vm:?}");
        host.run(&["vmm", "restore", &vm.name])?.success()?;
    }
    Ok(())
}
