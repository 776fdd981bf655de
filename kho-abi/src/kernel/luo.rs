//! What the Live Update Orchestrator hands over, `luo-v5`: sessions with their files, and objects that files share (FLBs).
//!
//! All of it is written when the kernel is about to go. Before, only the header is there: of the sessions that a host is going
//! to hand over nobody but those who hold them knows.
//!
//! Defined in the kernel's `include/linux/kho/abi/luo.h`.
//!
//! ```
//! use kho_abi::kernel::luo::{File, Luo, Session};
//! use kho_abi::kernel::{Image, Limits, PageSize};
//!
//! let file = File { compatible: "memfd-v2".into(), data: 0x30_0000, token: 1 };
//! let session = Session { name: "kho-vmm.index".into(), files: vec![file] };
//! let luo = Luo { liveupdate_number: 1, sessions: vec![session], shared: vec![] };
//! let mut image = Image::new(PageSize::SMALL);
//! let address = luo.encode(&mut image);
//! assert_eq!(Luo::decode(&image, address, &Limits::default(), "/LUO")?, luo);
//! # Ok::<(), kho_abi::kernel::Error>(())
//! ```

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::memory::{Walk, read};
use super::{Error, Image, Limits, PhysMem, Problem, blocks};
use crate::uapi::SESSION_NAME_LENGTH;

/// Its subtree's name.
pub const NAME: &str = "LUO";
/// `LUO_ABI_COMPATIBLE`.
pub const COMPATIBLE: &str = "luo-v5";

/// `struct luo_ser`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, packed)]
pub struct RawLuo {
    /// [`COMPATIBLE`], filled up with NULs.
    pub compatible: [u8; 8],
    /// The number of this live update.
    pub liveupdate_number: U64,
    /// Where the first block of sessions is; 0 for none.
    pub sessions: U64,
    /// Where the array of shared objects is; 0 for none.
    pub shared: U64,
}

/// `struct luo_session_ser`, with its `struct luo_file_set_ser`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, packed)]
pub struct RawSession {
    /// Its name, filled up with NULs.
    pub name: [u8; SESSION_NAME_LENGTH],
    /// Where the first block of its files is; 0 for none.
    pub files: U64,
    /// How many files it has.
    pub count: U64,
}

/// `struct luo_file_ser`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, packed)]
pub struct RawFile {
    /// Its handler, filled up with NULs.
    pub compatible: [u8; 48],
    /// The handler's.
    pub data: U64,
    /// User space's number for it.
    pub token: U64,
}

/// `struct luo_flb_header_ser`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, packed)]
pub struct RawSharedHeader {
    /// Pages of the array, with this header.
    pub pages: U64,
    /// How many [`RawShared`] follow.
    pub count: U64,
}

/// `struct luo_flb_ser`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, packed)]
pub struct RawShared {
    /// Its handler, filled up with NULs.
    pub name: [u8; 48],
    /// The handler's.
    pub data: U64,
    /// How many files depend on it.
    pub count: U64,
}

/// All of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Luo {
    /// The number of this live update since the last cold boot, from 1 on.
    pub liveupdate_number: u64,
    /// The sessions.
    pub sessions: Vec<Session>,
    /// Objects that files share.
    pub shared: Vec<Shared>,
}

/// A session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// Its name.
    pub name: String,
    /// Its files, in the order in which they were preserved.
    pub files: Vec<File>,
}

/// A file of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// Which handler of the kernel knows what it is, in which version.
    pub compatible: String,
    /// The handler's: for a memfd the address of its [`memfd`](super::memfd) struct.
    pub data: u64,
    /// The number that user space knows it by.
    pub token: u64,
}

/// An object that files share: a file-lifecycle-bound (FLB) one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shared {
    /// Which handler of the kernel knows what it is.
    pub name: String,
    /// The handler's.
    pub data: u64,
    /// How many files depend on it.
    pub count: u64,
}

impl Luo {
    /// Reads what is at an address.
    ///
    /// # Errors
    /// When it is of another version, or leads where it cannot.
    pub fn decode(memory: &dyn PhysMem, address: u64, limits: &Limits, path: &str) -> Result<Self, Error> {
        let raw: RawLuo = read(memory, address, path)?;
        let found = text(&raw.compatible, "its version", path)?;
        if found != COMPATIBLE {
            return Err(Error::new(path, Problem::Version { found, known: COMPATIBLE }));
        }
        let (mut walk, sessions_path) = (Walk::default(), format!("{path}/sessions"));
        let sessions: Vec<RawSession> =
            blocks::decode_on(memory, raw.sessions.get(), limits, &sessions_path, &mut walk)?;
        let sessions = sessions.iter().map(|session| Session::decode(memory, session, limits, path, &mut walk));
        Ok(Self {
            liveupdate_number: raw.liveupdate_number.get(),
            sessions: sessions.collect::<Result<_, _>>()?,
            shared: decode_shared(memory, raw.shared.get(), limits, &format!("{path}/flbs"))?,
        })
    }

