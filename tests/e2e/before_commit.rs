//! What is done before the point of no return can be undone, and guests run on. (Faults are in `faults`.)
use anyhow::{Context, Result, ensure};
use tests::architecture::Architecture;
use tests::guests::{Guest, Running, await_beats};
use tests::host::{Ended, Host, HostConfig, Side};
use tests::operator::{self, Update};

on_each_architecture![a_rehearsal_does_everything_but_the_reboot_and_harms_nobody];

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
    ended.success()
}

fn a_rehearsal_does_everything_but_the_reboot_and_harms_nobody(architecture: Architecture) -> Result<()> {
    Host::with(HostConfig::new("rehearsal", architecture, 1024)?, |host| {
        let mut guests = two_oracles(host)?;
        for _ in 0..2 {
            let said = rehearse(host)?;
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
        // And the real one after it.
        operator::live_update_of_all(host, Side::Newer, &Update::default())?;
        await_beats(host, &mut guests, 2)
    })
}
