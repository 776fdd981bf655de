//! Networks: a connection of a guest outlives the host's kernel, and so its taps and bridges; and no tap has two users, or is made up.
use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use tests::architecture::Architecture;
use tests::guests::{Guest, Running};
use tests::host::{Host, HostConfig, PATIENCE, Side};
use tests::load::stream::Peer;
use tests::operator::{self, Update};

on_each_architecture![
    a_tcp_stream_to_a_peer_outside_of_the_host_goes_on_through_live_updates_and_the_guest_announces_itself
];
on_one_architecture! {
    aarch64, a_tap_in_use_is_refused_to_a_second_vm_and_a_vm_whose_tap_is_missing_is_kept_while_others_run
}

/// The guest's address.
const GUEST: [u8; 4] = [10, 0, 2, 15];
/// This machine's, from behind the lab's network.
const PEER: &str = "10.0.2.2";

fn a_tcp_stream_to_a_peer_outside_of_the_host_goes_on_through_live_updates_and_the_guest_announces_itself(
    architecture: Architecture,
) -> Result<()> {
    let peer = Peer::start(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
    Host::with(HostConfig::new("network", architecture, 1024)?.with_taps(&["tap0"]), |host| {
        let address = Ipv4Addr::from(GUEST);
        let load = format!("lab.net={address}/24 lab.load=stream,--peer,{PEER}:{}", peer.address.port());
        let mut guest = Guest::linux("streamer", 192).with(&load).option("net", "tap=tap0").start(host)?;
        guest.await_load(host, "stream", 3)?;
        check_offloads(host)?;
        for side in [Side::Newer, Side::Older] {
            let announced = announcements(host)?;
            operator::live_update_of_all(host, side, &Update::default())?;
            guest.await_load(host, "stream", 5)?;
            host.wait_until("the guest's announcement", PATIENCE, |host| {
                Ok((announcements(host)? > announced).then_some(()))
            })?;
        }
        guest.await_beats(host, 2)?;
        check_stream(&guest, &peer)?;
        // One address all the time, which is nobody's but this VM's.
        let frames = host.traffic()?;
        let senders: BTreeSet<_> =
            frames.iter().filter(|frame| frame.is_from(GUEST)).map(|frame| frame.sender()).collect();
        ensure!(senders.len() == 1 && senders.iter().flatten().all(|address| address[0] == 2), "{senders:x?}");
        eprintln!("pauses of the stream in ms: {:?}", guest.log.loads["stream"].pauses);
        Ok(())
    })
}

/// The guest leaves it to the host to cut its stream into frames.
fn check_offloads(host: &mut Host) -> Result<()> {
    let mut packets = |way: &str| -> Result<usize> {
        Ok(host.read(&format!("/sys/class/net/tap0/statistics/{way}_packets"))?.trim().parse()?)
    };
    let (from_guest, to_guest) = (packets("rx")?, packets("tx")?);
    let frames = host.traffic()?;
    let sent = frames.iter().filter(|frame| frame.is_from(GUEST)).count();
    eprintln!(
        "the guest has sent {from_guest} and received {to_guest} frames, which on the wire are {sent} of {}",
        frames.len()
    );
    // Its acknowledgements are frames in any case.
    ensure!(from_guest * 4 < sent * 3, "the guest sends {from_guest} frames, and the wire sees {sent}");
    Ok(())
}

/// How often the guest has told the network where it is.
fn announcements(host: &mut Host) -> Result<usize> {
    Ok(host.traffic()?.iter().filter(|frame| frame.announces(GUEST)).count())
}

/// The peer has had all that the guest says it got back, and both are still at it.
fn check_stream(guest: &Running, peer: &Peer) -> Result<()> {
    ensure!(!peer.has_finished(), "the peer has come to an end after {} bytes", peer.received());
    let load = guest.log.loads.get("stream").context("the guest has no stream")?;
    let back = load.number("received").with_context(|| format!("no number in {}", load.last))?;
    ensure!(back > 0 && peer.received() >= back, "{back} bytes came back of {}", peer.received());
    Ok(())
}

fn a_tap_in_use_is_refused_to_a_second_vm_and_a_vm_whose_tap_is_missing_is_kept_while_others_run(
    architecture: Architecture,
) -> Result<()> {
    Host::with(HostConfig::new("network-refused", architecture, 1024)?.with_taps(&["tap0"]), |host| {
        let mut owner = Guest::oracle("owner", 64).option("net", "tap=tap0").start(host)?;
        let mut other = Guest::oracle("other", 64).start(host)?;
        owner.await_beats(host, 2)?;
        for (tap, reason) in [("tap0", "somebody else uses this tap"), ("tap1", "ip tuntap add dev tap1 mode tap")] {
            let refused = Guest::oracle("refused", 64).option("net", &format!("tap={tap}")).start(host)?;
            let said = host.wait(&refused.process)?;
            ensure!(said.code == Some(1) && said.stderr.contains(reason), "{said}");
        }
        owner.await_beats(host, 2)?;
        other.await_beats(host, 2)?;
        // The next kernel comes up with a bridge and no tap.
        let update = Update { append: "kho_vmm.taps=", ..Update::default() };
        let (restored, ended) = operator::live_update(host, Side::Newer, &update)?;
        ensure!(ended.code == Some(operator::KEPT) && restored.result == "kept", "{ended}");
        let vm = restored.vm("owner")?;
        let reason = vm.reason.as_deref().unwrap_or_default();
        ensure!(vm.state == "kept" && reason.contains("ip tuntap add dev tap0 mode tap"), "{vm:?}");
        ensure!(vm.attempts <= 1, "a tap that is not there was looked for again: {vm:?}");
        let list = operator::list(host)?;
        let kept = list.iter().find(|vm| vm["name"] == "owner").with_context(|| format!("no owner in {list:?}"))?;
        ensure!(kept["state"] == "kept", "{kept}");
        other.await_beats(host, 3)?;
        owner.check_unharmed()
    })
}
