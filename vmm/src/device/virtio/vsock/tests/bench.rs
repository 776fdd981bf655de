//! A host's folder with its programs, and a driver with its rings.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};
use zerocopy::{FromBytes, IntoBytes};

use super::super::QUEUE_SIZES;
use super::super::packet::{HEADER, Header, Operation, STREAM};
use super::super::table::Table;
use super::super::work::{News, VsockWork};
use crate::config::vsock::VsockConfig;
use crate::device::virtio::Notifier;
use crate::device::virtio::mock::{RING_SIZE, Ring, Told, notifier, readable, writable};
use crate::device::virtio::worker::Work;

const MEMORY: usize = 16 << 20;
const BUFFERS: u64 = 4 << 20;
const EVENTS: u64 = 7 << 20;
const PACKETS: u64 = 8 << 20;
const PACKET_SPACE: u64 = 128 << 10;

/// Where the guest's buffers are random, they are in or around this.
pub const ANYWHERE: std::ops::Range<u64> = BUFFERS..MEMORY as u64 + 1000;

/// Room that the guest says it has for each connection.
pub const GUEST_BUFFER: u32 = 128 << 10;
/// The host's port of the first connection that a program asks for.
pub const HOST_PORT: u32 = 1 << 30;
/// A port that a program has.
pub const SERVICE: u32 = 52;

pub type Packet = (Header, Vec<u8>);

pub struct Bench {
    pub work: VsockWork,
    pub rings: [Ring; 3],
    pub heard: Receiver<Told>,
    pub memory: GuestMemoryMmap,
    pub config: VsockConfig,
    /// What the guest says of how much it has read.
    pub forwarded: u32,
    notifier: Arc<dyn Notifier>,
    epoll: Epoll,
    buffers: BTreeMap<u16, u64>,
    offered: u64,
    sent: u64,
    /// How large the buffers are that are offered again when they are used, if they are.
    again: Option<u32>,
    folder: tempfile::TempDir,
}

fn epoll_for(work: &VsockWork) -> Epoll {
    let epoll = Epoll::new().unwrap();
    for (descriptor, events, number) in work.sources() {
        epoll.ctl(ControlOperation::Add, descriptor, EpollEvent::new(events, number)).unwrap();
    }
    epoll
}

impl Bench {
    /// With a driver that has offered as many buffers as Linux does.
    pub fn new() -> Self {
        let mut bench = Self::without_buffers();
        bench.again = Some(3776);
        bench.offers(100, 3776);
        bench
    }

    pub fn without_buffers() -> Self {
        Self::with_news(News::default())
    }

