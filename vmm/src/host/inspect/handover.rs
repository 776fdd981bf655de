//! What this host has been handed, and what it is about to hand over: the kernel's own tree.

use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use kho_abi::kernel::dump::{Dump, Recorder};
use kho_abi::kernel::handover::{self, Handover};
use kho_abi::kernel::luo::{self, File, Luo};
use kho_abi::kernel::memblock::Region;
use kho_abi::kernel::metadata::{self, Metadata};
use kho_abi::kernel::radix::Preserved;
use kho_abi::kernel::root::Root;
use kho_abi::kernel::{Limits, PhysMem};
use serde_json::{Map, Value, json};

use super::{Inspected, Outline};
use crate::host::kcore::{self, Kcore};
use crate::host::report;

/// Where the kernel shows its side of the handover.
const DEBUGFS: &str = "/sys/kernel/debug/kho";
/// The kernel's variable whose first word points to the outgoing tree.
const OUTGOING: &str = "kho_out";

fn path(name: &str) -> PathBuf {
    Path::new(DEBUGFS).join(name)
}

/// Something that was looked for: the lines for it, its JSON. What cannot be read says so, and hides nothing else.
fn part(label: &str, found: Result<(Outline, Value)>) -> (Outline, Value) {
    found.unwrap_or_else(|error| {
        let reason = format!("{error:#}");
        (Outline::new(label, format!("cannot be read: {reason}")), json!({"unreadable": reason}))
    })
}

/// Both sides, or the one that is asked for.
pub fn inspect(incoming: bool, outgoing: bool) -> Result<Inspected> {
    let both = incoming == outgoing;
    let mut outline = Outline::new("handover of this host", "");
    let mut json = Map::new();
    let mut add = |label: &str, name: &str, found: Result<(Outline, Value)>| {
        let (lines, value) = part(label, found);
        json.insert(name.to_owned(), value);
        outline = std::mem::take(&mut outline).with(lines);
    };
    if both || incoming {
        add("incoming", "incoming", self::incoming());
    }
    if both || outgoing {
        add("outgoing", "outgoing", self::outgoing());
        add("scratch", "scratch", scratch());
    }
    Ok(Inspected { outline, json: json.into() })
}

fn read(name: &str) -> Result<Vec<u8>> {
    let path = path(name);
    let explained = |error: io::Error| {
        let hint = match error.kind() {
            io::ErrorKind::NotFound if !Path::new(DEBUGFS).exists() => {
                " (is debugfs mounted, and kho=on on the kernel's command line?)"
            }
            _ => "",
        };
        anyhow::Error::from(error).context(format!("{}{hint}", path.display()))
    };
    fs::read(&path).map_err(explained)
}

/// Whether another kernel has handed over to this one.
pub fn was_handed_something() -> bool {
    path("in").exists()
}

/// Of what the last kernel has handed over this one has freed the most while it booted.
fn incoming() -> Result<(Outline, Value)> {
    if Path::new(DEBUGFS).exists() && !was_handed_something() {
        let nothing = "nothing: this kernel was not started by a live update";
        return Ok((Outline::new("incoming", nothing), Value::Null));
    }
    let root = Root::decode(&read("in/fdt")?, "/")?;
    let mut outline = Outline::new("incoming", root.version.name());
    let mut json = json!({"version": root.version.name()});
    for subtree in &root.subtrees {
        let at = format!("at {:#x}", subtree.address);
        let line = if subtree.name == metadata::NAME {
            let bytes = read(&format!("in/sub_fdts/{}", metadata::NAME))?;
            let Metadata { previous_release, kexec_count } = Metadata::decode(&bytes, "/kexec-metadata")?;
            json["previous_release"] = json!(previous_release);
            json["kexec_count"] = json!(kexec_count);
            Outline::new(&subtree.name, format!("from Linux {previous_release}, kexec number {kexec_count}"))
        } else {
            Outline::new(&subtree.name, at).with_value("cannot be read any more: the kernel has freed it")
        };
        outline = outline.with(line);
    }
    let names: Vec<&str> = root.subtrees.iter().map(|subtree| subtree.name.as_str()).collect();
    json["subtrees"] = json!(names);
    let map = format!("at {:#x}, cannot be read any more: the kernel has freed it", root.memory_map);
    Ok((outline.with(Outline::new("map of preserved memory", map)), json))
}

/// Where the tree is that is about to be handed over.
pub fn outgoing_root(memory: &Kcore) -> Result<u64> {
    let [variable] = kcore::symbols([OUTGOING])?;
    let tree = memory.word(variable)?;
    memory.physical(tree).context("there is no outgoing tree (is kho=on on the kernel's command line?)")
}

