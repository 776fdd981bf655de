//! A Linux guest with several vCPUs that works hard while its host's kernel is replaced: nothing of its work is lost.
use anyhow::{Context, Result, ensure};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use tests::architecture::Architecture;
use tests::check;
use tests::guests::{Guest, Running};
use tests::host::{Host, HostConfig, Side};
use tests::load::stream::Peer;
use tests::operator::{self, Update};
use tests::{image, paths, run};

on_one_architecture! { x86_64, a_guest_under_every_load_at_once_loses_nothing_in_live_updates }

/// How many vCPUs the guest has, and which kernels it goes to. The whole takes too long for every run, as an emulated x86_64 host has
/// one processor for all of it.
fn size() -> (u32, &'static [Side]) {
    if check::is_full() { (4, &[Side::Newer, Side::Older, Side::Newer]) } else { (2, &[Side::Newer]) }
}

/// MiB of the disk that is never flushed, and of the one with a file system.
const DISKS: (u32, u32) = (8, 48);
/// Beats of each load before the first update and after each one: a second or more each.
const BEATS: u64 = 2;
/// Where the host's program listens that the guest talks to.
const ECHO: &str = "/run/worker.vsock_52";

/// The loads by their names, with what `lab-load` is told.
const LOADS: &[(&str, &str)] = &[
    ("records", "--file,/data/records"),
    ("unflushed", "--target,/dev/vda,--mib,8"),
    ("reader", "--file,/data/checked,--mib,4"),
    ("ticks", "--hz,100"),
    ("work", "--threads,4,--mib,4"),
    ("vsock", "--port,52"),
    ("stream", "--kib-per-second,32,--peer"),
];

fn a_guest_under_every_load_at_once_loses_nothing_in_live_updates(architecture: Architecture) -> Result<()> {
    let (cpus, sides) = size();
    let file_system = paths::lab(architecture).join("load-file-system");
    image::file_system(&file_system, DISKS.1)?;
    let peer = Peer::start(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
    let config = HostConfig::new("load", architecture, 1280)?.with_disk(DISKS.0).with_image(&file_system);
    Host::with(config.with_taps(&["tap0"]), |host| {
        start_echo(host)?;
        let mut guest = worker(&peer, cpus).start(host)?;
        await_loads(host, &mut guest)?;
        for side in sides {
            operator::live_update_of_all(host, *side, &Update::default())?;
            start_echo(host)?;
            await_loads(host, &mut guest)?;
        }
        // No chance to put anything in order.
        host.run(&["killall", "-9", "vmm"])?.success()?;
        guest.log.read_on()?;
        guest.check_unharmed()?;
        ensure!(!peer.has_finished(), "the stream has come to an end after {} bytes", peer.received());
        for (name, load) in &guest.log.loads {
            eprintln!("{name}: {} signs of life, pauses in ms: {:?}", load.beats, load.pauses);
        }
        let told = guest.log.loads["records"].number("told").context("no record was told")?.to_string();
        // The host's kernel replays the journal. Every record that was told is there, whole and in order.
        host.run(&["mount", "-t", "ext4", "/dev/vdb", "/data"])?.success()?;
        let check = ["lab-load", "check-records", "--file", "/data/records", "--told", &told];
        eprintln!("told={told} {}", host.run(&check)?.success()?.stdout.trim());
        host.run(&["umount", "/data"])?.success()?;
        host.power_off()?;
        run::quietly(Command::new("e2fsck").args(["-f", "-n"]).arg(host.image_copy()))?;
        Ok(())
    })
}

fn worker(peer: &Peer, cpus: u32) -> Guest {
    let port = peer.address.port();
    let guest = Guest::linux("worker", 256).cpus(cpus).with("lab.net=10.0.2.15/24 lab.data=vdb");
    let guest = LOADS.iter().fold(guest, |guest, (name, options)| match *name {
        "stream" => guest.with(&format!("lab.load={name},{options},10.0.2.2:{port}")),
        _ => guest.with(&format!("lab.load={name},{options}")),
    });
    guest
        .flag("rng")
        .flag("balloon")
        .option("disk", "/dev/vda")
        .option("disk", "/dev/vdb")
        .option("net", "tap=tap0")
        .option("vsock", "cid=3,socket=/run/worker.vsock")
}

fn await_loads(host: &mut Host, guest: &mut Running) -> Result<()> {
    guest.await_beats(host, BEATS)?;
    LOADS.iter().try_for_each(|(name, _)| guest.await_load(host, name, BEATS))
}

/// Starts what answers the guest over vsock; it ends with the host's kernel.
fn start_echo(host: &mut Host) -> Result<()> {
    host.spawn(&["lab-load", "echo", "--socket", ECHO]).map(drop)
}
