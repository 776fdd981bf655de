//! One connection between a program of the host and a port of the guest: what either side has said, how much room each has, and
//! what is still to be said to the guest.
//!
//! Data to the guest is read from the program's socket only when there is a buffer of the guest to take it. Data to the program
//! waits here, no more of it than the guest was told that there is room for.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use rustix::net::RecvFlags;

use super::packet::{Header, NO_RECEIVE, NO_SEND, Operation, STREAM};
use super::room::{BUFFER, Room};

/// What a program asks for has so many bytes at most: `CONNECT 4294967295` and room for a line's end.
const LINE_MAX: usize = 32;

/// The ports that a connection is between.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ports {
    /// The host's.
    pub host: u32,
    /// The guest's.
    pub guest: u32,
}

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// A program has connected, and has not said to which port.
    Greeting,
    /// The guest is asked, or about to be.
    Requested,
    /// Both sides are there.
    Open,
    /// The program is gone, and the guest has not confirmed it.
    Closing,
    /// The guest is gone, and the program has not taken all of what it sent.
    Draining,
}

/// How a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest knows, or never knew of it.
    Silent,
    /// The guest is to be told.
    Reset,
}

/// A connection.
pub struct Connection {
    /// None when the program is gone.
    pub socket: Option<UnixStream>,
    /// None before the program has said which, and when the guest is gone.
    pub ports: Option<Ports>,
    pub phase: Phase,
    /// It is to be ended.
    pub end: Option<End>,
    /// It stands in the queue of those with something for the guest.
    pub queued: bool,
    /// The socket may have something, and may take something. Its events come once.
    readable: bool,
    writable: bool,
    /// What the program still does.
    program_sends: bool,
    program_receives: bool,
    /// What the guest still does.
    guest_sends: bool,
    guest_receives: bool,
    /// The program knows that the guest sends no more.
    passed_on: bool,
    to_program: VecDeque<u8>,
    owed: Owed,
    room: Room,
}

/// What is to be said to the guest beside data.
#[derive(Default)]
struct Owed {
    request: bool,
    response: bool,
    shutdown: bool,
    credit: bool,
}

/// What is to be said to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Saying {
    pub operation: Operation,
    pub flags: u32,
    /// Bytes of data.
    pub length: usize,
}

impl Connection {
    fn new(socket: UnixStream, phase: Phase, ports: Option<Ports>) -> Self {
        Self {
            socket: Some(socket),
            ports,
            phase,
            end: None,
            queued: false,
            // Whatever is there has an event, once the socket is waited for.
            readable: false,
            writable: false,
            program_sends: true,
            program_receives: true,
            guest_sends: true,
            guest_receives: true,
            passed_on: false,
            to_program: VecDeque::new(),
            owed: Owed::default(),
            room: Room::default(),
        }
    }

    /// Of a program that has connected.
    pub fn greeting(socket: UnixStream) -> Self {
        Self::new(socket, Phase::Greeting, None)
    }

    /// Of a guest that has asked for it.
    pub fn answering(socket: UnixStream, ports: Ports, header: &Header) -> Self {
        let mut connection = Self::new(socket, Phase::Open, Some(ports));
        connection.room.hear(header);
        connection.owed.response = true;
        connection
    }

    /// The program has said where to.
    pub fn request(&mut self, ports: Ports) {
        self.phase = Phase::Requested;
        self.ports = Some(ports);
        self.owed.request = true;
        // What stands behind its line has had its event.
        self.readable = true;
    }

    /// The port that the program asks for, once it has said so.
    pub fn heard_port(&mut self) -> Option<u32> {
        let socket = self.socket.as_mut()?;
        let mut line = [0; LINE_MAX];
        // What stands behind the line is the guest's.
        let length = match rustix::net::recv(&*socket, &mut line, RecvFlags::PEEK) {
            Ok((length, _)) if length > 0 => length,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return None,
            _ => {
                self.end = Some(End::Silent);
                return None;
            }
        };
        let Some(end) = line[..length].iter().position(|byte| *byte == b'\n') else {
            if length == LINE_MAX {
                self.end = Some(End::Silent);
            }
            return None;
        };
        let line = &mut line[..=end];
        let port = match socket.read_exact(line) {
            Ok(()) => port_in(line),
            Err(_) => None,
        };
        if port.is_none() {
            tracing::debug!("a program asks a vsock for something other than CONNECT PORT");
            self.end = Some(End::Silent);
        }
        port
    }

