//! The thread of a network device: moves frames between the tap and the driver's queues.
//!
//! A frame is copied on its way. So the kernel never sees a frame that the guest is still changing, and what does not fit is known
//! before any of it is in the guest's memory.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET,
    VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI, VIRTIO_NET_CTRL_RX_PROMISC, VIRTIO_NET_ERR,
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_OK,
};
use virtio_queue::{DescriptorChain, QueueT, Writer};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use super::HEADER;
use super::announce::Announcements;
use super::tap::Tap;
use crate::device::virtio::serve::Round;
use crate::device::virtio::worker::Work;
use crate::device::virtio::{ActiveQueue, Notifier};

/// The queues, and the numbers of their kicks.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL: usize = 2;
/// The number of the tap's events.
const TAP: u64 = 3;
/// The number of the timer's.
const TIMER: u64 = 4;

/// The longest frame, with its header: 64 KiB of what lies behind the Ethernet header and two VLAN tags.
pub const FRAME_MAX: usize = HEADER + 22 + (64 << 10);
/// The shortest: an Ethernet header.
const FRAME_MIN: usize = HEADER + 14;

/// So many frames are moved before the thread looks whether it is to stop.
const BATCH: usize = 64;

/// Where the header says what is known of the checksum.
const FLAGS_AT: usize = 0;
/// Where the header says over how many chains a frame goes.
const BUFFERS_AT: usize = 10;

/// What the thread works with.
pub struct NetWork {
    tap: Arc<Tap>,
    memory: GuestMemoryMmap,
    queues: Vec<ActiveQueue>,
    notifier: Arc<dyn Notifier>,
    /// What the driver has agreed to.
    features: u64,
    announcements: Arc<Announcements>,
    /// Until the driver is asked for the next announcement.
    timer: TimerFd,
    /// Room for a frame.
    frame: Box<[u8]>,
    /// The tap's events are waited for: there may be room for a frame, and there is a tap.
    watching: bool,
    /// The tap was taken away from us. The guest finds a network in which nothing arrives.
    gone: bool,
}

impl NetWork {
    /// The work of a driver that is ready.
    pub fn new(
        tap: Arc<Tap>,
        memory: GuestMemoryMmap,
        queues: Vec<ActiveQueue>,
        notifier: Arc<dyn Notifier>,
        features: u64,
        announcements: Arc<Announcements>,
    ) -> io::Result<Self> {
        let (timer, frame) = (TimerFd::new()?, vec![0; FRAME_MAX].into_boxed_slice());
        Ok(Self { tap, memory, queues, notifier, features, announcements, timer, frame, watching: true, gone: false })
    }

    /// A queue.
    #[cfg(test)]
    pub fn queue(&self, number: usize) -> &ActiveQueue {
        &self.queues[number]
    }

    /// Gives the queues back. Nothing is in flight between two calls of the thread.
    pub fn into_queues(self) -> Vec<ActiveQueue> {
        self.queues
    }
}

impl Work for NetWork {
    fn sources(&self) -> Vec<(RawFd, EventSet, u64)> {
        let kicks =
            self.queues.iter().zip(0..TAP).map(|(active, number)| (active.kick.as_raw_fd(), EventSet::IN, number));
        let others = [(self.tap.as_raw_fd(), EventSet::IN, TAP), (self.timer.as_raw_fd(), EventSet::IN, TIMER)];
        kicks.chain(others).collect()
    }

    fn handle(&mut self, source: u64, events: EventSet, epoll: &Epoll) {
        if source == TIMER {
            return self.ask_again();
        }
        if source == TAP {
            // A tap whose interface was deleted says so, and would say so for ever.
            self.gone |= events.intersects(EventSet::ERROR | EventSet::HANG_UP);
        } else if let Some(active) = self.queues.get(source as usize) {
            active.kicked();
        }
        match source as usize {
            TRANSMIT => self.transmit(),
            CONTROL => self.control(),
            // Either there is a frame, or room for one.
            _ => {
                let watch = self.receive() && !self.gone;
                self.watch(watch, epoll);
            }
        }
    }

