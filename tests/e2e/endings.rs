//! How guests end, and that damage does not go unnoticed.
use anyhow::{Context, Result, ensure};
use guest_kernel::options::SelfTest;
use tests::architecture::Architecture;
use tests::guests::{Guest, Running};
use tests::host::{Host, HostConfig, PATIENCE, Side};
use tests::operator::{self, GUEST_RESET, GUEST_TRIPLE_FAULT, Update};

on_each_architecture![each_way_a_guest_can_end_has_its_exit_status];
on_one_architecture! { x86_64, damage_does_not_go_unnoticed }

fn each_way_a_guest_can_end_has_its_exit_status(architecture: Architecture) -> Result<()> {
    Host::with(HostConfig::new("endings", architecture, 1024)?, |host| {
        // Only x86_64 gives up when a fault cannot be handled; elsewhere the processor tries for ever.
        let triple_fault = (Guest::oracle("oracle", 32).with("lines=1 end=triple-fault"), GUEST_TRIPLE_FAULT);
        let endings = [
            (Guest::oracle("oracle", 32).with("lines=1 end=poweroff"), 0),
            (Guest::oracle("oracle", 32).with("lines=1 end=reset"), GUEST_RESET),
            (Guest::linux("linux", 192).with("lab.lines=1 lab.end=poweroff"), 0),
            (Guest::linux("linux", 192).with("lab.lines=1 lab.end=reboot"), GUEST_RESET),
        ];
        for (guest, status) in endings.into_iter().chain((architecture == Architecture::X86_64).then_some(triple_fault))
        {
            let append = guest.append.clone();
            let mut running = guest.start(host)?;
            running.await_end(host)?;
            let found = running.status(host)?;
            ensure!(found == status, "a guest with{append} ended with {found}, not {status}");
            running.check_unharmed()?;
        }
        // One that ends after a live update, as it says a line a second, is neither restored again nor started anew.
        let end = if architecture == Architecture::X86_64 { "triple-fault" } else { "reset" };
        let guest = Guest::resting_oracle("restored", 32).with(&format!("lines=25 end={end}"));
        let mut running = guest.start(host)?;
        running.await_beats(host, 1)?;
        let restored = operator::live_update_of_all(host, Side::Newer, &Update::default())?;
        ensure!(restored.vms.len() == 1, "it had ended before: {restored:?}");
        running.await_end(host)?;
        host.wait_until("the VM's end", PATIENCE, |host| Ok(operator::list(host)?.is_empty().then_some(())))?;
        running.log.read_on()?;
        running.check_unharmed()
    })
}

fn damage_does_not_go_unnoticed(architecture: Architecture) -> Result<()> {
    Host::with(HostConfig::new("self-test", architecture, 1024)?, |host| {
        // A Linux guest tells what its kernel complains of. Its command line is among what the kernel says.
        let mut complaining = Guest::linux("complaining", 192).with("lab.said=WARNING:").start(host)?;
        let damage = complaining.await_damage(host)?;
        ensure!(damage.contains("kernel"), "{damage}");
        kill(host, &complaining)?;
        for (name, what) in SelfTest::offered_on(architecture.name()) {
            let append = format!("selftest={name} lost_ms=1000");
            let cpus = if what.takes_processors() { "2" } else { "1" };
            let guest = Guest::oracle(&format!("breaks-{name}"), 32).with(&append).option("cpus", cpus);
            let mut running = guest.start(host)?;
            if what == SelfTest::Pause {
                running.await_beats(host, 4)?;
                ensure!(!running.log.pauses.is_empty(), "the oracle slept through its own pause");
            } else {
                let damage = running.await_damage(host).with_context(|| format!("after {append}"))?;
                // The lab's kernels are built without SVE, so its registers cannot be broken.
                let missing = what == SelfTest::Sve;
                ensure!(damage.contains("refused=") == missing, "after {append}: {damage}");
            }
            kill(host, &running)?;
        }
        Ok(())
    })
}

fn kill(host: &mut Host, running: &Running) -> Result<()> {
    host.signal(running.process.pid, 9)?;
    host.wait(&running.process)?;
    Ok(())
}
