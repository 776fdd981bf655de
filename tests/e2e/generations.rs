//! One update after another.
use anyhow::{Result, ensure};
use tests::architecture::Architecture;
use tests::guests::Guest;
use tests::host::{Host, HostConfig, Side};
use tests::operator::{self, Update};

on_one_architecture! { aarch64, the_tenth_live_update_of_a_guest_is_like_the_first }

fn the_tenth_live_update_of_a_guest_is_like_the_first(architecture: Architecture) -> Result<()> {
    Host::with(HostConfig::new("generations", architecture, 1024)?, |host| {
        let mut oracle = Guest::oracle("oracle", 64).start(host)?;
        oracle.await_beats(host, 2)?;
        let mut blackouts = Vec::new();
        for generation in 1..=10 {
            let restored = operator::live_update_of_all(host, Side::Older, &Update::default())?;
            let vm = restored.vm("oracle")?;
            ensure!(restored.generation == generation && vm.attempts == 1, "{restored:?}");
            blackouts.extend(vm.blackout_ms);
            oracle.await_beats(host, 2)?;
        }
        eprintln!("blackouts in ms: {blackouts:.0?}");
        ensure!(blackouts.len() == 10, "some update had no blackout: {blackouts:?}");
        ensure!(operator::status(host, "oracle")?["generation"] == 10, "the VM does not know its generation");
        Ok(())
    })
}
