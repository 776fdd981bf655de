//! `cargo xtask bench`: what a live update takes, phase by phase, with more and more vCPUs. It measures and judges nothing: timings
//! of an emulated host are good for ratios within one run, at most.
use crate::architecture::Architecture;
use crate::guests::Guest;
use crate::host::{Host, HostConfig, Side};
use crate::operator::{self, RestoredVm, Update};
use crate::phases::{BLACKOUT_BEGINS, PHASES};
use anyhow::{Context, Result};

/// The numbers of vCPUs that are compared.
const CPUS: [u32; 4] = [1, 2, 4, 8];
/// MiB of the guest.
const MEMORY: u32 = 64;
/// Signs of life before and after each update.
const BEATS: u64 = 2;

/// Carries one guest after the other to the next kernel, and prints a table.
pub fn run(architecture: Architecture) -> Result<()> {
    let vms = Host::with(HostConfig::new("bench", architecture, 2048)?, |host| {
        let mut vms = Vec::new();
        for cpus in CPUS {
            println!("a guest with {cpus} vCPUs");
            let mut guest = Guest::oracle("guest", MEMORY).cpus(cpus).start(host)?;
            guest.await_beats(host, BEATS)?;
            let to = if host.kernel() == Side::Older { Side::Newer } else { Side::Older };
            let restored = operator::live_update_of_all(host, to, &Update::default())?;
            guest.await_beats(host, BEATS)?;
            vms.push(restored.vm("guest")?.clone());
            host.run(&["vmm", "stop", "guest"])?.success()?;
        }
        host.power_off()?;
        Ok(vms)
    })?;
    print!("{}", table(architecture, &vms)?);
    Ok(())
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
