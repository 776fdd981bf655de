//! This host's physical memory, as the kernel shows it to root in `/proc/kcore`: an ELF file with a segment for each piece of the
//! kernel's address space. Those of the direct map say which physical memory they are.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::FileExt;

use kho_abi::kernel::{PageSize, PhysMem, Unreadable};
use zerocopy::FromBytes;

use crate::elf::{self, FileHeader, SegmentHeader};

const PATH: &str = "/proc/kcore";
const SYMBOLS: &str = "/proc/kallsyms";

/// Why the kernel's memory cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum KcoreError {
    /// It cannot be opened or read.
    #[error("cannot read {path}")]
    Read {
        /// What.
        path: &'static str,
        /// Why.
        source: io::Error,
    },
    /// It is not what it should be.
    #[error("{PATH} is no ELF file of a 64-bit kernel")]
    Form,
    /// The kernel's pages have a size that no handover has.
    #[error("pages of {0} bytes are not known here")]
    PageSize(usize),
    /// The kernel does not tell where something is.
    #[error(
        "{SYMBOLS} does not tell where {0} is: the kernel is built without CONFIG_KALLSYMS_ALL, or hides it (kernel.kptr_restrict)"
    )]
    Symbol(&'static str),
    /// An address is not in any segment.
    #[error("the kernel's address {0:#x} is not in {PATH}")]
    Address(u64),
}

struct Segment {
    offset: u64,
    address: u64,
    physical: Option<u64>,
    size: u64,
}

impl Segment {
    /// How far an address is into what begins at `start` and is as large as the segment.
    fn distance(&self, start: u64, address: u64) -> Option<u64> {
        address.checked_sub(start).filter(|&distance| distance < self.size)
    }
}

/// The kernel's memory.
pub struct Kcore {
    file: File,
    segments: Vec<Segment>,
    page_size: PageSize,
}

impl Kcore {
    /// Opens it, which takes root's rights, and a kernel that is not locked down.
    pub fn open() -> Result<Self, KcoreError> {
        let failed = |source| KcoreError::Read { path: PATH, source };
        let file = File::open(PATH).map_err(failed)?;
        let mut header = [0; size_of::<FileHeader>()];
        file.read_exact_at(&mut header, 0).map_err(failed)?;
        let header = FileHeader::read_from_bytes(&header).map_err(|_| KcoreError::Form)?;
        let size = usize::from(header.segment_size.get());
        if !header.ident.starts_with(&elf::IDENT) || size != size_of::<SegmentHeader>() {
            return Err(KcoreError::Form);
        }
        let mut bytes = vec![0; size * usize::from(header.segment_count.get())];
        file.read_exact_at(&mut bytes, header.segments.get()).map_err(failed)?;
        let found = <[SegmentHeader]>::ref_from_bytes(&bytes).map_err(|_| KcoreError::Form)?;
        let segment = |segment: &SegmentHeader| Segment {
            offset: segment.offset.get(),
            address: segment.address.get(),
            physical: Some(segment.physical.get()).filter(|&physical| physical != u64::MAX),
            size: segment.size.get(),
        };
        let segments = found.iter().filter(|segment| segment.kind == elf::LOAD).map(segment).collect();
        let page_size = rustix::param::page_size();
        let shift = page_size.is_power_of_two().then(|| page_size.ilog2());
        let page_size = shift.and_then(PageSize::from_shift).ok_or(KcoreError::PageSize(page_size))?;
        Ok(Self { file, segments, page_size })
    }

    /// The physical address of something in the direct map, or in the kernel's image.
    pub fn physical(&self, address: u64) -> Result<u64, KcoreError> {
        let physical = |segment: &Segment| segment.physical?.checked_add(segment.distance(segment.address, address)?);
        self.segments.iter().find_map(physical).ok_or(KcoreError::Address(address))
    }

    /// What is at one of the kernel's addresses.
    pub fn at(&self, address: u64, buffer: &mut [u8]) -> Result<(), KcoreError> {
        let offset = |segment: &Segment| segment.offset.checked_add(segment.distance(segment.address, address)?);
        let offset = self.segments.iter().find_map(offset).ok_or(KcoreError::Address(address))?;
        self.file.read_exact_at(buffer, offset).map_err(|source| KcoreError::Read { path: PATH, source })
    }

    /// The word at one of the kernel's addresses.
    pub fn word(&self, address: u64) -> Result<u64, KcoreError> {
        let mut word = [0; 8];
        self.at(address, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }

    /// The running kernel's constants, among them all of its texts.
    pub fn constants(&self) -> Result<Vec<u8>, KcoreError> {
        /// More than any kernel has.
        const MOST_BYTES: u64 = 256 << 20;
        let [start, end] = symbols(["__start_rodata", "__end_rodata"])?;
        let size = end.checked_sub(start).filter(|&size| size <= MOST_BYTES).ok_or(KcoreError::Address(end))?;
        let mut constants = vec![0; size as usize];
        self.at(start, &mut constants)?;
        Ok(constants)
    }
}

impl PhysMem for Kcore {
    fn page_size(&self) -> PageSize {
        self.page_size
    }

    fn read(&self, address: u64, buffer: &mut [u8]) -> Result<(), Unreadable> {
        let (length, mut at, mut rest) = (buffer.len(), address, buffer);
        let unreadable = |reason| Unreadable { address, length, reason };
        while !rest.is_empty() {
            let place = |segment: &Segment| {
                let distance = segment.distance(segment.physical?, at)?;
                Some((segment.offset.checked_add(distance)?, segment.size - distance))
            };
            let (offset, left) = self.segments.iter().find_map(place).ok_or_else(|| unreadable(None))?;
            let count = rest.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let (now, later) = rest.split_at_mut(count);
            self.file.read_exact_at(now, offset).map_err(|error| unreadable(Some(error.to_string())))?;
            at = at.checked_add(count as u64).ok_or_else(|| unreadable(None))?;
            rest = later;
        }
        Ok(())
    }
}

/// Where the kernel has each of these symbols.
pub fn symbols<const N: usize>(names: [&'static str; N]) -> Result<[u64; N], KcoreError> {
    let failed = |source| KcoreError::Read { path: SYMBOLS, source };
    let mut found = [0; N];
    for line in BufReader::new(File::open(SYMBOLS).map_err(failed)?).lines() {
        let line = line.map_err(failed)?;
        // The address, a letter for its kind, the name. Addresses that are hidden are told as 0.
        let mut words = line.split_whitespace();
        let (Some(address), Some(name)) = (words.next(), words.nth(1)) else { continue };
        let Some(number) = names.iter().position(|wanted| *wanted == name) else { continue };
        if let (Some(place @ 0), Ok(address)) = (found.get_mut(number), u64::from_str_radix(address, 16)) {
            *place = address;
        }
        // There are a hundred thousand of them.
        if found.iter().all(|&address| address != 0) {
            return Ok(found);
        }
    }
    let missing = names.into_iter().zip(found).find_map(|(name, address)| (address == 0).then_some(name));
    missing.map_or(Ok(found), |name| Err(KcoreError::Symbol(name)))
}
