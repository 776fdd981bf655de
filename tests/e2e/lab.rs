//! The lab itself: what the other tests stand on.
use anyhow::{Result, ensure};
use tests::architecture::Architecture;
use tests::host::{Host, HostConfig, Side};

on_each_architecture![a_host_boots_runs_programs_and_changes_its_kernel];

fn a_host_boots_runs_programs_and_changes_its_kernel(architecture: Architecture) -> Result<()> {
    Host::with(HostConfig::new("lab", architecture, 1024)?, |host| {
        let said = host.run(&["sh", "-c", "echo $KHO_VMM_INIT_COUNTER; echo trouble >&2; exit 3"])?;
        ensure!(said.code == Some(3) && said.stderr == "trouble\n", "{said}");
        ensure!(said.stdout.trim().parse() == Ok(host.hello().init_counter), "{said}");
        // What is orphaned to PID 1 must not stay a zombie.
        host.run(&["sh", "-c", "(sleep 0.01 &) ; exit 0"])?.success()?;
        for side in [Side::Newer, Side::Older] {
            let milliseconds = host.kexec(side)?;
            eprintln!("bare kexec to {}: {milliseconds:.0} ms", host.version(side));
            ensure!((1.0..120e3).contains(&milliseconds), "{milliseconds} ms is no believable kexec");
        }
        let said = host.run(&["ps", "-o", "stat,comm"])?.success()?;
        ensure!(!said.stdout.lines().any(|line| line.trim_start().starts_with('Z')), "{said}");
        host.power_off()
    })
}