fn outgoing() -> Result<(Outline, Value)> {
    let memory = Kcore::open()?;
    let found = handover::read(&memory, outgoing_root(&memory)?, &Limits::default())?;
    let (outline, json) = describe("outgoing", &found, &memory);
    let sessions = "are not known before the kernel goes: it writes them down then, and lists them to nobody";
    Ok((outline.with(Outline::new("sessions", sessions)), json))
}

/// A tree with all that it leads to.
fn describe(label: &str, found: &Handover, memory: &dyn PhysMem) -> (Outline, Value) {
    let mut outline = Outline::new(label, found.root.version.name());
    let mut json = json!({"version": found.root.version.name()});
    let map = found.preserved.as_ref().map(|map| preserved(map, memory)).map_err(|error| error.clone().into());
    let (lines, value) = part("preserved", map);
    outline = outline.with(lines);
    json["preserved"] = value;
    if let Some(metadata) = &found.metadata {
        let told = metadata.as_ref().map(|Metadata { previous_release, kexec_count }| {
            let line = format!("from Linux {previous_release}, kexec number {kexec_count}");
            (
                Outline::new(metadata::NAME, line),
                json!({"previous_release": previous_release, "kexec_count": kexec_count}),
            )
        });
        let (lines, value) = part(metadata::NAME, told.map_err(|error| error.clone().into()));
        outline = outline.with(lines);
        json["metadata"] = value;
    }
    if let Some(regions) = &found.memblock {
        let region = |region: &Region| Outline::memory(format!("{} at {:#x}", region.name, region.start), region.size);
        let told = regions.as_ref().map(|regions| {
            let values: Vec<Value> = regions
                .iter()
                .map(|Region { name, start, size }| json!({"name": name, "address": start, "bytes": size}))
                .collect();
            (Outline::new("reserved memory", "").with_all(regions.iter().map(region)), json!(values))
        });
        let (lines, value) = part("reserved memory", told.map_err(|error| error.clone().into()));
        outline = outline.with(lines);
        json["reserved"] = value;
    }
    if let Some(luo) = &found.luo {
        let told = luo.as_ref().map(|luo| self::luo(luo, found)).map_err(|error| error.clone().into());
        let (lines, value) = part(luo::NAME, told);
        outline = outline.with(lines);
        json["live_update"] = value["number"].clone();
        json["sessions"] = value["sessions"].clone();
    }
    let unknown: Vec<&str> = found.unknown().map(|subtree| subtree.name.as_str()).collect();
    outline = outline.with_all(unknown.iter().map(|name| Outline::new(*name, "a subtree that is not known here")));
    let names: Vec<&str> = found.root.subtrees.iter().map(|subtree| subtree.name.as_str()).collect();
    json["subtrees"] = json!(names);
    (outline, json)
}

fn luo(luo: &Luo, found: &Handover) -> (Outline, Value) {
    let file = |file: &File| {
        let label = format!("{} {}", file.token, file.compatible);
        match found.memfds.get(&file.data) {
            Some(Ok(memfd)) => (
                Outline::memory(label, memfd.size).with_value(&format!("{} folios", memfd.folio_count)),
                json!({
                    "token": file.token, "handler": file.compatible, "bytes": memfd.size,
                    "folios": memfd.folio_count, "seals": memfd.seals,
                }),
            ),
            Some(Err(error)) => part(&label, Err(error.clone().into())),
            None => (Outline::new(label, ""), json!({"token": file.token, "handler": file.compatible})),
        }
    };
    let mut outline = Outline::new(luo::NAME, format!("live update number {}", luo.liveupdate_number));
    let mut sessions = Vec::new();
    for session in &luo.sessions {
        let (lines, values): (Vec<_>, Vec<_>) = session.files.iter().map(file).unzip();
        outline = outline.with(Outline::new(&session.name, format!("{} files", lines.len())).with_all(lines));
        sessions.push(json!({"name": session.name, "files": values}));
    }
    (outline, json!({"number": luo.liveupdate_number, "sessions": sessions}))
}

/// A dump that [`save`] has made, here or elsewhere.
pub fn inspect_dump(bytes: &[u8]) -> Result<Inspected> {
    let dump = Dump::decode(bytes)?;
    let found = handover::read(&dump.image, dump.root, &Limits::default())?;
    let (outline, json) = describe("dump of a handover", &found, &dump.image);
    Ok(Inspected { outline, json })
}