    /// What the tap has is still there when it is first waited for.
    fn begin(&mut self) {
        self.transmit();
        self.control();
        self.wait_to_ask();
    }

    fn finish(&mut self) {}
}

impl NetWork {
    /// Waits for the tap's events, or no longer.
    fn watch(&mut self, watch: bool, epoll: &Epoll) {
        if watch == self.watching {
            return;
        }
        let operation = if watch { ControlOperation::Add } else { ControlOperation::Delete };
        match epoll.ctl(operation, self.tap.as_raw_fd(), EpollEvent::new(EventSet::IN, TAP)) {
            Ok(()) => self.watching = watch,
            Err(error) => tracing::error!(%error, tap = self.tap.name, "cannot wait for frames"),
        }
        if self.gone {
            tracing::error!(tap = self.tap.name, "the tap has been deleted: the guest is cut off from its network");
        }
    }

    /// Sets the timer, if the driver is to be asked for another announcement.
    fn wait_to_ask(&mut self) {
        let Some(wait) = self.announcements.wait() else { return };
        if let Err(error) = self.timer.reset(wait, None::<Duration>) {
            tracing::warn!(%error, tap = self.tap.name, "the guest is not asked to announce itself again");
        }
    }

    /// The timer has gone off.
    fn ask_again(&mut self) {
        // What it says has to be taken from it, or it says so for ever.
        if let Err(error) = self.timer.wait() {
            tracing::warn!(%error, tap = self.tap.name, "a timer cannot be read");
        }
        self.announcements.again();
        self.notifier.config_changed();
    }

    /// Moves frames to the guest. Says whether there is room for another.
    ///
    /// A frame is taken from the tap only when there is a chain. Should it need more chains than there are, it is lost: to wait
    /// for them would be to wait for ever for a driver that has no more than these.
    fn receive(&mut self) -> bool {
        let Self { tap, memory, queues, notifier, features, frame, gone, .. } = self;
        let Some(active) = queues.get_mut(RECEIVE) else { return false };
        let (mut given, mut merged) = (false, false);
        let mut room = true;
        for _ in 0..BATCH {
            let first = active.queue.next_avail();
            let Some(chain) = active.take(memory) else {
                room = false;
                break;
            };
            match tap.read(frame) {
                Ok(length) if (FRAME_MIN..=FRAME_MAX).contains(&length) => {
                    if *features & (1 << VIRTIO_NET_F_GUEST_CSUM) == 0 {
                        // The checksum is there, but a driver that has not asked what is known of it must not be told.
                        frame[FLAGS_AT] = 0;
                    }
                    let mergeable = *features & (1 << VIRTIO_NET_F_MRG_RXBUF) != 0;
                    let chains = place(&mut frame[..length], chain, active, memory, mergeable);
                    if chains > 0 {
                        (given, merged) = (true, merged || chains > 1);
                        continue;
                    }
                    tracing::debug!(tap = tap.name, length, "a frame is lost for lack of room in the guest");
                }
                Ok(length) => tracing::debug!(tap = tap.name, length, "a frame that is none"),
                Err(error) => {
                    active.queue.set_next_avail(first);
                    // EBADFD: no interface any more.
                    *gone |= !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted);
                    break;
                }
            }
            active.queue.set_next_avail(first);
        }
        if merged {
            active.tell_surely(memory, &**notifier, RECEIVE as u16);
        } else if given {
            active.tell(memory, &**notifier, RECEIVE as u16);
        }
        room
    }

    /// Moves frames to the tap.
    fn transmit(&mut self) {
        let Self { tap, memory, queues, notifier, frame, .. } = self;
        let Some(active) = queues.get_mut(TRANSMIT) else { return };
        let mut round = Round::of(BATCH);
        while round.left > 0 {
            let Some(chain) = active.take(memory) else { break };
            let head = chain.head_index();
            match copy_out(memory, chain, frame) {
                // A tap that cannot take it, as it is down, loses it.
                Some(frame) => {
                    if let Err(error) = tap.write(frame) {
                        tracing::debug!(%error, tap = tap.name, "a frame of the guest is lost");
                    }
                }
                None => tracing::debug!(tap = tap.name, "the guest sends what is no frame"),
            }
            active.give(memory, head, 0);
            round.gave();
        }
        active.end_round(memory, &**notifier, TRANSMIT, round);
    }

    /// Hears what the driver has to say.
    fn control(&mut self) {
        let Self { memory, queues, notifier, announcements, .. } = self;
        let Some(active) = queues.get_mut(CONTROL) else { return };
        let mut announced = false;
        let mut round = Round::of(BATCH);
        while round.left > 0 {
            let Some(chain) = active.take(memory) else { break };
            let head = chain.head_index();
            let mut command = [0; 2];
            let known = chain.clone().reader(memory).is_ok_and(|mut reader| reader.read_exact(&mut command).is_ok());
            let [class, command] = command.map(u32::from);
            let answer = match (class, command) {
                _ if !known => VIRTIO_NET_ERR,
                (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK) => {
                    announced |= announcements.made();
                    VIRTIO_NET_OK
                }
                // It gets all that the tap has, whatever it wants: which of it is for the guest the guest can tell.
                (VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC | VIRTIO_NET_CTRL_RX_ALLMULTI)
                | (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET) => VIRTIO_NET_OK,
                _ => VIRTIO_NET_ERR,
            };
            let answered = chain.writer(memory).is_ok_and(|mut writer| writer.write_all(&[answer as u8]).is_ok());
            active.give(memory, head, answered.into());
            round.gave();
        }
        active.end_round(memory, &**notifier, CONTROL, round);
        if announced {
            self.wait_to_ask();
        }
    }
}

