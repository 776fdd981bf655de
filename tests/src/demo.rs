//! The main job: two guests on one host, carried from one kernel to the next and back, with a timeline of each.
mod report;

use crate::architecture::{Accelerator, Architecture};
use crate::guests::{Guest, Kind, Running, await_beats};
use crate::host::{Host, HostConfig, Side};
use crate::load::stream::Peer;
use crate::operator::{self, Restored, Update};
use anyhow::{Context, Result};
use report::{GuestReport, Report, Results, UpdateReport};
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Instant;

/// Signs of life (one a second at most) that each guest gives before, between and after the updates.
const BEATS: u64 = 3;

/// MiB of the Linux guest's disk.
const DISK: u32 = 16;

/// What the demo can be told.
#[derive(Clone, Debug)]
pub struct Options {
    /// The folder under `target/lab/ARCH` for its logs.
    pub name: String,
    /// What to emulate.
    pub architecture: Architecture,
    /// By what; None for the best there is.
    pub accelerator: Option<Accelerator>,
    /// Where to write the result.
    pub json: Option<PathBuf>,
}

/// Says what happens, and when.
struct Narrator {
    start: Instant,
}

impl Narrator {
    fn say(&self, text: &str) {
        println!("[{:6.1} s] {text}", self.start.elapsed().as_secs_f64());
    }
}

/// Runs the demo and returns whether it passed. An error means that not even a result could be written.
pub fn run(options: &Options) -> Result<bool> {
    let narrator = Narrator { start: Instant::now() };
    let mut report = Report::new(options.architecture);
    match carry(options, &narrator, &mut report) {
        Ok(()) => {}
        Err(error) => {
            println!("\n{error:#}");
            report.result = Results::Fail;
        }
    }
    print!("\n{report}");
    if let Some(path) = &options.json {
        fs::write(path, report.to_json()?).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let passed = report.result == Results::Pass;
    println!("{} after {:.0} s", if passed { "PASS" } else { "FAIL" }, narrator.start.elapsed().as_secs_f64());
    Ok(passed)
}

fn carry(options: &Options, narrator: &Narrator, report: &mut Report) -> Result<()> {
    narrator.say("building vmm, the lab and the oracle");
    let peer = Peer::start(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
    let mut config = HostConfig::new(&options.name, options.architecture, 2048)?.with_disk(DISK).with_taps(&["tap0"]);
    if let Some(accelerator) = options.accelerator {
        config.accelerator = accelerator;
    }
    narrator.say(&format!("starting a {} host in QEMU ({})", options.architecture.name(), config.accelerator.name()));
    Host::with(config, |host| {
        narrator.say(&format!("the host runs Linux {}", host.hello().release));
        let mut bare = Vec::new();
        for to in [Side::Newer, Side::Older] {
            let milliseconds = host.kexec(to)?;
            narrator.say(&format!("a bare kexec to Linux {} takes {milliseconds:.0} ms", host.hello().release));
            bare.push((to, milliseconds));
        }
        let mut guests = [Guest::resting_oracle("oracle", 64), linux(&peer, host.config().cpus)]
            .into_iter()
            .map(|guest| guest.start(host))
            .collect::<Result<Vec<_>>>()?;
        await_beats(host, &mut guests, BEATS)?;
        narrator.say("the oracle and a busybox Linux with a disk and a TCP stream to this machine run side by side");
        for (to, bare_kexec_ms) in bare {
            let from = host.hello().release.clone();
            narrator.say(&format!("vmm check: {}", operator::check(host, to)?));
            narrator.say(&format!("vmm update: Linux {from} is to give way to {}", host.version(to)));
            let restored = operator::live_update_of_all(host, to, &Update::default())?;
            narrator.say(&format!("vmm restore: the guests run on under Linux {}", host.hello().release));
            let lived = await_beats(host, &mut guests, BEATS)
                .and_then(|()| guests.iter_mut().try_for_each(|guest| await_stream(host, guest)));
            report.updates.push(summary(host, from, bare_kexec_ms, &restored, &guests)?);
            lived?;
            narrator.say(&format!("both have given {BEATS} more signs of life without damage"));
        }
        report.result = Results::Pass;
        host.power_off()
    })
}

/// A busybox Linux with as many vCPUs as the host has processors, that writes to a disk and reads it back, and sends a stream to this
/// machine, which sends it back.
fn linux(peer: &Peer, cpus: u32) -> Guest {
    let port = peer.address.port();
    Guest::linux("linux", 192)
        .cpus(cpus)
        .with(&format!(
            "lab.disk=vda lab.rng=1 lab.net=10.0.2.15/24 lab.load=stream,--kib-per-second,32,--peer,10.0.2.2:{port}"
        ))
        .option("disk", "/dev/vda")
        .option("net", "tap=tap0")
        .flag("rng")
}

/// The stream goes on by itself.
fn await_stream(host: &mut Host, guest: &mut Running) -> Result<()> {
    if guest.guest.kind == Kind::Linux { guest.await_load(host, "stream", 1) } else { Ok(()) }
}

fn summary(
    host: &Host,
    from: String,
    bare_kexec_ms: f64,
    restored: &Restored,
    guests: &[Running],
) -> Result<UpdateReport> {
    let guests = guests
        .iter()
        .map(|running| {
            let vm = restored.vm(&running.guest.name)?;
            Ok(GuestReport {
                name: vm.name.clone(),
                kind: running.guest.kind.name(),
                damage: running.log.damage.clone(),
                blackout_ms: vm.blackout_ms.with_context(|| format!("{} has no blackout", vm.name))?,
                document_bytes: vm.document_bytes,
                phases: vm.phases.clone(),
            })
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(UpdateReport {
        from,
        to: host.hello().release.clone(),
        generation: restored.generation,
        blackout_ms: guests.iter().map(|guest| guest.blackout_ms).fold(0.0, f64::max),
        bare_kexec_ms,
        guests,
    })
}