/// Writes what a bug report needs: the pages of the handover, without guests' memory, and what the kernel says otherwise.
pub fn save(folder: &Path, inspected: &Inspected) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))
    };
    write("host.json", inspected.json.to_string().as_bytes())?;
    for (name, path) in [("cmdline", "/proc/cmdline"), ("version", "/proc/version")] {
        write(name, &fs::read(path).with_context(|| format!("cannot read {path}"))?)?;
    }
    for (name, path) in [("incoming.dtb", "in/fdt"), ("incoming-metadata", "in/sub_fdts/kexec-metadata")] {
        // There is none where no live update was before.
        if let Ok(bytes) = read(path) {
            write(name, &bytes)?;
        }
    }
    let memory = Kcore::open()?;
    let root = outgoing_root(&memory)?;
    let recorder = Recorder::new(&memory);
    let found = handover::read(&recorder, root, &Limits::default())?;
    for memfd in found.memfds.values().flatten() {
        // What cannot be read is not in the dump, and the dump says so when it is looked into.
        let _ = memfd.folios(&recorder, &Limits::default(), "/");
    }
    write("outgoing.dump", &Dump { image: recorder.into_image(), root, scratch: (0, 0) }.encode())
}

fn preserved(map: &Preserved, memory: &dyn PhysMem) -> (Outline, Value) {
    let page = memory.page_size().bytes();
    let bytes = map.ranges.bytes();
    let order = |(order, count): (&u32, &u64)| {
        let block = page << order;
        Outline::memory(format!("{} blocks of {}", count, report::bytes(block)), count * block)
    };
    let outline = Outline::new("preserved", report::bytes(bytes))
        .with_value(&format!("{} ranges", map.ranges.len()))
        .with_value(&format!("a map of {} pages", map.map_pages))
        .with_all(map.by_order.iter().map(order));
    let orders: Map<String, Value> =
        map.by_order.iter().map(|(order, count)| (order.to_string(), json!(count))).collect();
    (outline, json!({"bytes": bytes, "ranges": map.ranges.len(), "map_pages": map.map_pages, "by_order": orders}))
}

/// Where nothing is ever preserved.
pub fn scratch_areas() -> Result<Vec<Range<u64>>> {
    let numbers = |name: &str| -> Result<Vec<u64>> {
        let text = String::from_utf8(read(name)?).context("not text")?;
        let number = |line: &str| u64::from_str_radix(line.trim().trim_start_matches("0x"), 16);
        Ok(text.lines().map(number).collect::<Result<_, _>>()?)
    };
    let areas = numbers("out/scratch_phys")?.into_iter().zip(numbers("out/scratch_len")?);
    Ok(areas.map(|(start, size)| start..start.saturating_add(size)).collect())
}

/// How much of an area is in use now. All of it is free again for the next kernel, as nothing that is preserved lies in it.
fn used(area: &Range<u64>) -> Result<u64> {
    const PATH: &str = "/proc/kpageflags";
    // Linux's include/uapi/linux/kernel-page-flags.h: every page of a free block has it.
    const BUDDY: u64 = 1 << 10;
    let page = rustix::param::page_size() as u64;
    let mut flags = vec![0; usize::try_from((area.end - area.start) / page * 8)?];
    let file = fs::File::open(PATH).with_context(|| format!("cannot open {PATH}"))?;
    file.read_exact_at(&mut flags, area.start / page * 8).with_context(|| format!("cannot read {PATH}"))?;
    let used = flags.as_chunks::<8>().0.iter().filter(|flags| u64::from_ne_bytes(**flags) & BUDDY == 0).count();
    Ok(used as u64 * page)
}

fn scratch() -> Result<(Outline, Value)> {
    let areas = scratch_areas()?;
    let size = |area: &Range<u64>| area.end - area.start;
    let mut outline = Outline::new("scratch", report::bytes(areas.iter().map(size).sum::<u64>()));
    let mut values = Vec::new();
    for area in &areas {
        let line = Outline::memory(format!("{:#x}", area.start), size(area));
        let mut value = json!({"address": area.start, "bytes": size(area)});
        outline = outline.with(match used(area) {
            Ok(used) => {
                value["used"] = json!(used);
                line.with_value(&format!("{} of it in use", report::bytes(used)))
            }
            Err(error) => {
                value["unreadable"] = json!(format!("{error:#}"));
                line.with_value(&format!("how much of it is in use cannot be read: {error:#}"))
            }
        });
        values.push(value);
    }
    Ok((outline, json!({"bytes": areas.iter().map(size).sum::<u64>(), "areas": values})))
}
