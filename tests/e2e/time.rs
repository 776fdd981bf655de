//! Time goes on through updates: the clocks of a guest, and the host's own.
use anyhow::{Context, Result, ensure};
use tests::architecture::Architecture;
use tests::guests::{Guest, Running};
use tests::host::{Host, HostConfig, PATIENCE, Side};
use tests::moment::Moment;
use tests::operator::{self, Update};

on_each_architecture![clocks_go_on_by_what_the_counter_has_counted];

/// How far a clock may be off after an update, in milliseconds.
const TOLERANCE: f64 = 10.0;
/// So many readings, a second apart, before and after each update.
const READINGS: usize = 6;
/// An hour in milliseconds.
const HOUR: f64 = 3_600_000.0;

fn clocks_go_on_by_what_the_counter_has_counted(architecture: Architecture) -> Result<()> {
    Host::with(HostConfig::new("time", architecture, 1024)?, |host| {
        // In 2031: no real-time clock knows that, so that the next kernel can have it from the last one only.
        host.run(&["date", "-s", "@1925000000"])?.success()?;
        let mut earlier = host.moment()?;
        let mut guest = Guest::linux("linux", 192).with("lab.load=clocks").start(host)?;
        for (to, sets, append) in
            [(Side::Newer, true, ""), (Side::Older, false, "kho_vmm.restore_options=--no-set-clock")]
        {
            let first = moments(&guest).len();
            await_moments(host, &mut guest, READINGS)?;
            let before = host.moment()?;
            let (restored, ended) = operator::live_update(host, to, &Update { append, ..Update::default() })?;
            let after = host.moment()?;
            ensure!(ended.code == Some(0) && restored.result == "restored", "{ended}");

            let frequency = before.frequency_since(&earlier);
            let ahead = after.ahead(&before, frequency, |moment| moment.realtime);
            let unknown = after.uncertainty(&before, frequency);
            let event = ended.json_lines()?.into_iter().find(|line| line["event"] == "clock");
            let event = event.with_context(|| format!("nothing is said about the clock: {ended}"))?;
            println!("host: {ahead:+.2} ms (±{unknown:.2}) to Linux {}: {event}", host.version(to));
            if sets {
                ensure!(event["action"] == "set", "{event}");
                ensure!(
                    ahead.abs() <= TOLERANCE + unknown,
                    "the host's clock is off by {ahead} ms (±{unknown}): {event}"
                );
            } else {
                ensure!(event["action"] == "left", "{event}");
                ensure!(ahead.abs() > HOUR, "the host's clock has been set all the same: {ahead} ms");
                let told = event["off_ms"].as_f64().context("it is not said how far the clock is off")?;
                // What is told is as old as the rest of the restore is long; the clock runs as fast as the counter meanwhile.
                ensure!((told - ahead).abs() <= TOLERANCE + unknown, "{told} ms are told, {ahead} ms are true");
            }
            earlier = after;

            await_moments(host, &mut guest, READINGS)?;
            let vm = restored.vm("linux")?;
            check_guest(&moments(&guest)[first..], vm.counter_hz, vm.blackout_ms.context("the VM has no blackout")?)?;
        }
        host.power_off()
    })
}

/// What the guest has read so far.
fn moments(guest: &Running) -> &[Moment] {
    guest.log.loads.get("clocks").map_or(&[], |load| &load.moments)
}

fn await_moments(host: &mut Host, guest: &mut Running, more: usize) -> Result<()> {
    // What it has said until now, be it unread: it went on for a while after an update had begun.
    guest.log.read_on()?;
    let goal = moments(guest).len() + more;
    host.wait_until("the guest's clocks", PATIENCE, |_| {
        guest.log.read_on()?;
        guest.check_unharmed()?;
        Ok((moments(guest).len() >= goal).then_some(()))
    })
}

/// That from each reading to the next all clocks have gone on by what the counter of that frequency says. Somewhere between them the
/// guest did not run for so many milliseconds.
fn check_guest(moments: &[Moment], frequency: f64, blackout: f64) -> Result<()> {
    let (mut worst, mut longest) = ([0.0_f64; 3], 0.0_f64);
    for pair in moments.windows(2) {
        let [before, after] = pair else { continue };
        let clocks: [fn(&Moment) -> u64; 3] =
            [|moment| moment.realtime, |moment| moment.monotonic, |moment| moment.boottime];
        let counted = (after.counter - before.counter) as f64 / frequency * 1e3;
        longest = longest.max(counted);
        let unknown = after.uncertainty(before, frequency);
        for ((clock, name), worst) in clocks.into_iter().zip(["REALTIME", "MONOTONIC", "BOOTTIME"]).zip(&mut worst) {
            let ahead = after.ahead(before, frequency, clock);
            *worst = worst.max(ahead.abs());
            ensure!(
                ahead.abs() <= TOLERANCE + unknown,
                "CLOCK_{name} is {ahead} ms (±{unknown}) ahead of the counter after {counted} ms: {before:?}, {after:?}"
            );
        }
    }
    println!(
        "guest: clocks off by at most {worst:.2?} ms, {longest:.0} ms between two readings, blackout {blackout:.0} ms"
    );
    ensure!(
        longest >= blackout,
        "the guest does not know of its blackout of {blackout} ms, at most {longest} ms passed"
    );
    Ok(())
}
