//! Packets of virtio-vsock (virtio 1.2, 5.10.6), as they stand in the driver's buffers.
//!
//! A packet is copied on its way, so that nobody changes it while it is looked at. A driver may spread one over as many buffers as
//! it likes: Linux puts the header into one and the data into up to 17 others, and offers one buffer for a packet to it.

use std::io::{Read, Write};

use virtio_queue::{DescriptorChain, Writer};
use vm_memory::GuestMemoryMmap;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of a header.
pub const HEADER: usize = size_of::<Header>();

/// The most data in a packet, from either side; Linux sends no more.
pub const DATA_MAX: usize = 64 << 10;

/// Sockets that are streams, the only ones that there are here.
pub const STREAM: u16 = 1;

/// The host's number.
pub const HOST_CID: u64 = 2;

/// `flags` of a shutdown: whoever says so receives no more.
pub const NO_RECEIVE: u32 = 1;
/// And sends no more.
pub const NO_SEND: u32 = 2;

/// What stands before the data: `struct virtio_vsock_hdr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// Who sends it.
    pub source_cid: U64,
    /// Who is to get it.
    pub destination_cid: U64,
    /// The sender's port.
    pub source_port: U32,
    /// The receiver's.
    pub destination_port: U32,
    /// Bytes of data.
    pub length: U32,
    /// What kind of socket.
    pub kind: U16,
    /// What it is for.
    pub operation: U16,
    /// More about that.
    pub flags: U32,
    /// Room that the sender has for what it receives over this connection, in bytes.
    pub buffer: U32,
    /// How many bytes have left that room again since the connection began.
    pub forwarded: U32,
}

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Operation {
    /// Asks for a connection.
    Request = 1,
    /// Gives it.
    Response = 2,
    /// Ends it, or says that there is none.
    Reset = 3,
    /// Says what will not be done any more.
    Shutdown = 4,
    /// Brings data.
    Data = 5,
    /// Says how much room there is.
    Credit = 6,
    /// Asks for that.
    CreditRequest = 7,
}

impl Operation {
    const ALL: [Self; 7] =
        [Self::Request, Self::Response, Self::Reset, Self::Shutdown, Self::Data, Self::Credit, Self::CreditRequest];

    /// The one of that number.
    pub fn of(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|operation| *operation as u16 == number)
    }
}

/// A chain of a driver's buffers.
pub type Chain<'m> = DescriptorChain<&'m GuestMemoryMmap>;

/// The packet in a chain, with its data in `space`. No header: this is no packet. No data: not as much as the header says.
pub fn read<'s>(memory: &GuestMemoryMmap, chain: Chain<'_>, space: &'s mut [u8]) -> Option<(Header, Option<&'s [u8]>)> {
    let mut reader = chain.reader(memory).ok()?;
    let mut header = Header::default();
    reader.read_exact(header.as_mut_bytes()).ok()?;
    let data = space.get_mut(..header.length.get() as usize);
    let data = data.and_then(|data| reader.read_exact(data).is_ok().then_some(&*data));
    Some((header, data))
}

/// Writes a packet into a chain that has room for it. Gives the number of bytes.
pub fn write(writer: &mut Writer<'_>, header: &Header, data: &[u8]) -> u32 {
    let written = writer.write_all(header.as_bytes()).and_then(|()| writer.write_all(data));
    if written.is_ok() { (HEADER + data.len()) as u32 } else { 0 }
}
