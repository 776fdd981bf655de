//! Several vCPUs: they stay what they are to each other, wherever a freeze finds them.
use anyhow::{Context, Result, ensure};
use guest_kernel::pattern::scramble;
use std::time::{Duration, SystemTime};
use tests::architecture::Architecture;
use tests::check;
use tests::guests::{Guest, Running, await_beats};
use tests::host::{Host, HostConfig, Side};
use tests::operator::{self, Update};

on_each_architecture![four_vcpus_outlive_a_change_of_kernel_and_the_way_back];
on_one_architecture! { aarch64, vcpus_in_a_storm_of_interrupts_outlive_updates_at_any_instant }

/// How often the guest in a storm is frozen. In an emulated host a hundred take too long for every run.
fn freezes() -> u64 {
    if check::is_full() { 100 } else { 10 }
}

/// Within how many milliseconds the instant of each is.
const WITHIN_MS: u64 = 300;
/// A storm leaves vCPUs no rest, and an emulated host has few processors: ticks are rare enough that there is time between them.
const STORM: &str = "load=ipi-storm tick_ms=50";
/// Repeats a run: the number that it has printed.
const SEED: &str = "KHO_VMM_LAB_SEED";

fn four(name: &str, append: &str) -> Guest {
    Guest::oracle(name, 32).with(append).option("cpus", "4")
}

fn four_vcpus_outlive_a_change_of_kernel_and_the_way_back(architecture: Architecture) -> Result<()> {
    Host::with(HostConfig::new("processors", architecture, 1024)?, |host| {
        // All in use; and one that is never started, beside one that is switched off and on all the time.
        let mut guests = [four("all", "").start(host)?, four("some", "cpus=3 hotplug=on").start(host)?];
        await_beats(host, &mut guests, 3)?;
        for to in [Side::Newer, Side::Older] {
            let before = counts(&guests)?;
            operator::live_update_of_all(host, to, &Update::default())?;
            await_beats(host, &mut guests, 3)?;
            for ((guest, before), after) in guests.iter().zip(before).zip(counts(&guests)?) {
                let name = &guest.guest.name;
                ensure!(after > before, "the vCPUs of {name} no longer interrupt each other: {before} to {after}");
            }
        }
        Ok(())
    })
}

fn vcpus_in_a_storm_of_interrupts_outlive_updates_at_any_instant(architecture: Architecture) -> Result<()> {
    Host::with(HostConfig::new("storm", architecture, 1024)?, |host| {
        let mut random = seed()?;
        eprintln!("{SEED}={random}");
        let mut guests =
            [four("storm", STORM).start(host)?, four("hotplug", &format!("{STORM} hotplug=on")).start(host)?];
        await_beats(host, &mut guests, 2)?;
        for number in 1..=freezes() {
            random = scramble(random);
            // There is nothing to wait for: any instant will do.
            std::thread::sleep(Duration::from_millis(random % WITHIN_MS));
            operator::rehearse(host, Side::Newer)?;
            // Not a sign of life after each: then all would be frozen soon after one.
            let more = u64::from(number.is_multiple_of(5));
            await_beats(host, &mut guests, more).with_context(|| format!("after freeze {number}"))?;
        }
        // What was only written down so far is put back, too.
        for to in [Side::Newer, Side::Older] {
            operator::live_update_of_all(host, to, &Update::default())?;
            await_beats(host, &mut guests, 2)?;
        }
        Ok(())
    })
}

fn seed() -> Result<u64> {
    match std::env::var(SEED) {
        Ok(seed) => seed.parse().with_context(|| format!("'{seed}' is not a value of {SEED}")),
        Err(_) => Ok(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_nanos() as u64),
    }
}

/// How many interrupts of each guest have gone from one vCPU to another.
fn counts(guests: &[Running]) -> Result<Vec<u64>> {
    let count = |guest: &Running| {
        guest.log.number("ipis").with_context(|| format!("{} does not count interrupts", guest.guest.name))
    };
    guests.iter().map(count).collect()
}