    /// Writes it, and returns where. What is too long for a name is cut.
    pub fn encode(&self, image: &mut Image) -> u64 {
        let sessions: Vec<RawSession> = self.sessions.iter().map(|session| session.encode(image)).collect();
        let shared = if self.shared.is_empty() { 0 } else { encode_shared(image, &self.shared) };
        let raw = RawLuo {
            compatible: field(COMPATIBLE),
            liveupdate_number: U64::new(self.liveupdate_number),
            sessions: U64::new(blocks::encode(image, &sessions)),
            shared: U64::new(shared),
        };
        image.add(raw.as_bytes())
    }
}

impl Session {
    fn decode(
        memory: &dyn PhysMem,
        raw: &RawSession,
        limits: &Limits,
        path: &str,
        walk: &mut Walk,
    ) -> Result<Self, Error> {
        let name = text(&raw.name, "a session's name", &format!("{path}/sessions"))?;
        let path = format!("{path}/sessions/{name}/files");
        let files: Vec<RawFile> = blocks::decode_on(memory, raw.files.get(), limits, &path, walk)?;
        if files.len() as u64 != raw.count.get() {
            let reason = format!("has {} files, and says that it has {}", files.len(), raw.count.get());
            return Err(Error::invalid(path, "the session", reason));
        }
        let file = |raw: &RawFile| {
            Ok(File {
                compatible: text(&raw.compatible, "a file's handler", &path)?,
                data: raw.data.get(),
                token: raw.token.get(),
            })
        };
        Ok(Self { name, files: files.iter().map(file).collect::<Result<_, Error>>()? })
    }

    fn encode(&self, image: &mut Image) -> RawSession {
        let file = |file: &File| RawFile {
            compatible: field(&file.compatible),
            data: U64::new(file.data),
            token: U64::new(file.token),
        };
        let files: Vec<RawFile> = self.files.iter().map(file).collect();
        RawSession {
            name: field(&self.name),
            files: U64::new(blocks::encode(image, &files)),
            count: U64::new(files.len() as u64),
        }
    }
}

/// The array that the kernel keeps on pages side by side.
fn decode_shared(memory: &dyn PhysMem, address: u64, limits: &Limits, path: &str) -> Result<Vec<Shared>, Error> {
    if address == 0 {
        return Ok(Vec::new());
    }
    let header: RawSharedHeader = read(memory, address, path)?;
    let (pages, count) = (header.pages.get(), header.count.get());
    if count > limits.entries as u64 {
        return Err(Error::new(path, Problem::TooMany { what: "shared objects", max: limits.entries }));
    }
    let bytes = size_of::<RawSharedHeader>() as u64 + count * size_of::<RawShared>() as u64;
    if pages.checked_mul(memory.page_size().bytes()).is_none_or(|room| room < bytes) {
        return Err(Error::invalid(
            path,
            "the array",
            format!("counts {count} entries, too many for its {pages} pages"),
        ));
    }
    (0..count)
        .map(|number| {
            let offset = size_of::<RawSharedHeader>() as u64 + number * size_of::<RawShared>() as u64;
            let at = address.checked_add(offset);
            let at = at.ok_or_else(|| Error::invalid(path, "the array", "goes beyond all addresses"))?;
            let raw: RawShared = read(memory, at, path)?;
            let name = text(&raw.name, "a shared object's name", path)?;
            Ok(Shared { name, data: raw.data.get(), count: raw.count.get() })
        })
        .collect()
}

fn encode_shared(image: &mut Image, shared: &[Shared]) -> u64 {
    let bytes = size_of::<RawSharedHeader>() + shared.len() * size_of::<RawShared>();
    let address = image.allocate(bytes);
    let pages = (bytes as u64).div_ceil(image.page_size().bytes());
    let header = RawSharedHeader { pages: U64::new(pages), count: U64::new(shared.len() as u64) };
    image.write(address, header.as_bytes());
    let raw = |shared: &Shared| RawShared {
        name: field(&shared.name),
        data: U64::new(shared.data),
        count: U64::new(shared.count),
    };
    let raw: Vec<RawShared> = shared.iter().map(raw).collect();
    image.write(address + size_of::<RawSharedHeader>() as u64, raw.as_bytes());
    address
}

/// Text that a NUL ends within its field.
pub(super) fn text(field: &[u8], what: &'static str, path: &str) -> Result<String, Error> {
    let text = core::ffi::CStr::from_bytes_until_nul(field).ok().and_then(|text| text.to_str().ok());
    text.map(ToString::to_string).ok_or_else(|| Error::invalid(path, what, "is no text ended by a NUL"))
}

/// The same the other way round. What has no room is cut.
pub(super) fn field<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [0; N];
    let room = (0..N).rev().find(|&room| text.is_char_boundary(room)).unwrap_or_default();
    field.iter_mut().zip(text.as_bytes().iter().take(room)).for_each(|(to, from)| *to = *from);
    field
}