    pub fn with_news(news: News) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = VsockConfig { cid: 3, socket: folder.path().join("vsock") };
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let rings = [0, 1, 2].map(|number| Ring::new(&memory, (number as u64 + 1) * RING_SIZE, QUEUE_SIZES[number]));
        let (notifier, heard) = notifier();
        let table = Table::open(&config).unwrap();
        let queues = rings.iter().map(Ring::active).collect();
        let mut work = VsockWork::new(table, news, memory.clone(), queues, notifier.clone()).unwrap();
        let epoll = epoll_for(&work);
        work.begin();
        let buffers = BTreeMap::new();
        let mut bench = Self {
            work,
            rings,
            heard,
            memory,
            config,
            forwarded: 0,
            notifier,
            epoll,
            buffers,
            offered: 0,
            sent: 0,
            again: None,
            folder,
        };
        bench.drive();
        bench
    }

    /// Stops the thread and starts it again, as a pause does.
    pub fn pause(self) -> Self {
        let Self { work, memory, notifier, .. } = self;
        let (table, news, queues) = work.into_parts();
        let work = VsockWork::new(table, news, memory.clone(), queues, notifier.clone()).unwrap();
        let epoll = epoll_for(&work);
        let mut bench = Self { work, epoll, memory, notifier, ..self };
        bench.work.begin();
        bench.drive();
        bench
    }

    /// Handles events until there are none.
    pub fn drive(&mut self) {
        let mut events = [EpollEvent::default(); 16];
        for _ in 0..100_000 {
            let count = self.epoll.wait(0, &mut events).unwrap();
            if count == 0 {
                return;
            }
            for event in &events[..count] {
                self.work.handle(event.data(), event.event_set(), &self.epoll);
            }
        }
        panic!("the thread does not come to rest");
    }

    /// Handles the next event, which may take a moment, and what follows.
    pub fn await_event(&mut self) {
        let mut event = [EpollEvent::default()];
        assert_eq!(self.epoll.wait(10_000, &mut event).unwrap(), 1);
        self.work.handle(event[0].data(), event[0].event_set(), &self.epoll);
        self.drive();
    }

    fn kick(&mut self, queue: usize) {
        self.work.kick(queue);
        self.drive();
    }

    /// The driver kicks all its queues.
    pub fn kick_all(&mut self) {
        for queue in 0..self.rings.len() {
            self.kick(queue);
        }
    }

    /// The driver offers buffers for packets.
    pub fn offers(&mut self, count: usize, size: u32) {
        for _ in 0..count {
            let address = BUFFERS + self.offered % 256 * 4096;
            self.offered += 1;
            let head = self.rings[0].offer(&[writable(address, size)]);
            self.buffers.insert(head, address);
        }
        self.kick(0);
    }

    /// The driver offers buffers for events.
    pub fn offers_events(&mut self, count: usize) {
        for _ in 0..count {
            self.rings[2].offer(&[writable(EVENTS, 4)]);
        }
        self.kick(2);
    }

    /// The packets that the guest has got since this was last asked.
    pub fn hears(&mut self) -> Vec<Packet> {
        let mut packets = Vec::new();
        loop {
            let used = self.rings[0].used();
            if used.is_empty() {
                return packets;
            }
            for (head, written) in &used {
                let mut bytes = vec![0; *written as usize];
                self.memory.read_slice(&mut bytes, GuestAddress(self.buffers[head])).unwrap();
                // Given back unused.
                if let Ok((header, data)) = Header::read_from_prefix(&bytes) {
                    assert_eq!(header.length.get() as usize, data.len());
                    packets.push((header, data.to_vec()));
                }
            }
            if let Some(size) = self.again {
                self.offers(used.len(), size);
            }
        }
    }

    /// The same, but for those.
    pub fn hears_but(&mut self, operation: Operation) -> Vec<Packet> {
        self.hears().into_iter().filter(|(header, _)| header.operation.get() != operation as u16).collect()
    }

    /// The only packet that the guest has got.
    pub fn hears_one(&mut self, operation: Operation) -> Packet {
        let mut packets = self.hears();
        assert_eq!(packets.len(), 1, "{packets:?}");
        let packet = packets.remove(0);
        assert_eq!(packet.0.operation.get(), operation as u16);
        packet
    }

    /// The data that the guest has got.
    pub fn hears_data(&mut self) -> Vec<u8> {
        self.hears().into_iter().flat_map(|(_, data)| data).collect()
    }

    /// What the guest sends has this header.
    pub fn header(&self, operation: Operation, host: u32, guest: u32) -> Header {
        Header {
            source_cid: 3.into(),
            destination_cid: 2.into(),
            source_port: guest.into(),
            destination_port: host.into(),
            kind: STREAM.into(),
            operation: (operation as u16).into(),
            buffer: GUEST_BUFFER.into(),
            forwarded: self.forwarded.into(),
            ..Header::default()
        }
    }

    /// The guest sends a packet without data.
    pub fn says(&mut self, operation: Operation, host: u32, guest: u32) {
        self.sends_raw(self.header(operation, host, guest), &[], &[HEADER]);
    }

    /// The guest says what it will not do any more.
    pub fn shuts_down(&mut self, host: u32, guest: u32, flags: u32) {
        let header = Header { flags: flags.into(), ..self.header(Operation::Shutdown, host, guest) };
        self.sends_raw(header, &[], &[HEADER]);
    }

    /// The guest sends data.
    pub fn sends(&mut self, host: u32, guest: u32, data: &[u8]) {
        self.sends_spread(host, guest, data, &[HEADER, data.len()]);
    }

    /// The guest sends data in buffers of these sizes.
    pub fn sends_spread(&mut self, host: u32, guest: u32, data: &[u8], sizes: &[usize]) {
        let header = Header { length: (data.len() as u32).into(), ..self.header(Operation::Data, host, guest) };
        self.sends_raw(header, data, sizes);
    }

    /// The guest sends anything.
    pub fn sends_raw(&mut self, header: Header, data: &[u8], sizes: &[usize]) {
        let mut address = PACKETS + self.sent % 32 * PACKET_SPACE;
        self.sent += 1;
        let bytes: Vec<u8> = header.as_bytes().iter().chain(data).copied().collect();
        self.memory.write_slice(&bytes, GuestAddress(address)).unwrap();
        let parts: Vec<_> = sizes
            .iter()
            .map(|size| {
                let part = readable(address, *size as u32);
                address += *size as u64;
                part
            })
            .collect();
        self.rings[1].offer(&parts);
        self.kick(1);
    }

    /// A program that has connected to the device.
    pub fn program(&mut self) -> UnixStream {
        let program = UnixStream::connect(&self.config.socket).unwrap();
        program.set_nonblocking(true).unwrap();
        self.drive();
        program
    }

    /// One that has asked for a port.
    pub fn asks(&mut self, port: u32, more: &[u8]) -> UnixStream {
        let mut program = self.program();
        program.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        program.write_all(more).unwrap();
        self.drive();
        program
    }

    /// The first one whose guest has answered.
    pub fn open(&mut self, port: u32) -> UnixStream {
        let mut program = self.asks(port, b"");
        self.hears_one(Operation::Request);
        self.says(Operation::Response, HOST_PORT, port);
        self.expect(&mut program, format!("OK {HOST_PORT}\n").as_bytes());
        program
    }

    /// A program that has a port of the host.
    pub fn service(&self, port: u32) -> UnixListener {
        assert!(self.folder.path().exists());
        let listener = UnixListener::bind(self.config.socket_of(port)).unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    }

    /// Its end of a connection.
    pub fn accepted(&mut self, service: &UnixListener) -> UnixStream {
        let (program, _) = service.accept().unwrap();
        program.set_nonblocking(true).unwrap();
        program
    }

    /// A program reads just that.
    pub fn expect(&mut self, program: &mut UnixStream, expected: &[u8]) {
        let mut received = vec![0; expected.len()];
        let mut at = 0;
        while at < received.len() {
            at += program.read(&mut received[at..]).unwrap();
            self.drive();
        }
        assert_eq!(received, expected);
    }

    /// The guest sends until the program's socket takes no more.
    pub fn fill(&mut self, program: &mut UnixStream, port: u32) {
        let mut told = 0;
        for sent in (1..).map(|number| number * 1000) {
            self.sends(HOST_PORT, port, &[0; 1000]);
            for (header, _) in self.hears() {
                told = header.forwarded.get();
            }
            // The rest lies in the device.
            if sent - told >= 34_000 {
                break;
            }
        }
        assert_eq!(program.read(&mut []).unwrap(), 0);
    }

    pub fn read_to_end(&mut self, program: &mut UnixStream) -> Vec<u8> {
        let mut received = Vec::new();
        loop {
            match program.read_to_end(&mut received) {
                Ok(_) => return received,
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
            self.drive();
        }
    }
}
