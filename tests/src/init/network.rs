//! The host's network: a bridge, with the emulator's network card in it and the taps that guests are to be plugged into. A kexec
//! destroys it, so it is made anew under each kernel, as a distribution's own set-up would, before anything is restored.
use anyhow::{Context, Result, ensure};
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
