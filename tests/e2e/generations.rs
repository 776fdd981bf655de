//! One update after another, on a host whose VMs come and go.
use anyhow::{Context, Result, ensure};
use tests::architecture::Architecture;
use tests::check;
use tests::guests::{Guest, Running, await_beats};
use tests::host::{Host, HostConfig, PATIENCE};
use tests::operator::{self, Update};

on_one_architecture! { aarch64, the_tenth_live_update_of_a_host_is_like_the_first }

/// How many guests there are at any time, of which one is there all the time.
const GUESTS: usize = 8;
/// MiB.
const MEMORY: [u32; 2] = [32, 48];

/// How many updates: all ten with two guests take as long as three with eight.
fn size() -> (u64, usize) {
    if check::is_full() { (10, GUESTS) } else { (10, 2) }
}

/// What must not grow.
#[derive(Clone, Debug)]
struct Footprint {
    /// KiB besides the guest's memory.
    memory: u64,
    /// Open files.
    files: u64,
    /// Bytes of the document.
    document: u64,
    /// Milliseconds.
    blackout: f64,
}

fn the_tenth_live_update_of_a_host_is_like_the_first(architecture: Architecture) -> Result<()> {
    let (updates, count) = size();
    Host::with(HostConfig::new("generations", architecture, 1536)?, |host| {
        let start = |host: &mut Host, number: usize, memory: u32| {
            Guest::resting_oracle(&format!("guest-{number}"), memory).start(host)
        };
        let mut guests: Vec<Running> = Vec::new();
        for number in 0..count {
            guests.push(start(host, number, MEMORY[0])?);
        }
        await_beats(host, &mut guests, 2)?;
        let mut footprints = Vec::new();
        for generation in 1..=updates {
            let restored = operator::live_update_of_all(host, host.kernel().other(), &Update::default())?;
            ensure!(restored.generation == generation && restored.vms.len() == guests.len(), "{restored:?}");
            ensure!(restored.vms.iter().all(|vm| vm.attempts == 1), "{restored:?}");
            await_beats(host, &mut guests, 1)?;
            footprints.push(footprint(host, &restored)?);
            // The last one is stopped, and a new one started; from the second update on the one before that, under its old name,
            // but with other memory.
            let number = guests.len() - 1;
            let name = guests[number].guest.name.clone();
            host.run(&["vmm", "stop", &name])?.success()?;
            let gone = |list: Vec<serde_json::Value>| list.iter().all(|vm| vm["name"] != name.as_str());
            host.wait_until("the VM's end", PATIENCE, |host| Ok(gone(operator::list(host)?).then_some(())))?;
            guests.pop();
            let (next, memory) = if generation % 2 == 0 {
                (number, MEMORY[(generation / 2 % 2) as usize])
            } else {
                (number + generation as usize * GUESTS, MEMORY[0])
            };
            guests.push(start(host, next, memory)?);
            guests[number].await_beats(host, 1)?;
        }
        let (first, last) = (&footprints[0], footprints.last().context("no footprints")?);
        for (number, Footprint { memory, files, document, blackout }) in footprints.iter().enumerate() {
            let number = number + 1;
            eprintln!(
                "update {number} of {count} guests: {memory} KiB beside the guest's memory, {files} open files, a document of \
                 {document} bytes, a blackout of {blackout:.0} ms"
            );
        }
        ensure!(operator::status(host, "guest-0")?["generation"] == updates, "the VM does not know its generation");
        ensure!(last.files == first.files, "open files have become more");
        ensure!(last.document == first.document, "the document has grown");
        ensure!(last.memory <= first.memory + first.memory / 10, "memory besides the guest's has grown");
        Ok(())
    })
}

/// Of the guest that is there all the time.
fn footprint(host: &mut Host, restored: &operator::Restored) -> Result<Footprint> {
    let vm = restored.vm("guest-0")?;
    let pid = operator::pid(host, "guest-0")?;
    let status = host.read(&format!("/proc/{pid}/status"))?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name}"))?;
        let number = line.split_whitespace().next().with_context(|| format!("{name} is empty"))?;
        number.parse::<u64>().with_context(|| format!("{name} is no number: {number}"))
    };
    let listed = host.run(&["ls", &format!("/proc/{pid}/fd")])?.success()?;
    Ok(Footprint {
        memory: field("RssAnon:")?,
        files: listed.stdout.split_whitespace().count() as u64,
        document: vm.document_bytes,
        blackout: vm.blackout_ms.context("no blackout")?,
    })
}