    /// The socket may have something to be read.
    pub fn readable(&mut self) {
        self.readable = true;
    }

    /// The socket may take something.
    pub fn writable(&mut self) {
        self.writable = true;
        self.flush();
    }

    /// The program has closed its end. What it has sent may still be there.
    pub fn hung_up(&mut self) {
        match self.phase {
            Phase::Greeting | Phase::Draining => self.end = Some(End::Silent),
            // A guest that has not been asked has nothing to be told.
            Phase::Requested if self.owed.request => self.end = Some(End::Silent),
            Phase::Requested => self.end = Some(End::Reset),
            Phase::Open => {
                self.readable = true;
                self.program_receives_no_more();
            }
            Phase::Closing => {}
        }
    }

    /// The guest has sent a packet of this connection.
    pub fn hear(&mut self, header: &Header, operation: Operation, data: Option<&[u8]>) {
        self.room.hear(header);
        match (operation, self.phase) {
            (Operation::Reset, phase) => self.guest_is_gone(phase),
            (Operation::Credit, _) => {}
            (Operation::CreditRequest, _) => self.owed.credit = true,
            (Operation::Response, Phase::Requested) if !self.owed.request => self.answered(),
            (Operation::Shutdown, Phase::Open | Phase::Closing) => {
                let flags = header.flags.get();
                self.guest_sends &= flags & NO_SEND == 0;
                if flags & NO_RECEIVE != 0 && self.guest_receives {
                    self.guest_receives = false;
                    if let Some(socket) = &self.socket {
                        // Otherwise the program would wait for ever for the guest to take more.
                        let _gone_already = socket.shutdown(Shutdown::Read);
                    }
                }
                self.flush();
            }
            (Operation::Data, Phase::Open | Phase::Closing) if self.guest_sends => match data {
                Some(data) if data.len() <= BUFFER - self.to_program.len() => self.take(data),
                // No data, or more than there is room for.
                _ => self.end = Some(End::Reset),
            },
            _ => self.end = Some(End::Reset),
        }
    }

    fn guest_is_gone(&mut self, phase: Phase) {
        // It has sent all that it had to, and that is still to arrive.
        if phase == Phase::Open && !self.guest_sends && !self.to_program.is_empty() {
            self.phase = Phase::Draining;
        } else {
            self.end = Some(End::Silent);
        }
    }

    fn answered(&mut self) {
        self.phase = Phase::Open;
        let (Some(socket), Some(ports)) = (&mut self.socket, self.ports) else { return };
        let line = format!("OK {}\n", ports.host);
        // It is the first that the program gets, so there is room for it.
        if !socket.write(line.as_bytes()).is_ok_and(|written| written == line.len()) {
            self.end = Some(End::Reset);
        }
    }

    fn take(&mut self, data: &[u8]) {
        self.room.received = self.room.received.wrapping_add(data.len() as u32);
        if self.program_receives {
            self.to_program.extend(data);
            // There may be room though no event has said so yet.
            self.writable = true;
            self.flush();
        } else {
            // The guest will hear that nobody wants it.
            self.room.forwarded = self.room.forwarded.wrapping_add(data.len() as u32);
        }
    }

