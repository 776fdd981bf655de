//! What is known before an update: that it could go ahead, or why not.
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs;
use tests::architecture::Architecture;
use tests::debian::{self, Release};
use tests::guests::Guest;
use tests::host::{Host, HostConfig, PATIENCE, Side};
use tests::kernels;
use tests::link::SHARE;
use tests::operator::{self, Update};

mod next_kernel {
    use super::*;
    on_one_architecture! { aarch64, a_next_kernel_that_would_lose_the_guests_is_refused_before_any_is_touched }
}
mod this_host {
    use super::*;
    on_one_architecture! { x86_64, a_host_that_is_not_ready_is_told_what_to_do }
}

/// What `vmm check` says of a next kernel, and its exit status.
fn check(host: &mut Host, kernel: &str, append: &str) -> Result<(Value, Option<i32>)> {
    let next = ["--kernel", kernel, "--initrd", "/share/initrd", "--append", append];
    let said = host.run(&[&["vmm", "check", "--json"], &next[..]].concat())?;
    let value = serde_json::from_str(&said.stdout).with_context(|| format!("`vmm check` gave no JSON: {said}"))?;
    Ok((value, said.code))
}

/// The checks that have that verdict, by their names.
fn checks<'a>(report: &'a Value, verdict: &str) -> Vec<&'a str> {
    let checks = report["checks"].as_array().into_iter().flatten();
    checks.filter(|check| check["verdict"] == verdict).filter_map(|check| check["check"].as_str()).collect()
}

/// A kernel with something in its image changed.
fn changed(host: &Host, name: &str, change: impl FnOnce(&mut Vec<u8>) -> Result<()>) -> Result<String> {
    let mut bytes = fs::read(&host.config().kernels.newer.image)?;
    change(&mut bytes)?;
    fs::write(host.local(name), bytes)?;
    Ok(format!("{SHARE}/{name}"))
}

/// A kernel with some of its text changed.
fn doctored(host: &Host, name: &str, text: &str, other: &str) -> Result<String> {
    changed(host, name, |bytes| {
        let at = bytes.windows(text.len()).position(|window| window == text.as_bytes());
        let at = at.with_context(|| format!("the kernel does not contain {text}"))?;
        bytes[at..at + text.len()].copy_from_slice(other.as_bytes());
        Ok(())
    })
}

/// The kernel of a distribution that knows of no live update, where its image has been made.
fn distributions(host: &Host, architecture: Architecture) -> Result<Option<String>> {
    let Some(image) = debian::cached(architecture, Release::Trixie)? else { return Ok(None) };
    fs::copy(&image.kernel, host.local("debian"))?;
    Ok(Some(format!("{SHARE}/debian")))
}

fn a_next_kernel_that_would_lose_the_guests_is_refused_before_any_is_touched(architecture: Architecture) -> Result<()> {
    Host::with(HostConfig::new("check", architecture, 1024)?, |host| {
        let mut oracle = Guest::oracle("oracle", 64).start(host)?;
        oracle.await_beats(host, 1)?;
        let line = host.restoring_command_line("unexpected");
        let (report, code) = check(host, &Host::image(Side::Newer), &line)?;
        ensure!(code == Some(0) && report["ready"] == true && checks(&report, "failure").is_empty(), "{report}");

        let half = changed(host, "half", |bytes| {
            bytes.truncate(bytes.len() / 2);
            Ok(())
        })?;
        let no_kho = doctored(host, "other-kho", "kho-v4", "kho-v9")?;
        let no_luo = doctored(host, "no-luo", "luo-v5", "xxx-v5")?;
        let newer = Host::image(Side::Newer);
        fs::create_dir(host.local("folder"))?;
        let no_kernel = |name: &str| (format!("{SHARE}/{name}"), line.clone(), "next-kernel");
        let without = |parameter: &str| line.replace(&format!("{parameter}=on"), "");
        let mut cases = vec![
            no_kernel("nowhere"),
            no_kernel("folder"),
            no_kernel("initrd"),
            (half, line.clone(), "next-kernel"),
            (no_kho, line.clone(), "kho-version"),
            (no_luo, line.clone(), "luo-version"),
            (newer.clone(), without("liveupdate"), "next-cmdline"),
            (newer, without("kho"), "next-cmdline"),
        ];
        // The compression of x86_64's kernel leaves no such text whole.
        if architecture == Architecture::Aarch64 {
            cases.push((doctored(host, "other-memfd", "memfd-v2", "memfd-v1")?, line.clone(), "memfd-version"));
            // Pages of 64 KiB (Linux's Documentation/arch/arm64/booting.rst).
            let other_pages = changed(host, "other-pages", |bytes| {
                bytes[0x18] |= 0b110;
                Ok(())
            })?;
            cases.push((other_pages, line.clone(), "next-page-size"));
        }
        for (kernel, append, wanted) in &cases {
            let (report, code) = check(host, kernel, append)?;
            ensure!(code == Some(1) && report["ready"] == false, "{kernel}: {report}");
            ensure!(checks(&report, "failure") == [*wanted], "{kernel}: {report}");
            let update = ["vmm", "update", "--kernel", kernel, "--initrd", "/share/initrd", "--append", append];
            let said = host.run(&update)?;
            ensure!(said.code == Some(1) && said.stderr.contains(wanted) && said.stderr.contains("run on"), "{said}");
            // Its document is the first thing that is written once it stands still. What the guest says of pauses would not do:
            // an emulated host has some of its own.
            let status = operator::status(host, "oracle")?;
            let untouched = status["state"] == "running" && status["document_bytes"] == 0;
            ensure!(untouched, "{kernel}: the guest was touched: {status}");
        }
        // A kernel for another kind of machine is right in all else; where there is one at hand.
        for other in Architecture::ALL.iter().filter(|other| **other != architecture) {
            let Some(kernels) = kernels::cached(*other)? else { continue };
            fs::copy(kernels.newer.image, host.local("other-machine"))?;
            let (report, code) = check(host, &format!("{SHARE}/other-machine"), &line)?;
            ensure!(code == Some(1) && checks(&report, "failure") == ["next-machine"], "{report}");
        }
        // Of a stock kernel nothing is right but its form.
        if let Some(kernel) = distributions(host, architecture)? {
            let (report, code) = check(host, &kernel, &line)?;
            let failures = checks(&report, "failure");
            ensure!(code == Some(1) && failures == ["kho-version", "luo-version", "memfd-version"], "{report}");
        }
        // What does not fit into scratch, in which the next kernel boots.
        host.run(&["truncate", "-s", "600M", "/run/large"])?.success()?;
        let large = ["--kernel", &Host::image(Side::Newer), "--initrd", "/run/large", "--append", &line];
        let said = host.run(&[&["vmm", "check", "--json"], &large[..]].concat())?;
        let report: Value = serde_json::from_str(&said.stdout)?;
        ensure!(said.code == Some(1) && checks(&report, "failure") == ["scratch"], "{report}");
        let said = host.run(&[&["vmm", "update"], &large[..]].concat())?;
        ensure!(said.code == Some(1) && said.stderr.contains("scratch") && said.stderr.contains("run on"), "{said}");
        // Whoever insists gets what they ask for.
        let forced = Update { options: &["--rehearse", "--force", "next-cmdline"], ..Update::default() };
        let process = operator::start_update(host, Side::Newer, "unexpected", &forced)?;
        host.wait(&process)?.success()?;
        oracle.await_beats(host, 2)
    })
}

