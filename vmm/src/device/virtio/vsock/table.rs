//! All connections of a guest: which there are, which have something for the guest, and how new ones come about from either side.

use std::collections::{BTreeMap, VecDeque};
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use kho_abi::document::virtio::VsockV1;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SocketAddrUnix, connect};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::{Connection, End, Phase, Ports};
use super::listener;
use super::packet::{HOST_CID, Header, Operation, STREAM};
use crate::config::vsock::VsockConfig;
use crate::device::virtio::VirtioError;

/// So many connections there can be, counting those that programs have not said the port of. Each takes a descriptor of the
/// process, of which it commonly has 1024, and room for what its program has not taken.
pub const CONNECTIONS_MAX: usize = 512;

/// When the guest is to be told of so many connections that there are none, no more is heard from it until it takes some of that.
pub const RESETS_MAX: usize = 256;

/// So many programs are let in at once.
const BATCH: usize = 16;

/// The listener's number among the sources of events. Connections have larger ones, which are never used again.
pub const LISTENER: u64 = 15;

/// The connections.
pub struct Table {
    config: VsockConfig,
    listener: UnixListener,
    connections: BTreeMap<u64, Connection>,
    by_ports: BTreeMap<Ports, u64>,
    /// Those that may have something for the guest, each once, the one that has waited longest first.
    ready: VecDeque<u64>,
    /// Connections that the guest is to be told that there are none of.
    resets: VecDeque<Ports>,
    last_number: u64,
    next_port: u32,
    /// A program may be waiting to be let in. Its event comes once.
    knocking: bool,
}

impl Table {
    /// No connections yet. From now on programs can ask for some.
    pub fn open(config: &VsockConfig) -> Result<Self, VirtioError> {
        Ok(Self {
            listener: listener::open(&config.socket)?,
            config: config.clone(),
            connections: BTreeMap::new(),
            by_ports: BTreeMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            last_number: LISTENER,
            next_port: VsockV1::PORT_FIRST,
            knocking: true,
        })
    }

    /// The host's port of the next connection that a program asks for.
    pub fn next_port(&self) -> u32 {
        self.next_port
    }

    /// Goes on with the ports where another process has ended.
    pub fn set_next_port(&mut self, port: u32) {
        self.next_port = port;
    }

    /// Ends all connections: the guest has forgotten them.
    pub fn clear(&mut self) {
        self.connections.clear();
        self.by_ports.clear();
        self.ready.clear();
        self.resets.clear();
    }

    /// What has events, and which.
    pub fn sources(&self) -> impl Iterator<Item = (RawFd, EventSet, u64)> {
        let sockets = self.connections.iter().filter_map(|(number, connection)| {
            connection.socket.as_ref().map(|socket| (socket.as_raw_fd(), socket_events(), *number))
        });
        sockets.chain([(self.listener.as_raw_fd(), EventSet::IN | EventSet::EDGE_TRIGGERED, LISTENER)])
    }

