//! Sockets between a guest and programs of its host: a live update resets them, a rehearsal keeps them, and new ones work at once.
use anyhow::{Context, Result, ensure};
use tests::architecture::Architecture;
use tests::guests::{Guest, Running};
use tests::host::{Host, HostConfig, PATIENCE, Side};
use tests::operator::{self, Update};

on_each_architecture![connections_are_reset_by_live_updates_and_work_again_at_once_in_both_directions];
on_one_architecture! { aarch64, a_vm_whose_socket_has_no_folder_is_refused_and_kept_until_it_has_one }

const SOCKET: &str = "/run/talker.vsock";
/// The port of the host that the guest talks to, and the guest's that the host talks to.
const ECHO: u32 = 52;
const ANSWER: &str = "53";

fn connections_are_reset_by_live_updates_and_work_again_at_once_in_both_directions(
    architecture: Architecture,
) -> Result<()> {
    Host::with(HostConfig::new("vsock", architecture, 1024)?, |host| {
        start_echo(host)?;
        let loads = format!("lab.load=vsock,--port,{ECHO} lab.load=answer,--port,{ANSWER},--every,0");
        let vsock = format!("cid=5,socket={SOCKET}");
        let mut guest = Guest::linux("talker", 192).with(&loads).option("vsock", &vsock).start(host)?;
        guest.await_load(host, "vsock", 2)?;
        host.wait_until("the guest's echo", PATIENCE, |_| {
            guest.log.read_on()?;
            Ok(guest.log.loads.contains_key("answer").then_some(()))
        })?;
        reach(host)?;
        operator::rehearse(host, Side::Newer)?;
        guest.await_load(host, "vsock", 2)?;
        ensure!(count(&guest, "vsock", "connections")? == 1, "the rehearsal has cost a connection: {guest:?}");
        for (side, number) in [(Side::Newer, 1), (Side::Older, 2)] {
            stay_connected(host)?;
            operator::live_update_of_all(host, side, &Update::default())?;
            // First the host's connection, which nobody but the guest can make known to be new.
            reach(host)?;
            start_echo(host)?;
            guest.await_load(host, "vsock", 2)?;
            // One end for each connection of before: the client has its next one, and the echo, which only waits, has heard of it.
            let connections = count(&guest, "vsock", "connections")?;
            ensure!(connections == number + 1, "{connections} connections after {number} updates");
            let resets = count(&guest, "answer", "resets")?;
            ensure!(resets == number, "{resets} resets after {number} updates: {:?}", guest.log.loads);
        }
        guest.await_beats(host, 2)
    })
}

fn a_vm_whose_socket_has_no_folder_is_refused_and_kept_until_it_has_one(architecture: Architecture) -> Result<()> {
    Host::with(HostConfig::new("vsock-refused", architecture, 1024)?, |host| {
        host.run(&["mkdir", "/run/sockets"])?.success()?;
        let mut guest = Guest::oracle("talker", 64).option("vsock", "cid=5,socket=/run/sockets/vsock").start(host)?;
        guest.await_beats(host, 2)?;
        let second = Guest::oracle("second", 64).option("vsock", "cid=6,socket=/run/sockets/vsock").start(host)?;
        let said = host.wait(&second.process)?;
        ensure!(said.code == Some(1) && said.stderr.contains("another process listens at that path"), "{said}");
        guest.await_beats(host, 2)?;
        // A folder of the host's memory is gone with its kernel.
        let (restored, ended) = operator::live_update(host, Side::Newer, &Update::default())?;
        ensure!(ended.code == Some(operator::KEPT) && restored.result == "kept", "{ended}");
        let vm = restored.vm("talker")?;
        let reason = vm.reason.as_deref().unwrap_or_default();
        ensure!(vm.state == "kept" && reason.contains("the socket's folder is not there: make it"), "{vm:?}");
        guest.check_unharmed()?;
        host.run(&["mkdir", "/run/sockets"])?.success()?;
        host.run(&["vmm", "restore", "talker"])?.success()?;
        guest.await_beats(host, 2)
    })
}

/// Starts what answers the guest.
fn start_echo(host: &mut Host) -> Result<()> {
    let socket = format!("{SOCKET}_{ECHO}");
    let echo = host.spawn(&["lab-load", "echo", "--socket", &socket])?;
    host.wait_until("the echo", PATIENCE, |host| Ok(host.stdout(&echo)?.contains("listening").then_some(())))
}

/// A program of the host talks to the guest, with more data than either side has room for.
fn reach(host: &mut Host) -> Result<()> {
    let said = host.run(&["lab-load", "reach", "--socket", SOCKET, "--port", ANSWER, "--kib", "600"])?.success()?;
    ensure!(said.stdout.contains("echoed=614400"), "{said}");
    Ok(())
}

/// One that does so and stays.
fn stay_connected(host: &mut Host) -> Result<()> {
    let program = host.spawn(&["lab-load", "reach", "--socket", SOCKET, "--port", ANSWER, "--stay"])?;
    host.wait_until("the answer", PATIENCE, |host| Ok(host.stdout(&program)?.contains("echoed=1024").then_some(())))
}

/// A number in the last words of a load.
fn count(guest: &Running, load: &str, key: &str) -> Result<u64> {
    let said = guest.log.loads.get(load).with_context(|| format!("the guest has no load {load}"))?;
    said.number(key).with_context(|| format!("no {key} in {}", said.last))
}