type Chain<'m> = DescriptorChain<&'m GuestMemoryMmap>;

/// The frame in a chain, if it is one.
fn copy_out<'f>(memory: &GuestMemoryMmap, chain: Chain<'_>, frame: &'f mut [u8]) -> Option<&'f [u8]> {
    let mut reader = chain.reader(memory).ok()?;
    let frame = frame.get_mut(..reader.available_bytes()).filter(|frame| frame.len() >= FRAME_MIN)?;
    reader.read_exact(frame).ok()?;
    Some(frame)
}

/// Writes a frame into this chain, and into more of the queue if it has to and may, and gives them back. Says how many chains it
/// took; where there was no room, none is given back, and what was taken has to be put back.
fn place<'m>(
    frame: &mut [u8],
    chain: Chain<'m>,
    active: &mut ActiveQueue,
    memory: &'m GuestMemoryMmap,
    mergeable: bool,
) -> usize {
    // A chain that leads out of memory has no room.
    let open = |chain: Chain<'m>| (chain.head_index(), Writer::new(memory, chain).ok());
    let room_in = |writer: &Option<Writer<'m>>| writer.as_ref().map_or(0, Writer::available_bytes);
    let first = open(chain);
    let mut room = room_in(&first.1);
    let mut parts = vec![first];
    // A driver could add chains for as long as we take them.
    while room < frame.len() && mergeable && parts.len() < usize::from(active.queue.size()) {
        let Some(chain) = active.take(memory) else { return 0 };
        let part = open(chain);
        room = room.saturating_add(room_in(&part.1));
        parts.push(part);
    }
    if room < frame.len() {
        return 0;
    }
    frame[BUFFERS_AT..HEADER].copy_from_slice(&(parts.len() as u16).to_le_bytes());
    let mut rest = &*frame;
    let parts = parts.into_iter().map(|(head, writer)| {
        let (now, later) = rest.split_at(rest.len().min(room_in(&writer)));
        let written = writer.is_some_and(|mut writer| writer.write_all(now).is_ok());
        rest = later;
        (head, if written { now.len() as u32 } else { 0 })
    });
    let parts = parts.collect::<Vec<_>>();
    // A driver that finds the first takes it that the others are there.
    active.give_together(memory, &parts);
    parts.len()
}
