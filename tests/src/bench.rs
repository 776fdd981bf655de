//! `cargo xtask bench`: what a live update takes, phase by phase, with more and more vCPUs, and what it takes for the first and the
//! last of more and more VMs. It measures and judges nothing: timings of an emulated host are good for ratios within one run, at most.
use crate::architecture::Architecture;
use crate::guests::{Guest, Running, await_beats};
use crate::host::{Host, HostConfig};
use crate::operator::{self, Restored, RestoredVm, Update};
use crate::phases::{BLACKOUT_BEGINS, PHASES};
use anyhow::{Context, Result};

/// The numbers of vCPUs that are compared.
const CPUS: [u32; 4] = [1, 2, 4, 8];
/// The numbers of VMs that are compared.
const VMS: [usize; 3] = [1, 8, 32];
/// MiB of each guest.
const MEMORY: u32 = 64;
/// Signs of life before and after each update.
const BEATS: u64 = 2;

/// Carries one guest after the other to the next kernel, then many at once, and prints tables.
pub fn run(architecture: Architecture) -> Result<()> {
    let (vms, many) = Host::with(HostConfig::new("bench", architecture, 4096)?, |host| {
        let mut vms = Vec::new();
        for cpus in CPUS {
            println!("a guest with {cpus} vCPUs");
            let mut guest = Guest::oracle("guest", MEMORY).cpus(cpus).start(host)?;
            guest.await_beats(host, BEATS)?;
            let restored = operator::live_update_of_all(host, host.kernel().other(), &Update::default())?;
            guest.await_beats(host, BEATS)?;
            vms.push(restored.vm("guest")?.clone());
            host.run(&["vmm", "stop", "guest"])?.success()?;
        }
        let mut guests: Vec<Running> = Vec::new();
        let mut many = Vec::new();
        for count in VMS {
            println!("{count} VMs");
            for number in guests.len()..count {
                // They share the host's processors with what is measured, and rest most of the time.
                guests.push(Guest::resting_oracle(&format!("guest-{number}"), MEMORY).start(host)?);
            }
            await_beats(host, &mut guests, 1)?;
            many.push(operator::live_update_of_all(host, host.kernel().other(), &Update::default())?);
            await_beats(host, &mut guests, 1)?;
        }
        host.power_off()?;
        Ok((vms, many))
    })?;
    print!("{}\n{}", table(architecture, &vms)?, table_of_many(architecture, &many)?);
    Ok(())
}

/// The first, the median and the last VM to run again.
fn table_of_many(architecture: Architecture, updates: &[Restored]) -> Result<String> {
    let mut text = format!("| {}, VMs | first | median | last | last, without the kernels |\n", architecture.name());
    text.push_str("|---|---|---|---|---|\n");
    for Restored { vms, .. } in updates {
        let blackout = |vm: &RestoredVm| vm.blackout_ms.context("a VM has no blackout");
        let mut blackouts = vms.iter().map(blackout).collect::<Result<Vec<f64>>>()?;
        let mut shares = vms.iter().map(RestoredVm::monitors_share).collect::<Result<Vec<f64>>>()?;
        blackouts.sort_by(f64::total_cmp);
        shares.sort_by(f64::total_cmp);
        let all = (blackouts.first(), blackouts.get(vms.len() / 2), blackouts.last(), shares.last());
        let (Some(first), Some(median), Some(last), Some(share)) = all else { continue };
        text.push_str(&format!("| {} | {first:.0} ms | {median:.0} ms | {last:.0} ms | {share:.0} ms |\n", vms.len()));
    }
    Ok(text)
}

/// In Markdown, so that it can be quoted.
fn table(architecture: Architecture, vms: &[RestoredVm]) -> Result<String> {
    let row = |name: &str, cells: Vec<String>| format!("| {name} | {} |\n", cells.join(" | "));
    let mut text = row(&format!("{}, vCPUs", architecture.name()), CPUS.map(|cpus| cpus.to_string()).to_vec());
    text.push_str(&format!("|---|{}\n", "---|".repeat(CPUS.len())));
    for phase in PHASES {
        let times = vms.iter().map(|vm| vm.phases.get(*phase).map_or_else(|| "-".into(), |ms| format!("{ms:.1}")));
        let note = if *phase == BLACKOUT_BEGINS { " (from here on the guest stands still)" } else { "" };
        text.push_str(&row(&format!("{phase}, ms{note}"), times.collect()));
    }
    let blackouts = vms.iter().map(|vm| Ok(format!("{:.1}", vm.blackout_ms.context("a VM has no blackout")?)));
    text.push_str(&row("blackout, ms", blackouts.collect::<Result<_>>()?));
    let shares = vms.iter().map(|vm| Ok(format!("{:.1}", vm.monitors_share()?)));
    text.push_str(&row("of it without the kernels, ms", shares.collect::<Result<_>>()?));
    text.push_str(&row("document, bytes", vms.iter().map(|vm| vm.document_bytes.to_string()).collect()));
    Ok(text)
}