    /// Something has happened to a socket.
    pub fn handle(&mut self, number: u64, events: EventSet) {
        if number == LISTENER {
            self.knocking = true;
            return;
        }
        // Its connection may have ended since.
        let Some(connection) = self.connections.get_mut(&number) else { return };
        if events.contains(EventSet::IN) {
            if connection.phase != Phase::Greeting {
                connection.readable();
            } else if let Some(port) = connection.heard_port() {
                let ports = free_ports(&mut self.next_port, &self.by_ports, port);
                connection.request(ports);
                self.by_ports.insert(ports, number);
            }
        }
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            connection.hung_up();
        } else if events.contains(EventSet::OUT) {
            connection.writable();
        }
        self.settle(number);
    }

    /// Lets programs in. Says whether there may be more that can be.
    pub fn accept(&mut self, epoll: &Epoll) -> bool {
        for _ in 0..BATCH {
            if !self.knocking {
                return false;
            }
            if self.connections.len() >= CONNECTIONS_MAX && !(self.somebody_waits() && self.make_room()) {
                return false;
            }
            match self.listener.accept() {
                Ok((socket, _)) => match socket.set_nonblocking(true) {
                    Ok(()) => {
                        self.add(Connection::greeting(socket), epoll);
                    }
                    Err(error) => tracing::debug!(%error, "a vsock's new connection is lost"),
                },
                Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {}
                Err(error) => {
                    // If it is for lack of descriptors, it is tried again when a connection ends.
                    self.knocking = false;
                    if error.kind() != ErrorKind::WouldBlock {
                        tracing::debug!(%error, "a vsock cannot let a program in");
                    }
                }
            }
        }
        self.may_accept()
    }

    fn somebody_waits(&self) -> bool {
        let mut listener = [PollFd::new(&self.listener, PollFlags::IN)];
        // It does not wait, and a descriptor that is ours and open is all that it needs.
        poll(&mut listener, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|count| count > 0)
    }

    /// Whether a program could be let in, if one waits.
    pub fn may_accept(&self) -> bool {
        self.knocking && self.connections.len() < CONNECTIONS_MAX
    }

    /// Whether the guest has to take some of what is for it before more is heard from it.
    pub fn is_full_of_resets(&self) -> bool {
        self.resets.len() >= RESETS_MAX
    }

    /// Whether there is something for the guest.
    pub fn has_something(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// The guest has sent a packet. No data: not as much as the header says.
    pub fn hear(&mut self, header: &Header, data: Option<&[u8]>, epoll: &Epoll) {
        if header.source_cid.get() != u64::from(self.config.cid) || header.destination_cid.get() != HOST_CID {
            tracing::debug!(?header, "a vsock packet between others");
            return;
        }
        let ports = Ports { host: header.destination_port.get(), guest: header.source_port.get() };
        let operation = Operation::of(header.operation.get());
        // Who is told that there is no connection has nothing to answer.
        let known = operation.filter(|operation| header.kind.get() == STREAM || *operation == Operation::Reset);
        let number = self.by_ports.get(&ports).copied();
        if let Some((number, connection)) = number.and_then(|number| Some((number, self.connections.get_mut(&number)?)))
        {
            match known {
                Some(operation) => connection.hear(header, operation, data),
                None => connection.end = Some(End::Reset),
            }
            self.settle(number);
            return;
        }
        match known {
            Some(Operation::Request) => self.answer(ports, header, epoll),
            Some(Operation::Reset) => {}
            _ => self.resets.push_back(ports),
        }
    }

    /// The guest asks for a connection.
    fn answer(&mut self, ports: Ports, header: &Header, epoll: &Epoll) {
        let connected = self.make_room().then(|| self.connect(ports.host));
        match connected {
            Some(Ok(socket)) => {
                if let Some(number) = self.add(Connection::answering(socket, ports, header), epoll) {
                    self.by_ports.insert(ports, number);
                    self.settle(number);
                    return;
                }
            }
            Some(Err(error)) => tracing::debug!(%error, ?ports, "nobody answers a vsock's guest"),
            None => tracing::debug!(?ports, "a vsock's guest has as many connections as it can have"),
        }
        self.resets.push_back(ports);
    }

    /// Connects to the program that has that port, which takes no time: it is there, or not.
    fn connect(&self, port: u32) -> rustix::io::Result<UnixStream> {
        let socket = listener::new_socket()?;
        connect(&socket, &SocketAddrUnix::new(self.config.socket_of(port))?)?;
        Ok(socket.into())
    }

    /// What is to be said to the guest next, in a packet with room for the data in `space`. Gives the number of bytes put there.
    pub fn say(&mut self, space: &mut [u8]) -> Option<(Header, usize)> {
        if let Some(ports) = self.resets.pop_front() {
            let header = Header {
                source_port: ports.host.into(),
                destination_port: ports.guest.into(),
                kind: STREAM.into(),
                operation: (Operation::Reset as u16).into(),
                ..Header::default()
            };
            return Some((self.addressed(header), 0));
        }
        for _ in 0..self.ready.len() {
            let number = self.ready.pop_front()?;
            let Some(connection) = self.connections.get_mut(&number) else { continue };
            connection.queued = false;
            let said = connection.say(space).zip(connection.ports).map(|(saying, ports)| {
                let header = connection.header(ports, saying);
                (header, saying.length)
            });
            self.settle(number);
            if let Some((header, length)) = said {
                return Some((self.addressed(header), length));
            }
        }
        None
    }

    fn addressed(&self, header: Header) -> Header {
        Header { source_cid: HOST_CID.into(), destination_cid: u64::from(self.config.cid).into(), ..header }
    }

    /// Has a connection end, wait its turn, or be.
    fn settle(&mut self, number: u64) {
        let Some(connection) = self.connections.get_mut(&number) else { return };
        if let Some(end) = connection.end {
            self.remove(number, end);
            return;
        }
        if connection.phase == Phase::Draining
            && let Some(ports) = connection.ports.take()
        {
            self.by_ports.remove(&ports);
        }
        if connection.wants() && !connection.queued {
            connection.queued = true;
            self.ready.push_back(number);
        }
    }

    fn add(&mut self, connection: Connection, epoll: &Epoll) -> Option<u64> {
        let socket = connection.socket.as_ref()?.as_raw_fd();
        let number = self.last_number + 1;
        if let Err(error) = epoll.ctl(ControlOperation::Add, socket, EpollEvent::new(socket_events(), number)) {
            tracing::debug!(%error, "a vsock's new connection is lost");
            return None;
        }
        self.last_number = number;
        self.connections.insert(number, connection);
        Some(number)
    }

    fn remove(&mut self, number: u64, end: End) {
        let Some(connection) = self.connections.remove(&number) else { return };
        if connection.queued {
            self.ready.retain(|waiting| *waiting != number);
        }
        if let Some(ports) = connection.ports {
            self.by_ports.remove(&ports);
            if end == End::Reset {
                self.resets.push_back(ports);
            }
        }
        // There is room for one more, and a descriptor.
        self.knocking = true;
    }

    /// Whether there can be one more connection. One that only its guest's confirmation, or its program's slowness, keeps alive
    /// makes room for it.
    fn make_room(&mut self) -> bool {
        if self.connections.len() < CONNECTIONS_MAX {
            return true;
        }
        let old = self.connections.iter().find(|(_, old)| matches!(old.phase, Phase::Closing | Phase::Draining));
        let Some(number) = old.map(|(number, _)| *number) else { return false };
        self.remove(number, End::Reset);
        true
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        assert_eq!(
            self.by_ports.len(),
            self.connections.values().filter(|connection| connection.ports.is_some()).count()
        );
        assert!(self.ready.len() <= self.connections.len());
        self.connections.len()
    }
}

fn socket_events() -> EventSet {
    EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED
}

/// A port of the host for a connection to one of the guest. There are more of them than connections.
fn free_ports(next: &mut u32, taken: &BTreeMap<Ports, u64>, guest: u32) -> Ports {
    loop {
        let ports = Ports { host: *next, guest };
        *next = if *next >= VsockV1::PORT_LAST { VsockV1::PORT_FIRST } else { *next + 1 };
        if !taken.contains_key(&ports) {
            return ports;
        }
    }
}
