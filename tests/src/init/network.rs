//! The host's network: a bridge, with the emulator's network card in it and the taps that guests are to be plugged into. A kexec
//! destroys it, so it is made anew under each kernel, as a distribution's own set-up would, before anything is restored.
use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::process::Command;

/// What an administrator would type. The names of the taps come as arguments.
const SCRIPT: &str = "\
set -e
brctl addbr br0
brctl addif br0 eth0
ip link set eth0 up
ip link set br0 up
for tap; do
  tunctl -t $tap
  brctl addif br0 $tap
  ip link set $tap up
done";

/// Makes it, with these taps.
pub fn set_up<'a>(taps: impl Iterator<Item = &'a str>) -> Result<()> {
    let said = Command::new("sh").args(["-c", SCRIPT, "network"]).args(taps).output();
    let said = said.context("cannot start a shell for the network")?;
    ensure!(said.status.success(), "the network cannot be set up: {}", String::from_utf8_lossy(&said.stderr));
    Ok(())
}

/// Takes the emulator's network card out of use, if there is one. Linux breaks a virtio device's queues as it shuts down, and one without
/// commit 0d0eff39ceb3 ("virtio_ring: fix infinite loop in virtnet_poll_cleantx when device is broken") never leaves virtio_net's loop
/// if a packet comes just then: the host of guests that still send would hang instead of ending, once in some hundred times.
pub fn take_down() -> Result<()> {
    if !Path::new("/sys/class/net/br0").exists() {
        return Ok(());
    }
    let said = Command::new("ip").args(["link", "set", "eth0", "down"]).output();
    let said = said.context("cannot start ip for the network")?;
    ensure!(said.status.success(), "the network cannot be taken down: {}", String::from_utf8_lossy(&said.stderr));
    Ok(())
}
