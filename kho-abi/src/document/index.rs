//! The index: which VMs take part in an update, and where they are. It is what a new kernel's user space reads first.

use alloc::collections::BTreeSet;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use super::header::Kind;
use super::machine::RAM_RANGES_MAX;
use super::node::Node;
use super::record::{COMPATIBLE, Reader, Record, from_node, read_node, to_node};
use super::timeline::TimelineV3;
use super::{DecodeError, DocumentError, EncodeError, Problem, fdt, header};
use crate::{names, tokens};

/// The most VMs of a host.
pub const VMS_MAX: usize = 1024;

/// The size of an entry in the list of RAM files: token and size.
const RAM: usize = 16;

/// Where one VM is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IndexEntryV2 {
    /// The VM's name.
    pub name: String,
    /// Its session.
    pub session: String,
    /// The state memfd's token.
    pub state_token: u64,
    /// The sealed document's length in the state memfd, in bytes.
    pub document_bytes: u64,
    /// Token and size in bytes of each RAM memfd.
    pub ram: Vec<(u64, u64)>,
    /// The marks of this VM.
    pub marks: TimelineV3,
    /// The [checksum](header::checksum_of) of where all of its RAM was in the old kernel's physical memory, where that was looked up.
    pub frames: Option<u64>,
    /// A checksum of what was in all of its RAM when it was frozen, where one was asked for.
    pub content: Option<u64>,
}

/// What an entry without the checksums calls itself.
const ENTRY_V1: &str = "kho-vmm,index-entry-v1";

impl IndexEntryV2 {
    /// Of the previous version where that holds all there is, so that who knows only that can read it.
    fn to_node(&self) -> Node {
        let version = if self.frames.or(self.content).is_some() { Self::COMPATIBLE } else { ENTRY_V1 };
        self.encode(Node::new(format!("{}@{}", names::VM, self.name)).with_str(COMPATIBLE, version))
    }
}

impl Record for IndexEntryV2 {
    const COMPATIBLE: &'static str = "kho-vmm,index-entry-v2";

    fn encode(&self, node: Node) -> Node {
        let Self { name, session, state_token, document_bytes, ram, marks, frames, content } = self;
        let mut list = Vec::with_capacity(ram.len() * RAM);
        for (token, size) in ram {
            list.extend_from_slice(&token.to_be_bytes());
            list.extend_from_slice(&size.to_be_bytes());
        }
        let node = node
            .with_str("name", name)
            .with_str("session", session)
            .with_u64("state-token", *state_token)
            .with_u64("document-bytes", *document_bytes)
            .with_bytes("ram", list)
            .with_child(marks.to_node(names::MARKS));
        let checksums = [("frames", frames), ("content", content)];
        checksums.into_iter().fold(node, |node, (name, value)| match value {
            Some(value) => node.with_u64(name, *value),
            None => node,
        })
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let mut entry = decode_entry(reader)?;
        entry.frames = reader.optional_u64("frames")?;
        entry.content = reader.optional_u64("content")?;
        Ok(entry)
    }
}

/// Reads an entry of this version or the previous one.
fn decode_any_entry(reader: &mut Reader<'_>) -> Result<IndexEntryV2, DecodeError> {
    if reader.compatible()? == ENTRY_V1 { decode_entry(reader) } else { reader.record() }
}

/// What both versions have.
fn decode_entry(reader: &mut Reader<'_>) -> Result<IndexEntryV2, DecodeError> {
    let entry = IndexEntryV2 {
        name: reader.string("name")?,
        session: reader.string("session")?,
        state_token: reader.u64("state-token")?,
        document_bytes: reader.u64("document-bytes")?,
        ram: reader.entries::<RAM>("ram")?.iter().map(|entry| pair(*entry)).collect(),
        marks: reader.group(names::MARKS, TimelineV3::decode_any)?,
        frames: None,
        content: None,
    };
    if reader.unit_address() != Some(&entry.name) {
        return Err(reader.invalid("name", "is not the one in the node's name"));
    }
    // The session's name follows from the VM's: an entry can thus never lead to the memory of another VM.
    if names::session_name(&entry.name).as_ref() != Some(&entry.session) {
        return Err(reader.invalid("session", "is not the one of a VM of this name"));
    }
    if !(header::SIZE as u64..=header::CAP as u64).contains(&entry.document_bytes) {
        return Err(reader.invalid("document-bytes", format!("is {}, no document's", entry.document_bytes)));
    }
    if entry.ram.is_empty() || entry.ram.len() > RAM_RANGES_MAX {
        return Err(reader.invalid("ram", format!("has {} files", entry.ram.len())));
    }
    let mut seen = BTreeSet::from([entry.state_token]);
    for &(token, size) in &entry.ram {
        if token < tokens::RAM_FIRST || !seen.insert(token) {
            return Err(reader.invalid("ram", format!("has token {token:#x} twice, or where no memory can be")));
        }
        if size == 0 {
            return Err(reader.invalid("ram", format!("has file {token:#x} of size zero")));
        }
    }
    Ok(entry)
}

