//! The demo for a real host, `resources/demo/live-update.sh`, run as an operator would run it.
use anyhow::{Context, Result, bail, ensure};
use tests::architecture::Architecture;
use tests::guests::Log;
use tests::host::{Host, HostConfig, PATIENCE, Side};
use tests::paths;

on_one_architecture! { x86_64, the_demo_script_carries_a_guest_in_its_two_halves }

fn the_demo_script_carries_a_guest_in_its_two_halves(architecture: Architecture) -> Result<()> {
    Host::with(HostConfig::new("script", architecture, 1024)?, |host| {
        let script = paths::workspace().join("resources/demo/live-update.sh");
        std::fs::copy(&script, host.local("live-update.sh")).context("cannot copy the script")?;
        let said = host.run(&["sh", "/share/live-update.sh"])?;
        ensure!(said.code == Some(2) && said.stderr.contains("usage"), "{said}");
        let mut log = Log::new(host.local("guest-demo.log"));
        let guest = ["--guest-kernel", "/share/oracle", "--guest-append", "", "--memory", "64M"];
        let next = ["--next-kernel", "/share/kernel-newer", "--next-initrd", "/share/initrd"];
        let first = ["sh", "/share/live-update.sh", "--guest-log", "/share/guest-demo.log"];

        let said =
            host.run(&[&first[..], &guest, &next, &["--name", "rehearsed", "--rehearse"]].concat())?.success()?;
        ensure!(said.stdout.contains("rehearsed"), "{said}");
        host.run(&["vmm", "stop", "rehearsed"])?.success()?;
        host.wait_until("the VM's end", PATIENCE, |host| Ok(tests::operator::list(host)?.is_empty().then_some(())))?;

        let process = host.spawn(&[&first[..], &guest, &next].concat())?;
        let before = host.boots();
        host.wait_until("the next kernel", PATIENCE, |host| {
            if host.boots() == before && host.has_ended(&process)? {
                bail!("the script ended without a kexec: {}", host.wait(&process)?);
            }
            Ok((host.boots() > before).then_some(()))
        })?;
        host.arrived(Side::Newer)?;
        let said = host.run(&["sh", "/share/live-update.sh", "after"])?.success()?;
        ensure!(said.stdout.contains("blackout"), "there is no timeline: {said}");
        log.read_on()?;
        let goal = log.beats + 3;
        host.wait_until("three signs of life", PATIENCE, |_| {
            log.read_on()?;
            ensure!(log.damage.is_empty(), "the guest was damaged: {:?}", log.damage);
            Ok((log.beats >= goal).then_some(()))
        })
    })
}
