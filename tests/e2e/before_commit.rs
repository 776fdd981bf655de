//! What is done before the point of no return can be undone, and guests run on. (Faults are in `faults`.)
use anyhow::{Context, Result, ensure};
use tests::architecture::Architecture;
use tests::guests::{Guest, Running, await_beats};
use tests::host::{Ended, Host, HostConfig, PATIENCE, Side};
use tests::init::session::HELD;
use tests::operator::{self, Update};

on_one_architecture! {
    aarch64,
    a_rehearsal_does_everything_but_the_reboot_and_harms_nobody
    what_is_in_the_way_of_an_update_is_named_and_guests_run_on
}

fn two_oracles(host: &mut Host) -> Result<[Running; 2]> {
    let mut guests = [Guest::oracle("first", 64).start(host)?, Guest::oracle("second", 64).start(host)?];
    await_beats(host, &mut guests, 2)?;
    Ok(guests)
}

/// A rehearsal.
fn rehearse(host: &mut Host) -> Result<Ended> {
    let options = &["--rehearse"];
    let process = operator::start_update(host, Side::Newer, "unexpected", &Update { options, ..Update::default() })?;
    let boots = host.boots();
    let ended = host.wait(&process)?;
    ensure!(host.boots() == boots, "the host changed its kernel");
    Ok(ended)
}

fn a_rehearsal_does_everything_but_the_reboot_and_harms_nobody(architecture: Architecture) -> Result<()> {
    Host::with(HostConfig::new("rehearsal", architecture, 1024)?, |host| {
        let mut guests = two_oracles(host)?;
        for _ in 0..2 {
            let said = rehearse(host)?.success()?;
            let result = operator::result_line(&said.stdout)?;
            ensure!(result["result"] == "rehearsed", "{said}");
            let vms = result["vms"].as_array().context("no VMs in the result")?;
            ensure!(vms.len() == 2, "{said}");
            for vm in vms {
                ensure!(vm["document_bytes"].as_u64() > Some(0) && vm["ram_bytes"] == 64 << 20, "{vm}");
                for phase in ["prepared", "vcpus-stopped", "devices-stopped", "document-written"] {
                    ensure!(vm["phases"][phase].as_f64().is_some(), "phase {phase} has no time in {vm}");
                }
            }
            await_beats(host, &mut guests, 2)?;
        }
        // And the real one after it. A guest that its operator has paused stays so, and one that is left behind has ended.
        let mut left = Guest::oracle("left", 64).start(host)?;
        left.await_beats(host, 1)?;
        host.run(&["vmm", "pause", "second"])?.success()?;
        let options = &["--skip", "left"];
        let restored = operator::live_update_of_all(host, Side::Newer, &Update { options, ..Update::default() })?;
        ensure!(restored.vms.len() == 2, "{restored:?}");
        let [first, second] = &mut guests;
        first.await_beats(host, 2)?;
        let list = operator::list(host)?;
        ensure!(list.len() == 2 && operator::status(host, "second")?["state"] == "paused", "{list:?}");
        second.log.read_on()?;
        let said = second.log.beats;
        first.await_beats(host, 2)?;
        second.log.read_on()?;
        ensure!(second.log.beats == said, "a paused guest spoke");
        host.run(&["vmm", "resume", "second"])?.success()?;
        second.await_beats(host, 2)?;
        left.check_unharmed()
    })
}

fn what_is_in_the_way_of_an_update_is_named_and_guests_run_on(architecture: Architecture) -> Result<()> {
    Host::with(HostConfig::new("in-the-way", architecture, 1024)?, |host| {
        let mut guests = two_oracles(host)?;
        // Somebody else's session has the name.
        let session = kho_abi::names::session_name("first").context("no session has its name")?;
        let holder = host.spawn(&["/init", "session", &session])?;
        host.wait_until("the session", PATIENCE, |host| Ok(host.stdout(&holder)?.contains(HELD).then_some(())))?;
        expect_refused(host, &mut guests, &["first", &session])?;
        host.signal(holder.pid, 9)?;
        host.wait(&holder)?;
        // Nothing can be written where VMs are found; then there is no room left.
        host.run(&["mount", "--bind", "/run/vmm", "/run/vmm"])?.success()?;
        host.run(&["mount", "-o", "remount,bind,ro", "/run/vmm"])?.success()?;
        expect_refused(host, &mut guests, &["/run/vmm", "Read-only"])?;
        host.run(&["umount", "/run/vmm"])?.success()?;
        host.run(&["mount", "-o", "remount,size=256k", "/run"])?.success()?;
        let filled = host.run(&["dd", "if=/dev/zero", "of=/run/rest", "bs=4k"])?;
        ensure!(filled.code != Some(0), "there is room left: {filled}");
        rehearse(host)?.success()?;
        await_beats(host, &mut guests, 1)?;
        host.run(&["rm", "/run/rest"])?.success()?;
        // And one of the VMs cannot be found.
        host.run(&["mv", "/run/vmm/second.sock", "/run/elsewhere"])?.success()?;
        let stray = guests[1].process.pid.to_string();
        expect_refused(host, &mut guests, &["vm-stray", &stray])?;
        host.run(&["mv", "/run/elsewhere", "/run/vmm/second.sock"])?.success()?;
        rehearse(host)?.success()?;
        await_beats(host, &mut guests, 1)
    })
}

/// An update is refused with those words, and nothing has changed for anybody.
fn expect_refused(host: &mut Host, guests: &mut [Running], words: &[&str]) -> Result<()> {
    let said = rehearse(host)?;
    let told = words.iter().chain(&["run on"]).all(|word| said.stderr.contains(word));
    ensure!(said.code == Some(1) && told, "not {words:?}: {said}");
    await_beats(host, guests, 1)?;
    let list = operator::list(host)?;
    ensure!(list.iter().all(|vm| vm["state"] == "running"), "{list:?}");
    Ok(())
}
