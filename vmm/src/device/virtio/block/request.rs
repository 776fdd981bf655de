//! What a driver asks of a disk. A descriptor chain can say anything: all of it is checked here, and what is not right becomes a
//! request that is answered with an error.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::DescriptorChain;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

use super::buffers::{Buffers, Direction, Segment};
use super::image::SECTOR;

/// The most data segments of a request. With a header and a status they fill a queue.
pub const SEGMENTS_MAX: u32 = super::QUEUE_SIZE as u32 - 2;
/// The most ranges of one discard, or of one request to write zeroes.
pub const RANGES_MAX: u32 = 16;
/// The most sectors of a range to be discarded: 1 GiB.
pub const DISCARD_SECTORS_MAX: u32 = 1 << 21;
/// The most sectors of a range to be zeroed: 16 MiB, as a host may have to write each byte, and a pause would wait for that.
pub const ZEROES_SECTORS_MAX: u32 = 1 << 15;

const HEADER: usize = 16;
const RANGE: usize = 16;

/// What is to be done.
#[derive(Debug)]
pub enum Operation {
    /// Read or write, at an offset in bytes.
    Transfer(Direction, u64, Buffers),
    /// Make durable what was written.
    Flush,
    /// Give storage back.
    Discard(Vec<Range>),
    /// Write zeroes.
    WriteZeroes(Vec<Range>),
    /// Tell the disk's name.
    Id(Buffers),
    /// Something that this disk cannot do.
    Unsupported,
    /// Something that cannot be done.
    Malformed(&'static str),
}

/// A part of the image, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Where.
    pub offset: u64,
    /// How many.
    pub length: u64,
    /// The range may lose its storage.
    pub unmap: bool,
}

/// Where the answer to a request goes.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    /// Its descriptor chain.
    pub head: u16,
    /// Where the status goes. Without a place for it there is nothing to do.
    pub status: Option<GuestAddress>,
    /// Bytes that the driver lets us write, the status included.
    pub writable: u32,
}

/// A request.
#[derive(Debug)]
pub struct Request {
    /// Where its answer goes.
    pub answer: Answer,
    /// What is to be done.
    pub operation: Operation,
}

/// What a request is held against.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of the image.
    pub size: u64,
    /// Nothing may be written.
    pub readonly: bool,
}

impl Request {
    /// Reads a descriptor chain.
    pub fn parse(memory: &GuestMemoryMmap, chain: DescriptorChain<&GuestMemoryMmap>, limits: Limits) -> Self {
        let head = chain.head_index();
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        let mut out_of_order = false;
        // Longer ones than we have offered are read to the end, as the status is there.
        for descriptor in chain {
            let segment = (descriptor.addr(), descriptor.len());
            if descriptor.len() == 0 {
                continue;
            } else if descriptor.is_write_only() {
                writable.push(segment);
            } else {
                out_of_order |= !writable.is_empty();
                readable.push(segment);
            }
        }
        let writable_bytes: u64 = writable.iter().map(|(_, length)| u64::from(*length)).sum();
        let status = take_last_byte(&mut writable);
        let operation = if status.is_none() {
            Operation::Malformed("it has no place for the answer")
        } else if out_of_order {
            Operation::Malformed("it has buffers to be read behind those to be written")
        } else if readable.len() + writable.len() > SEGMENTS_MAX as usize + 2 {
            Operation::Malformed("it has more segments than the disk has offered")
        } else {
            operation(memory, readable, writable, limits).unwrap_or_else(Operation::Malformed)
        };
        let writable = u32::try_from(writable_bytes).unwrap_or(u32::MAX);
        Self { answer: Answer { head, status, writable }, operation }
    }
}

