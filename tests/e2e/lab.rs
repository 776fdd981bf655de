//! The lab itself: what the other tests stand on.
use anyhow::{Result, ensure};
use tests::architecture::Architecture;
use tests::host::{Host, HostConfig, PATIENCE, Side};

on_each_architecture![
    a_host_boots_runs_programs_and_changes_its_kernel,
    what_a_host_has_not_flushed_to_its_disk_dies_with_its_kernel
];

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

/// What the tests of guests' disks stand on.
fn what_a_host_has_not_flushed_to_its_disk_dies_with_its_kernel(architecture: Architecture) -> Result<()> {
    Host::with(HostConfig::new("lab-disk", architecture, 1024)?.with_disk(1), |host| {
        // The last one to close a block device flushes it, so it stays open.
        let script = "exec 3<>/dev/vda; echo kept >&3; sync; echo lost >&3; echo written; exec sleep 1000";
        let writer = host.spawn(&["sh", "-c", script])?;
        host.wait_until("the writes", PATIENCE, |host| Ok(host.stdout(&writer)?.contains("written").then_some(())))?;
        host.kexec(Side::Newer)?;
        let said = host.run(&["head", "-c", "10", "/dev/vda"])?.success()?;
        ensure!(said.stdout == "kept\n\0\0\0\0\0", "{said}");
        Ok(())
    })
}