fn a_host_that_is_not_ready_is_told_what_to_do(architecture: Architecture) -> Result<()> {
    Host::with(HostConfig::new("not-ready", architecture, 1024)?, |host| {
        let (kernel, line) = (Host::image(Side::Newer), host.restoring_command_line("unexpected"));
        let expect = |host: &mut Host, verdict: &str, wanted: &str| {
            let (report, _) = check(host, &kernel, &line)?;
            ensure!(checks(&report, verdict).contains(&wanted), "{wanted} is no {verdict}: {report}");
            Ok(report)
        };
        let huge_pages = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
        for (path, bad, good, verdict, wanted) in [
            (huge_pages, "never", "advise", "warning", "huge-pages"),
            ("/proc/sys/vm/memfd_noexec", "1", "0", "failure", "memfd-noexec"),
        ] {
            host.write(path, bad)?;
            expect(host, verdict, wanted)?;
            host.write(path, good)?;
            expect(host, "ok", wanted)?;
        }
        // A disk that ends with this kernel, and memory that is not there.
        host.run(&["truncate", "-s", "1M", "/run/image"])?.success()?;
        let mut disk = Guest::oracle("disk", 64).option("disk", "/run/image").start(host)?;
        disk.await_beats(host, 1)?;
        let report = expect(host, "failure", "vm-disk")?.to_string();
        ensure!(report.contains("/run/image") && report.contains("ends with this kernel"), "{report}");
        host.run(&["rm", "/run/image"])?.success()?;
        let report = expect(host, "failure", "vm-disk")?.to_string();
        ensure!(report.contains("cannot be opened again"), "{report}");
        host.run(&["vmm", "stop", "disk"])?.success()?;
        // More memory than the host has, of which it uses a part.
        let mut large = Guest::linux("large", 1200).start(host)?;
        large.await_beats(host, 1)?;
        expect(host, "failure", "memory")?;
        let said = host.run(&["vmm", "update", "--kernel", &kernel, "--initrd", "/share/initrd", "--append", &line])?;
        ensure!(said.code == Some(1) && said.stderr.contains("memory") && said.stderr.contains("run on"), "{said}");
        host.run(&["vmm", "stop", "large"])?.success()?;
        expect(host, "ok", "memory")?;
        let holder = host.spawn(&["sh", "-c", "exec 3<>/dev/liveupdate; echo held; exec sleep 1000"])?;
        host.wait_until("the device to be held", PATIENCE, |host| {
            Ok(host.stdout(&holder)?.contains("held").then_some(()))
        })?;
        let report = expect(host, "failure", "device")?.to_string();
        ensure!(report.contains(&format!("sleep ({})", holder.pid)), "it is not said who holds the device: {report}");
        host.signal(holder.pid, 9)?;
        host.wait(&holder)?;
        expect(host, "ok", "device")?;
        host.run(&["mv", "/dev/liveupdate", "/dev/elsewhere"])?.success()?;
        expect(host, "failure", "device")?;
        host.run(&["mv", "/dev/elsewhere", "/dev/liveupdate"])?.success()?;
        expect(host, "ok", "device")?;
        host.write("/proc/sys/kernel/kexec_load_disabled", "1")?;
        expect(host, "failure", "kexec")?;
        host.power_off()
    })
}
