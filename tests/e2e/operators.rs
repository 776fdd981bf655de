//! What operators do by hand, and what they do wrong.
use anyhow::{Context, Result, ensure};
use tests::architecture::Architecture;
use tests::guests::Guest;
use tests::host::{Host, HostConfig, PATIENCE};
use tests::operator;

on_each_architecture![a_vm_is_listed_paused_resumed_and_stopped, what_cannot_work_is_refused_with_a_reason];

fn a_vm_is_listed_paused_resumed_and_stopped(architecture: Architecture) -> Result<()> {
    Host::with(HostConfig::new("verbs", architecture, 1024)?, |host| {
        ensure!(operator::list(host)?.is_empty(), "VMs are listed before one was started");
        let mut oracle = Guest::oracle("oracle", 64).start(host)?;
        oracle.await_beats(host, 1)?;
        let list = operator::list(host)?;
        let vm = list.first().context("the VM is not listed")?;
        ensure!(vm["name"] == "oracle" && vm["state"] == "running" && vm["memory"] == 64 << 20, "{vm}");
        ensure!(vm["cpus"] == 1 && vm["generation"] == 0 && vm["pid"] == oracle.process.pid, "{vm}");
        let modes = host.run(&["stat", "-c", "%a", "/run/vmm", "/run/vmm/oracle.sock"])?.success()?;
        ensure!(modes.stdout == "700\n600\n", "others may reach the socket: {modes}");

        host.run(&["vmm", "pause", "oracle"])?.success()?;
        ensure!(operator::status(host, "oracle")?["state"] == "paused", "the VM is not paused");
        oracle.log.read_on()?;
        let said = oracle.log.beats;
        // Whoever pauses a paused VM gets what they asked for.
        host.run(&["vmm", "pause", "oracle"])?;
        oracle.log.read_on()?;
        ensure!(oracle.log.beats == said, "a paused guest spoke");
        host.run(&["vmm", "resume", "oracle"])?.success()?;
        oracle.await_beats(host, 2)?;

        host.run(&["vmm", "stop", "oracle"])?.success()?;
        ensure!(oracle.status(host)? == operator::STOPPED, "a stopped VM has another exit status");
        host.wait_until("the VM to leave the list", PATIENCE, |host| Ok(operator::list(host)?.is_empty().then_some(())))
    })
}

fn what_cannot_work_is_refused_with_a_reason(architecture: Architecture) -> Result<()> {
    Host::with(HostConfig::new("mistakes", architecture, 1024)?, |host| {
        let mut oracle = Guest::oracle("oracle", 64).start(host)?;
        oracle.await_beats(host, 1)?;
        let run = ["vmm", "run", "--serial", "off", "--name"];
        for (arguments, code, reason) in [
            (&["a", "--kernel", "/nowhere"][..], 1, "/nowhere"),
            (&["a", "--kernel", "/share/link-of-nothing"], 1, "/share/link-of-nothing"),
            (&["a", "--kernel", "/share/initrd"], 1, "/share/initrd"),
            (&["a", "--kernel", "/share/oracle", "--initrd", "/nowhere"], 1, "/nowhere"),
            (&["a", "--kernel", "/share/oracle", "--cpus", "65"], 1, "cpus"),
            (&["a", "--kernel", "/share/oracle", "--memory", "0"], 2, "memory"),
            (&["a", "--kernel", "/share/kernel-newer", "--memory", "1M"], 1, "memory"),
            (&["a/b", "--kernel", "/share/oracle"], 2, "name"),
            (&["oracle", "--kernel", "/share/oracle"], 1, "oracle"),
            (&["a"], 2, "--kernel"),
        ] {
            let said = host.run(&[&run[..], arguments].concat())?;
            ensure!(said.code == Some(code), "{arguments:?}: {said}");
            let stderr = said.stderr.to_lowercase();
            ensure!(stderr.contains(reason) && !stderr.contains("panicked"), "{arguments:?}: {said}");
        }
        for verb in ["status", "pause", "resume", "stop"] {
            let said = host.run(&["vmm", verb, "nobody"])?;
            ensure!(said.code == Some(1) && said.stderr.contains("nobody"), "{verb}: {said}");
        }
        for verb in [&["restore", "oracle"][..], &["discard", "oracle"], &["rescue", "oracle", "--to", "/run/core"]] {
            let said = host.run(&[&["vmm"], verb].concat())?;
            ensure!(said.code == Some(1) && said.stderr.contains("no VM is kept"), "{verb:?}: {said}");
        }
        oracle.await_beats(host, 2)
    })
}
