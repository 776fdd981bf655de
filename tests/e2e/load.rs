//! A Linux guest with several vCPUs that works hard while its host's kernel is replaced: nothing of its work is lost.
use anyhow::Result;
use tests::architecture::Architecture;
use tests::guests::Guest;
use tests::host::{Host, HostConfig, Side};
use tests::operator::{self, Update};

on_each_architecture![a_guest_with_four_vcpus_loses_nothing_of_its_work_in_live_updates];

const CPUS: u32 = 4;

fn a_guest_with_four_vcpus_loses_nothing_of_its_work_in_live_updates(architecture: Architecture) -> Result<()> {
    Host::with(HostConfig::new("load", architecture, 1024)?, |host| {
        let guest = Guest::linux("worker", 256).cpus(CPUS).with("lab.load=ticks lab.load=work,--threads,4,--mib,4");
        let mut guest = guest.start(host)?;
        guest.await_beats(host, 3)?;
        for side in [Side::Newer, Side::Older, Side::Newer] {
            operator::live_update_of_all(host, side, &Update::default())?;
            guest.await_beats(host, 3)?;
        }
        guest.check_unharmed()
    })
}
