//! What goes wrong before the point of no return is undone, and guests run on.
use anyhow::{Context, Result, ensure};
use tests::architecture::Architecture;
use tests::guests::{Guest, Running, await_beats};
use tests::host::{Ended, Host, HostConfig, Side};
use tests::operator::{self, Update};

on_each_architecture![
    a_rehearsal_does_everything_but_the_reboot_and_harms_nobody,
    guests_run_on_when_the_update_is_killed_or_fails_in_any_phase
];
on_one_architecture! { aarch64, an_update_is_undone_when_one_of_the_vms_fails_dies_or_hangs }

const KILLED: i32 = 9;

fn two_oracles(host: &mut Host) -> Result<[Running; 2]> {
    let mut guests = [Guest::oracle("first", 64).start(host)?, Guest::oracle("second", 64).start(host)?];
    await_beats(host, &mut guests, 2)?;
    Ok(guests)
}

/// An update that is not to happen.
fn update(host: &mut Host, fault: &str, options: &[&str]) -> Result<Ended> {
    let env = [("KHO_VMM_FAULT", fault)];
    let update = Update { env: &env, options, ..Update::default() };
    let process = operator::start_update(host, Side::Newer, "unexpected", &update)?;
    let boots = host.boots();
    let ended = host.wait(&process)?;
    ensure!(host.boots() == boots, "the host changed its kernel");
    Ok(ended)
}

fn a_rehearsal_does_everything_but_the_reboot_and_harms_nobody(architecture: Architecture) -> Result<()> {
    Host::with(HostConfig::new("rehearsal", architecture, 1024)?, |host| {
        let mut guests = two_oracles(host)?;
        for _ in 0..2 {
            let said = update(host, "", &["--rehearse"])?.success()?;
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

fn guests_run_on_when_the_update_is_killed_or_fails_in_any_phase(architecture: Architecture) -> Result<()> {
    Host::with(HostConfig::new("update-dies", architecture, 1024)?, |host| {
        let mut guests = two_oracles(host)?;
        for point in ["update.image-loaded", "update.prepared", "update.frozen", "update.preserved"] {
            let said = update(host, &format!("{point}=kill"), &[])?;
            ensure!(said.signal == Some(KILLED), "{point}: {said}");
            await_beats(host, &mut guests, 2).with_context(|| format!("after a kill at {point}"))?;
            for name in ["first", "second"] {
                let status = operator::status(host, name)?;
                ensure!(status["state"] == "running", "after a kill at {point}: {status}");
            }
            let said = update(host, &format!("{point}=fail"), &[])?;
            ensure!(said.code == Some(1), "{point}: {said}");
            ensure!(operator::result_line(&said.stdout)?["result"] == "failed", "{said}");
            await_beats(host, &mut guests, 1).with_context(|| format!("after a failure at {point}"))?;
        }
        operator::live_update_of_all(host, Side::Newer, &Update::default())?;
        await_beats(host, &mut guests, 2)
    })
}

fn an_update_is_undone_when_one_of_the_vms_fails_dies_or_hangs(architecture: Architecture) -> Result<()> {
    Host::with(HostConfig::new("vm-fails", architecture, 1024)?, |host| {
        let mut survivor = Guest::oracle("survivor", 64).start(host)?;
        for point in ["vm.prepared", "vm.document-written"] {
            for action in ["fail", "stall", "kill"] {
                let fault = format!("{point}={action}");
                let mut culprit = Guest::oracle("culprit", 64).start_with(host, &[("KHO_VMM_FAULT", &fault)])?;
                culprit.await_beats(host, 1)?;
                let said = update(host, "", &["--timeout", "5", "--prepare-timeout", "5"])?;
                ensure!(said.code == Some(1), "{fault}: {said}");
                let result = operator::result_line(&said.stdout)?;
                let error = result["error"].as_str().unwrap_or_default();
                ensure!(result["result"] == "failed" && error.contains("culprit"), "{fault}: {said}");
                survivor.await_beats(host, 2).with_context(|| format!("after {fault}"))?;
                if action == "kill" {
                    let ended = host.wait(&culprit.process)?;
                    ensure!(ended.signal == Some(KILLED), "{fault}: {ended}");
                } else {
                    culprit.await_beats(host, 2).with_context(|| format!("after {fault}"))?;
                    host.run(&["vmm", "stop", "culprit"])?.success()?;
                    ensure!(culprit.status(host)? == operator::STOPPED, "{fault}: the culprit did not stop");
                }
            }
        }
        operator::live_update_of_all(host, Side::Newer, &Update::default())?;
        survivor.await_beats(host, 2)
    })
}
