//! What a host was handed and is about to hand over can be seen.
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::architecture::Architecture;
use tests::guests::{Guest, await_beats};
use tests::host::{Ended, Host, HostConfig, PATIENCE, Side};
use tests::link::SHARE;
use tests::operator::{self, Update};

mod proof {
    use super::*;
    on_one_architecture! { aarch64, it_is_proven_that_the_guests_memory_is_preserved_and_found_when_it_is_not }
}
mod handover {
    use super::*;
    on_one_architecture! { x86_64, the_handover_is_seen_before_and_after_an_update_and_so_is_a_document }
}

/// MiB of the guest, and of a folio, whose order is 9.
const MEMORY: u32 = 64;
const FOLIO: u64 = 2;

fn inspect(host: &mut Host) -> Result<Value> {
    let said = host.run(&["vmm", "inspect", "--host", "--json"])?.success()?;
    serde_json::from_str(&said.stdout).with_context(|| format!("`vmm inspect` gave no JSON: {said}"))
}

/// Saves what the host is about to hand over, and looks into that.
fn dump(host: &mut Host, name: &str) -> Result<Value> {
    let folder = format!("{SHARE}/{name}");
    host.run(&["vmm", "inspect", "--host", "--save", &folder])?.success()?;
    let said = host.run(&["vmm", "inspect", "--json", &format!("{folder}/outgoing.dump")])?.success()?;
    serde_json::from_str(&said.stdout).with_context(|| format!("`vmm inspect` gave no JSON: {said}"))
}

fn folios(inspected: &Value) -> u64 {
    inspected["outgoing"]["preserved"]["by_order"]["9"].as_u64().unwrap_or_default()
}

fn the_handover_is_seen_before_and_after_an_update_and_so_is_a_document(architecture: Architecture) -> Result<()> {
    Host::with(HostConfig::new("inspect", architecture, 1024)?, |host| {
        let older = host.hello().release.clone();
        let before = inspect(host)?;
        ensure!(before["incoming"].is_null() && before["outgoing"]["version"] == "kho-v4", "{before}");
        ensure!(
            before["outgoing"]["subtrees"].as_array().is_some_and(|names| names.contains(&"LUO".into())),
            "{before}"
        );
        let areas = before["scratch"]["areas"].as_array().context("no scratch areas")?;
        let used = |area: &Value| area["used"].as_u64() <= area["bytes"].as_u64() && area["used"].is_u64();
        ensure!(areas.len() >= 3 && areas.iter().all(used), "{before}");

        let dumped = dump(host, "before")?;
        ensure!(dumped["preserved"] == before["outgoing"]["preserved"], "{dumped} {before}");

        // Its memory is in small folios until it is about to be preserved.
        let huge_pages = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
        host.write(huge_pages, "never")?;
        // It takes its time when it is frozen: with its memory preserved, which a rehearsal undoes.
        let stall = [("KHO_VMM_FAULT", "vm.document-written=stall")];
        let mut oracle = Guest::oracle("oracle", MEMORY).start_with(host, &stall)?;
        oracle.await_beats(host, 1)?;
        let rehearsal = Update { options: &["--rehearse"], ..Update::default() };
        let process = operator::start_update(host, Side::Newer, "unexpected", &rehearsal)?;
        let wanted = folios(&before) + u64::from(MEMORY) / FOLIO;
        host.wait_until("the guest's memory to be preserved", PATIENCE, |host| {
            ensure!(!host.has_ended(&process)?, "the rehearsal is over");
            Ok((folios(&inspect(host)?) == wanted).then_some(()))
        })?;
        host.wait(&process)?.success()?;
        ensure!(folios(&inspect(host)?) == folios(&before), "what a rehearsal has preserved is still there");
        let pid = operator::pid(host, "oracle")?;
        host.signal(pid, 9)?;
        host.wait(&oracle.process)?;
        host.write(huge_pages, "advise")?;

        let mut oracle = Guest::oracle("second", MEMORY).start(host)?;
        oracle.await_beats(host, 1)?;
        operator::live_update_of_all(host, Side::Newer, &Update::default())?;
        let after = inspect(host)?;
        let incoming = &after["incoming"];
        ensure!(incoming["version"] == "kho-v4" && incoming["previous_release"] == older.as_str(), "{after}");
        ensure!(incoming["kexec_count"] == 1 && after["outgoing"]["live_update"] == 2, "{after}");
        let text = host.run(&["vmm", "inspect", "--host"])?.success()?.stdout;
        ensure!(text.contains("cannot be read any more"), "what has gone is not named: {text}");
        // A dump tells what the host does.
        let dumped = dump(host, "after")?;
        let said = host.run(&["vmm", "inspect", &format!("{SHARE}/after/incoming.dtb")])?.success()?;
        ensure!(said.stdout.contains("what a kernel hands over, kho-v4"), "{said}");
        ensure!(dumped["preserved"] == after["outgoing"]["preserved"], "{dumped} {after}");
        oracle.await_beats(host, 2)
    })
}