    /// Gives the program what it can take.
    fn flush(&mut self) {
        while self.writable
            && let Some(socket) = &mut self.socket
            && let (next, _) = self.to_program.as_slices()
            && !next.is_empty()
        {
            match socket.write(next) {
                Ok(0) => self.writable = false,
                Ok(count) => {
                    self.to_program.drain(..count);
                    self.room.forwarded = self.room.forwarded.wrapping_add(count as u32);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.writable = false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => self.program_receives_no_more(),
            }
        }
        if !self.to_program.is_empty() {
            return;
        }
        if self.phase == Phase::Draining {
            self.end = Some(End::Silent);
        } else if !self.guest_sends && !self.guest_receives {
            // So does a connection end whose guest has closed it.
            self.end = Some(End::Reset);
        } else if !self.guest_sends && !self.passed_on {
            self.passed_on = true;
            if let Some(socket) = &self.socket {
                let _gone_already = socket.shutdown(Shutdown::Write);
            }
        }
    }

    fn program_receives_no_more(&mut self) {
        self.room.forwarded = self.room.forwarded.wrapping_add(self.to_program.len() as u32);
        self.to_program = VecDeque::new();
        if self.program_receives {
            self.program_receives = false;
            self.owed.shutdown = true;
        }
        self.close_if_done();
    }

    fn program_sends_no_more(&mut self) {
        self.program_sends = false;
        self.owed.shutdown = true;
        self.close_if_done();
    }

    fn close_if_done(&mut self) {
        if self.phase == Phase::Draining {
            self.end = Some(End::Silent);
        } else if !self.program_sends && !self.program_receives {
            self.phase = Phase::Closing;
            self.socket = None;
        }
    }

    fn has_data(&self) -> bool {
        self.phase == Phase::Open && self.readable && self.program_sends && self.guest_receives
    }

    /// Whether there may be something to be said to the guest.
    pub fn wants(&self) -> bool {
        let Owed { request, response, shutdown, credit } = self.owed;
        let owes = request || response || shutdown || credit || self.room.news();
        let data = self.has_data() && (self.room.for_guest() > 0 || !self.room.asked);
        self.end.is_none() && self.phase != Phase::Draining && (owes || data)
    }

    /// What is to be said to the guest next, in a packet with room for the data in `space`, into which that is put.
    pub fn say(&mut self, space: &mut [u8]) -> Option<Saying> {
        let say = |operation| Some(Saying { operation, flags: 0, length: 0 });
        if std::mem::take(&mut self.owed.request) {
            return say(Operation::Request);
        }
        if std::mem::take(&mut self.owed.response) {
            return say(Operation::Response);
        }
        if !self.owed.shutdown && self.has_data() {
            match self.room.for_guest() {
                0 if !self.room.asked => {
                    self.room.asked = true;
                    return say(Operation::CreditRequest);
                }
                0 => {}
                room => {
                    let room = room.min(space.len());
                    if let Some(length) = self.read(&mut space[..room]) {
                        return Some(Saying { operation: Operation::Data, flags: 0, length });
                    }
                }
            }
        }
        if std::mem::take(&mut self.owed.shutdown) {
            let sends = if self.program_sends { 0 } else { NO_SEND };
            let receives = if self.program_receives { 0 } else { NO_RECEIVE };
            return Some(Saying { operation: Operation::Shutdown, flags: sends | receives, length: 0 });
        }
        if self.owed.credit || self.room.news() {
            return say(Operation::Credit);
        }
        None
    }

    /// What the program sends. None: nothing now, or nothing more.
    fn read(&mut self, space: &mut [u8]) -> Option<usize> {
        loop {
            match self.socket.as_mut()?.read(space) {
                Ok(0) => self.program_sends_no_more(),
                Ok(length) => {
                    self.room.send(length);
                    return Some(length);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => {
                    self.program_receives_no_more();
                    self.program_sends_no_more();
                }
            }
            return None;
        }
    }

    /// The header of what is said, but for the guest's number. From now on the guest knows of the room that there is here.
    pub fn header(&mut self, ports: Ports, Saying { operation, flags, length }: Saying) -> Header {
        self.owed.credit = false;
        self.room.told = self.room.forwarded;
        Header {
            source_port: ports.host.into(),
            destination_port: ports.guest.into(),
            length: (length as u32).into(),
            kind: STREAM.into(),
            operation: (operation as u16).into(),
            flags: flags.into(),
            buffer: (BUFFER as u32).into(),
            forwarded: self.room.forwarded.into(),
            ..Header::default()
        }
    }
}

/// The port in `CONNECT PORT`.
fn port_in(line: &[u8]) -> Option<u32> {
    let mut words = str::from_utf8(line).ok()?.split_ascii_whitespace();
    let asked = words.next()?.eq_ignore_ascii_case("CONNECT");
    let port = words.next().filter(|port| port.bytes().all(|byte| byte.is_ascii_digit()))?.parse().ok();
    port.filter(|_| asked && words.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_port_to_connect_to_can_be_asked_for() {
        for (line, port) in [
            ("CONNECT 52\n", Some(52)),
            ("connect 4294967295\r\n", Some(u32::MAX)),
            ("CONNECT 4294967296\n", None),
            ("CONNECT +1\n", None),
            ("CONNECT\n", None),
            ("CONNECT 1 2\n", None),
            ("GET / HTTP/1.1\n", None),
            ("\n", None),
        ] {
            assert_eq!(port_in(line.as_bytes()), port, "{line:?}");
        }
    }
}
