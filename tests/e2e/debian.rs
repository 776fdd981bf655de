//! Debian as it is, with its own kernel, from its own disk: nobody has prepared it for this monitor.
use anyhow::{Context, Result, ensure};
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};
use tests::architecture::Architecture;
use tests::debian::{self, Image, Release};
use tests::guests::{Console, PROMPT};
use tests::host::{Host, HostConfig, PATIENCE, Process, Side};
use tests::link::SHARE;
use tests::operator::{self, Update};
use tests::run;

on_each_architecture! { x86_64: X86_64, debian_13_boots_is_logged_into_lives_through_an_update_and_powers_off }

/// What takes too long for every run.
mod full {
    use super::*;

    on_each_architecture! { x86_64: X86_64, debian_12_with_its_older_kernel_does_all_that_too }
    on_each_architecture! {
        aarch64: Aarch64,
        debian_13_boots_is_logged_into_lives_through_an_update_and_powers_off
        debian_12_with_its_older_kernel_does_all_that_too
    }
    mod status {
        use super::*;
        on_each_architecture![debian_13_that_powers_off_ends_its_vmm_run_with_success];
    }

    fn debian_12_with_its_older_kernel_does_all_that_too(architecture: Architecture) -> Result<()> {
        from_login_to_power_off(architecture, Release::Bookworm)
    }

    /// The same `vmm run` from the beginning to the end, whose exit status tells the operator that the guest has powered off.
    fn debian_13_that_powers_off_ends_its_vmm_run_with_success(architecture: Architecture) -> Result<()> {
        let image =
            debian::cached(architecture, Release::Trixie)?.context("there is no image: run `cargo xtask image`")?;
        let config = HostConfig::new("trixie-status", architecture, 1536)?.with_image(&image.disk);
        Host::with(config, |host| {
            let (mut console, process) = boot(host, &image)?;
            log_in(host, &mut console)?;
            console.type_line(host, "systemctl poweroff")?;
            console.await_end(host)?;
            let ended = host.wait(&process)?;
            ensure!(ended.code == Some(0), "{ended}");
            host.power_off()?;
            check_disk(host)?;
            fs::remove_file(host.image_copy()).context("cannot remove the host's copy of the image")
        })
    }
}

/// How long the guest may take for anything: its boot takes minutes in an emulated host.
const GUEST_PATIENCE: Duration = Duration::from_secs(600);
const NAME: &str = "debian";
/// What no kernel says as long as all is well.
const COMPLAINTS: &[&str] = &["BUG:", "Oops", "stall", "lockup", "Call Trace", "Machine check", "unchecked MSR"];

fn debian_13_boots_is_logged_into_lives_through_an_update_and_powers_off(architecture: Architecture) -> Result<()> {
    from_login_to_power_off(architecture, Release::Trixie)
}

fn from_login_to_power_off(architecture: Architecture, release: Release) -> Result<()> {
    let image = debian::cached(architecture, release)?.context("there is no image: run `cargo xtask image`")?;
    let config = HostConfig::new(release.codename(), architecture, 1536)?.with_image(&image.disk);
    Host::with(config, |host| {
        let (mut console, _process) = boot(host, &image)?;
        log_in(host, &mut console)?;
        check_system(host, &mut console, &image, release)?;

        console.run(host, "told=before")?;
        console.run(host, "echo flushed > flushed && sync")?;
        console.run(host, "echo written > written")?;
        operator::live_update_of_all(host, Side::Newer, &Update::default())?;
        console.attach_again(host)?;
        // Nobody has logged in anew: it is the same shell.
        for (command, expected) in [("echo $told", "before"), ("cat flushed", "flushed"), ("cat written", "written")] {
            let said = console.run(host, command)?;
            ensure!(said.trim() == expected, "after the update `{command}` says {said}");
        }
        check_system(host, &mut console, &image, release)?;
        console.run(host, "echo later > later")?;

        console.type_line(host, "systemctl poweroff")?;
        console.await_end(host)?;
        host.wait_until("the VM's end", PATIENCE, |host| Ok(operator::list(host)?.is_empty().then_some(())))?;
        host.power_off()?;
        check_disk(host)?;
        let said = run::quietly(Command::new("debugfs").args(["-R", "cat /root/later"]).arg(host.image_copy()))?;
        ensure!(said == "later\n", "the image has: {said}");
        fs::remove_file(host.image_copy()).context("cannot remove the host's copy of the image")
    })
}

/// The guest has left nothing to be repaired on its disk, not even by its journal. The host must have powered off.
fn check_disk(host: &Host) -> Result<()> {
    let disk = host.image_copy();
    let said = run::quietly(Command::new("e2fsck").arg("-fn").arg(&disk))?;
    let features = run::quietly(Command::new("dumpe2fs").arg("-h").arg(&disk))?;
    ensure!(!features.contains("needs_recovery"), "its journal has to be replayed: {said}");
    Ok(())
}

/// Starts the guest as an operator would who has an image, and the kernel and initrd that are in it.
fn boot(host: &mut Host, image: &Image) -> Result<(Console, Process)> {
    for (file, name) in [(&image.kernel, "debian-kernel"), (&image.initrd, "debian-initrd")] {
        fs::copy(file, host.local(name)).with_context(|| format!("cannot copy {}", file.display()))?;
    }
    let [kernel, initrd] = ["kernel", "initrd"].map(|name| format!("{SHARE}/debian-{name}"));
    let serial = Console::serial(NAME);
    let mut argv = vec!["vmm", "run", "--name", NAME, "--memory", "512M", "--disk", "/dev/vda", "--rng"];
    argv.extend(["--kernel", &kernel, "--initrd", &initrd, "--append", debian::COMMAND_LINE, "--serial", &serial]);
    let process = host.spawn(&argv)?;
    Ok((Console::attach(host, NAME, GUEST_PATIENCE)?, process))
}

fn log_in(host: &mut Host, console: &mut Console) -> Result<()> {
    let start = Instant::now();
    console.await_text(host, " login: ")?;
    eprintln!("asks for a login after {:.0} s", start.elapsed().as_secs_f64());
    console.type_line(host, "root")?;
    console.await_text(host, PROMPT)?;
    eprintln!("is logged in after {:.0} s", start.elapsed().as_secs_f64());
    let state = console.run(host, "systemctl is-system-running --wait")?;
    eprintln!("is {} after {:.0} s", state.trim(), start.elapsed().as_secs_f64());
    Ok(())
}

/// It is what it should be, all of it runs, and its kernel has nothing to complain about.
fn check_system(host: &mut Host, console: &mut Console, image: &Image, release: Release) -> Result<()> {
    let version = console.run(host, "cat /etc/debian_version")?;
    ensure!(version.starts_with(release.number()), "this is Debian {version}");
    let kernel = console.run(host, "uname -r")?;
    ensure!(kernel.trim() == image.version, "Linux {kernel} runs");
    let state = console.run(host, "systemctl is-system-running")?;
    ensure!(state.trim() == "running", "the system is {state}");
    let said = console.run(host, "dmesg")?;
    let complaint = said.lines().find(|line| COMPLAINTS.iter().any(|complaint| line.contains(complaint)));
    ensure!(complaint.is_none(), "the guest's kernel complains: {complaint:?}");
    Ok(())
}