fn it_is_proven_that_the_guests_memory_is_preserved_and_found_when_it_is_not(architecture: Architecture) -> Result<()> {
    Host::with(HostConfig::new("proof", architecture, 1024)?, |host| {
        let mut guests = [Guest::oracle("first", MEMORY).start(host)?, Guest::oracle("second", MEMORY).start(host)?];
        await_beats(host, &mut guests, 1)?;
        let update = |host: &mut Host, fault: &str, options: &[&str]| {
            let env: &[(&str, &str)] = if fault.is_empty() { &[] } else { &[("KHO_VMM_FAULT", fault)] };
            let process =
                operator::start_update(host, Side::Newer, "unexpected", &Update { env, options, ..Update::default() })?;
            host.wait(&process)
        };
        let proofs = |said: &Ended| -> Result<Vec<Value>> {
            Ok(said.json_lines()?.into_iter().filter(|line| line["event"] == "proof").collect())
        };
        // Once while guests run, and once more inside the pause.
        let said = update(host, "", &["--rehearse", "--prove"])?.success()?;
        let found = proofs(&said)?;
        let pages = 2 * (u64::from(MEMORY) << 20) / 4096;
        ensure!(found.len() == 2 && found.iter().all(|proof| proof["pages"] == pages), "{said}");
        eprintln!("{found:?}");
        // One of two guests has not a single page in the handover.
        let said = update(host, "update.prepared/second=flip", &["--rehearse"])?;
        ensure!(
            said.code == Some(1) && said.stderr.contains("second") && said.stderr.contains("is not preserved"),
            "{said}"
        );
        await_beats(host, &mut guests, 2)?;
        // The checksum of all memory, before and after; and of memory that has changed on the way.
        let options = &["--prove", "--digest"][..];
        let restored = operator::live_update_of_all(host, Side::Newer, &Update { options, ..Update::default() })?;
        for vm in &restored.vms {
            let phase = |name: &str| vm.phases.get(name).copied().unwrap_or_default();
            let taken = [phase("memory-digested"), phase("digest-checked")];
            eprintln!("{}: {MEMORY} MiB digested and checked in {taken:.0?} ms", vm.name);
            ensure!(taken.iter().all(|ms| *ms > 0.0), "the checksum is no phase: {vm:?}");
        }
        await_beats(host, &mut guests, 2)?;
        let append = "KHO_VMM_FAULT=restore.files-retrieved/second=flip";
        let update = Update { append, options, ..Update::default() };
        let (restored, _) = operator::live_update(host, Side::Older, &update)?;
        let second = restored.vm("second")?;
        ensure!(
            second.state == "kept" && second.reason.as_ref().is_some_and(|why| why.contains("checksum")),
            "{second:?}"
        );
        guests[0].await_beats(host, 2)
    })
}