fn pair(entry: [u8; RAM]) -> (u64, u64) {
    let [a, b, c, d, e, f, g, h, size @ ..] = entry;
    (u64::from_be_bytes([a, b, c, d, e, f, g, h]), u64::from_be_bytes(size))
}

/// The host's wall clock and the raw counter at one moment of the old kernel: as the counter runs on through the kexec, the next
/// kernel can tell from it what time it is, which its real-time clock says to the second only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClockV1 {
    /// The raw counter.
    pub counter: u64,
    /// CLOCK_REALTIME at that moment, in nanoseconds since 1970.
    pub realtime_ns: u64,
}

impl Record for ClockV1 {
    const COMPATIBLE: &'static str = "kho-vmm,clock-v1";

    fn encode(&self, node: Node) -> Node {
        let Self { counter, realtime_ns } = self;
        node.with_u64("counter", *counter).with_u64("realtime-ns", *realtime_ns)
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self { counter: reader.u64("counter")?, realtime_ns: reader.u64("realtime-ns")? })
    }
}

/// What the root of an index without a clock calls itself.
const INDEX_V1: &str = "kho-vmm,index-v1";

/// All VMs of one update.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IndexV2 {
    /// How many updates this host has been through, this one included.
    pub generation: u64,
    /// The release of the kernel under which it was written.
    pub kernel: String,
    /// The marks of the host.
    pub timeline: TimelineV3,
    /// The host's wall clock, as late as it could be read.
    pub clock: Option<ClockV1>,
    /// The VMs.
    pub vms: Vec<IndexEntryV2>,
}

impl Record for IndexV2 {
    const COMPATIBLE: &'static str = "kho-vmm,index-v2";

    fn encode(&self, node: Node) -> Node {
        let Self { generation, kernel, timeline, clock, vms } = self;
        let entries = vms.iter().map(IndexEntryV2::to_node);
        node.with_u64("generation", *generation)
            .with_str("kernel", kernel)
            .with_child(timeline.to_node(names::TIMELINE))
            .with_children(clock.iter().map(|clock| to_node(names::CLOCK, clock)))
            .with_child(Node::new(names::VMS).with_children(entries))
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        decode_index(reader, |reader| reader.optional_child(names::CLOCK))
    }
}

/// Reads an index of any version; `clock` reads what differs.
fn decode_index(
    reader: &mut Reader<'_>,
    clock: impl FnOnce(&mut Reader<'_>) -> Result<Option<ClockV1>, DecodeError>,
) -> Result<IndexV2, DecodeError> {
    Ok(IndexV2 {
        generation: reader.u64("generation")?,
        kernel: reader.string("kernel")?,
        timeline: reader.group(names::TIMELINE, TimelineV3::decode_any)?,
        clock: clock(reader)?,
        vms: reader.group(names::VMS, |vms| {
            let entries = vms.each(names::VM, decode_any_entry)?;
            match entries.len() <= VMS_MAX {
                true => Ok(entries),
                false => Err(vms.error(Problem::TooMany { what: "VMs", max: VMS_MAX })),
            }
        })?,
    })
}

/// Reads an index of this version or the previous one.
fn decode_any(reader: &mut Reader<'_>) -> Result<IndexV2, DecodeError> {
    if reader.compatible()? == INDEX_V1 { decode_index(reader, |_| Ok(None)) } else { reader.record() }
}

impl IndexV2 {
    /// The sealed index.
    ///
    /// # Errors
    /// When [`from_bytes`](Self::from_bytes) would refuse it.
    pub fn to_bytes(&self) -> Result<Vec<u8>, EncodeError> {
        let root = to_node("", self);
        from_node::<Self>(&root)?;
        header::seal_as(Kind::Index, &fdt::write(&root)?)
    }

    /// The index in sealed bytes, be it of this version or the previous one.
    ///
    /// # Errors
    /// When the seal is broken, the tree malformed, or anything in it missing, unknown or impossible.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DocumentError> {
        Ok(read_node(&fdt::read(header::open_as(Kind::Index, bytes)?)?, decode_any)?)
    }
}
