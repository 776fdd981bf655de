//! How much either side of a connection may send before the other has read some of it: virtio-vsock's credit.

use std::collections::VecDeque;

use super::packet::Header;

/// Room for what the guest has sent and the program has not taken yet.
pub const BUFFER: usize = 64 << 10;

/// What a packet may cost a guest beside its data: Linux takes no more packets than its room has for their bookkeeping.
const PACKET_COST: u32 = 1024;
/// A guest is not sent more packets than this before it has read some, whatever room it says it has.
const PACKETS_MAX: usize = 1024;

/// Who has room for how much. All counts wrap.
#[derive(Default)]
pub struct Room {
    /// Bytes that came from the guest, that have left the room here, and that the guest has been told have left it.
    pub received: u32,
    pub forwarded: u32,
    pub told: u32,
    /// Bytes that went to the guest, its room, and how many of them have left it.
    sent: u32,
    guest_buffer: u32,
    guest_forwarded: u32,
    /// Where in the stream each packet ends that has not left the guest's room.
    packets: VecDeque<u32>,
    /// The guest has been asked whether it has room, as far as is known has none, and says so when it has.
    pub asked: bool,
}

impl Room {
    /// What the guest says of its room.
    pub fn hear(&mut self, header: &Header) {
        (self.guest_buffer, self.guest_forwarded) = (header.buffer.get(), header.forwarded.get());
        let waiting = self.waiting();
        while self.packets.front().is_some_and(|end| self.sent.wrapping_sub(*end) >= waiting) {
            self.packets.pop_front();
        }
        // An answer that there is none is not to be asked for again and again: the guest will say when there is.
        self.asked &= self.for_guest() == 0;
    }

    /// Bytes in the guest's room.
    fn waiting(&self) -> u32 {
        self.sent.wrapping_sub(self.guest_forwarded)
    }

    /// How many bytes may be sent now.
    pub fn for_guest(&self) -> usize {
        let packets = PACKETS_MAX.min((self.guest_buffer / PACKET_COST) as usize);
        if !self.packets.is_empty() && self.packets.len() >= packets {
            return 0;
        }
        self.guest_buffer.saturating_sub(self.waiting()) as usize
    }

    pub fn send(&mut self, bytes: usize) {
        self.sent = self.sent.wrapping_add(bytes as u32);
        self.packets.push_back(self.sent);
    }

    /// Whether the guest is to be told of room before it runs out of what it knows of.
    pub fn news(&self) -> bool {
        self.forwarded != self.told && self.received.wrapping_sub(self.told) as usize > BUFFER / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_counts_wrap_and_impossible_ones_give_none() {
        let hear = |room: &mut Room, buffer: u32, forwarded: u32| {
            room.hear(&Header { buffer: buffer.into(), forwarded: forwarded.into(), ..Header::default() });
        };
        let mut room = Room { sent: u32::MAX - 9, guest_forwarded: u32::MAX - 9, ..Room::default() };
        hear(&mut room, 4096, u32::MAX - 9);
        assert_eq!(room.for_guest(), 4096);
        room.send(1000);
        assert_eq!((room.for_guest(), room.packets.len()), (3096, 1));
        hear(&mut room, 4096, 500);
        assert_eq!((room.for_guest(), room.packets.len()), (3606, 1));
        hear(&mut room, 4096, 990);
        assert_eq!((room.for_guest(), room.packets.len()), (4096, 0));
        // A guest that says that it has read what was never sent.
        hear(&mut room, 4096, 991);
        assert_eq!(room.for_guest(), 0);
        hear(&mut room, 0, 990);
        assert_eq!(room.for_guest(), 0);
    }

    #[test]
    fn guest_holds_no_more_packets_than_it_has_room_for_their_bookkeeping() {
        let mut room = Room::default();
        room.hear(&Header { buffer: 8192.into(), ..Header::default() });
        for _ in 0..8 {
            assert!(room.for_guest() > 0);
            room.send(1);
        }
        assert_eq!(room.for_guest(), 0);
        room.hear(&Header { buffer: 8192.into(), forwarded: 3.into(), ..Header::default() });
        assert_eq!((room.for_guest(), room.packets.len()), (8192 - 5, 5));
        // However small the room is, one packet fits.
        let mut room = Room::default();
        room.hear(&Header { buffer: 10.into(), ..Header::default() });
        assert_eq!(room.for_guest(), 10);
    }
}