fn operation(
    memory: &GuestMemoryMmap,
    mut readable: Vec<Segment>,
    writable: Vec<Segment>,
    limits: Limits,
) -> Result<Operation, &'static str> {
    let mut header = [0; HEADER];
    take_first(memory, &mut readable, &mut header)?;
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let (kind, sector) = (u32::from_le_bytes([t0, t1, t2, t3]), u64::from_le_bytes(sector));
    let buffers = |segments: &[Segment]| Buffers::new(memory, segments).ok_or("its memory is not RAM");
    let transfer = |direction, segments: &[Segment]| {
        let buffers = buffers(segments)?;
        let offset = part(sector, buffers.length() as u64, limits)?;
        Ok(Operation::Transfer(direction, offset, buffers))
    };
    match kind {
        VIRTIO_BLK_T_IN => transfer(Direction::FromImage, &writable),
        VIRTIO_BLK_T_FLUSH => Ok(Operation::Flush),
        VIRTIO_BLK_T_GET_ID => Ok(Operation::Id(buffers(&writable)?)),
        VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if limits.readonly => {
            Err("the disk is read-only")
        }
        VIRTIO_BLK_T_OUT => transfer(Direction::ToImage, &readable),
        VIRTIO_BLK_T_DISCARD => match ranges(memory, readable, limits, DISCARD_SECTORS_MAX)? {
            // Reserved: virtio 1.2, 5.2.6.2.
            ranges if ranges.iter().any(|range| range.unmap) => Ok(Operation::Unsupported),
            ranges => Ok(Operation::Discard(ranges)),
        },
        VIRTIO_BLK_T_WRITE_ZEROES => Ok(Operation::WriteZeroes(ranges(memory, readable, limits, ZEROES_SECTORS_MAX)?)),
        _ => Ok(Operation::Unsupported),
    }
}

/// The offset in bytes of a part of the image, if it is one.
fn part(sector: u64, length: u64, limits: Limits) -> Result<u64, &'static str> {
    if !length.is_multiple_of(SECTOR) {
        return Err("its length is not one of whole sectors");
    }
    let offset = sector.checked_mul(SECTOR).ok_or("it lies behind the end of the disk")?;
    match offset.checked_add(length) {
        Some(end) if end <= limits.size => Ok(offset),
        _ => Err("it lies behind the end of the disk"),
    }
}

fn ranges(
    memory: &GuestMemoryMmap,
    mut readable: Vec<Segment>,
    limits: Limits,
    sectors_max: u32,
) -> Result<Vec<Range>, &'static str> {
    let length: u64 = readable.iter().map(|(_, length)| u64::from(*length)).sum();
    if length == 0 || !length.is_multiple_of(RANGE as u64) || length > u64::from(RANGES_MAX) * RANGE as u64 {
        return Err("it has no ranges, or more than the disk has offered");
    }
    let mut ranges = Vec::new();
    while !readable.is_empty() {
        let mut range = [0; RANGE];
        take_first(memory, &mut readable, &mut range)?;
        let [s0, s1, s2, s3, s4, s5, s6, s7, c0, c1, c2, c3, flags @ ..] = range;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let (sectors, flags) = (u32::from_le_bytes([c0, c1, c2, c3]), u32::from_le_bytes(flags));
        if sectors > sectors_max {
            return Err("a range has more sectors than the disk has offered");
        }
        if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
            return Err("a range has unknown flags");
        }
        let length = u64::from(sectors) * SECTOR;
        let offset = part(sector, length, limits)?;
        // fallocate(2) refuses nothing at all.
        if length > 0 {
            ranges.push(Range { offset, length, unmap: flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 });
        }
    }
    Ok(ranges)
}

/// Takes the last byte off.
fn take_last_byte(segments: &mut Vec<Segment>) -> Option<GuestAddress> {
    let (address, length) = segments.last_mut()?;
    *length -= 1;
    let byte = address.checked_add(u64::from(*length));
    if *length == 0 {
        segments.pop();
    }
    byte
}

/// Reads the first bytes and takes them off.
fn take_first(memory: &GuestMemoryMmap, segments: &mut Vec<Segment>, mut bytes: &mut [u8]) -> Result<(), &'static str> {
    let mut used = 0;
    for (address, length) in segments.iter_mut() {
        let count = bytes.len().min(*length as usize);
        let (now, later) = bytes.split_at_mut(count);
        memory.read_slice(now, *address).map_err(|_| "its memory is not RAM")?;
        bytes = later;
        if count < *length as usize {
            *address = address.checked_add(count as u64).ok_or("its memory is not RAM")?;
            *length -= count as u32;
            break;
        }
        used += 1;
    }
    segments.drain(..used);
    if bytes.is_empty() { Ok(()) } else { Err("it is too short for a request") }
}
