//! The thread of a vsock device: moves packets between the connections and the driver's queues.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use virtio_queue::{QueueT, Writer};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{Epoll, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use super::packet::{self, DATA_MAX, HEADER};
use super::table::Table;
use crate::device::virtio::serve::Round;
use crate::device::virtio::worker::Work;
use crate::device::virtio::{ActiveQueue, Notifier};

/// The queues, and the numbers of their kicks.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENT: usize = 2;
/// The number of the timer's events.
const TIMER: u64 = 3;

/// So many packets are moved each way before the thread looks whether it is to stop.
const BATCH: usize = 64;

/// `struct virtio_vsock_event` that says that all connections are gone.
const TRANSPORT_RESET: [u8; 4] = 0_u32.to_le_bytes();

/// How long the driver may take to hear that all connections are gone before there are new ones all the same.
const PATIENCE: Duration = Duration::from_secs(5);

/// After a live update: the driver is to hear that all connections are gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct News {
    /// It has not been told, as it had no buffer for it.
    pub owed: bool,
    /// There are no new connections yet. A driver that hears of their end only then would end them, too: Linux looks at its other
    /// queues first. That it has heard it shows when it offers the buffer of the event again.
    pub holding: bool,
    /// How far the driver had come with its buffers when it was told.
    told_at: Option<u16>,
}

impl News {
    /// They are gone.
    pub const GONE: Self = Self { owed: true, holding: true, told_at: None };
}

/// What the thread works with.
pub struct VsockWork {
    table: Table,
    news: News,
    memory: GuestMemoryMmap,
    queues: Vec<ActiveQueue>,
    notifier: Arc<dyn Notifier>,
    /// Room for a packet's data.
    space: Box<[u8]>,
    /// Ends the waiting for the driver.
    timer: Option<TimerFd>,
    /// Packets of the guest wait until it takes some of what is for it.
    blocked: bool,
}

impl VsockWork {
    /// The work of a driver that is ready.
    pub fn new(
        table: Table,
        news: News,
        memory: GuestMemoryMmap,
        queues: Vec<ActiveQueue>,
        notifier: Arc<dyn Notifier>,
    ) -> io::Result<Self> {
        let timer = if news.holding {
            let mut timer = TimerFd::new()?;
            timer.reset(PATIENCE, None)?;
            Some(timer)
        } else {
            None
        };
        let space = vec![0; DATA_MAX].into_boxed_slice();
        Ok(Self { table, news, memory, queues, notifier, space, timer, blocked: false })
    }

    /// Gives back what it was given. Nothing is in flight between two calls of the thread.
    pub fn into_parts(self) -> (Table, News, Vec<ActiveQueue>) {
        (self.table, self.news, self.queues)
    }

    #[cfg(test)]
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// Kicks a queue, as its driver does.
    #[cfg(test)]
    pub fn kick(&self, queue: usize) {
        self.again(queue);
    }

    /// Has the timer end.
    #[cfg(test)]
    pub fn expire(&mut self) {
        self.timer.as_mut().unwrap().reset(Duration::from_nanos(1), None).unwrap();
    }
}

impl Work for VsockWork {
    fn sources(&self) -> Vec<(RawFd, EventSet, u64)> {
        let kicks =
            self.queues.iter().zip(0..TIMER).map(|(active, number)| (active.kick.as_raw_fd(), EventSet::IN, number));
        let timer = self.timer.iter().map(|timer| (timer.as_raw_fd(), EventSet::IN, TIMER));
        kicks.chain(timer).chain(self.table.sources()).collect()
    }

    fn handle(&mut self, source: u64, events: EventSet, epoll: &Epoll) {
        if source == TIMER {
            self.lose_patience();
        } else if let Some(active) = self.queues.get(source as usize) {
            active.kicked();
        } else {
            self.table.handle(source, events);
        }
        self.tell_news();
        if self.is_holding() {
            return;
        }
        let more = self.table.accept(epoll);
        self.transmit(epoll);
        self.receive();
        if more || self.table.may_accept() {
            self.again(RECEIVE);
        }
    }

    /// The rest needs to know where events are waited for.
    fn begin(&mut self) {
        self.tell_news();
        self.again(RECEIVE);
        self.again(TRANSMIT);
    }

    fn finish(&mut self) {}
}

impl VsockWork {
    fn again(&self, queue: usize) {
        if let Some(active) = self.queues.get(queue) {
            active.again();
        }
    }

    /// Tells the driver that all connections are gone, if it is to hear that and has a buffer for it.
    fn tell_news(&mut self) {
        let Self { news, memory, queues, notifier, .. } = self;
        let Some(active) = queues.get_mut(EVENT) else { return };
        for _ in 0..BATCH {
            if !news.owed {
                return;
            }
            let Some(chain) = active.take(memory) else { return };
            let head = chain.head_index();
            // Before it is told: it may answer at once.
            news.told_at = offered(active, memory);
            let written = Writer::new(memory, chain)
                .is_ok_and(|mut writer| io::Write::write_all(&mut writer, &TRANSPORT_RESET).is_ok());
            active.give(memory, head, if written { TRANSPORT_RESET.len() as u32 } else { 0 });
            active.tell(memory, &**notifier, EVENT as u16);
            news.owed = !written;
        }
    }

    /// Whether there must be no connections yet.
    fn is_holding(&mut self) -> bool {
        let Self { news, memory, queues, .. } = self;
        if !news.holding {
            return false;
        }
        if !news.owed
            && let Some(active) = queues.get(EVENT)
            && news.told_at != available(active, memory)
        {
            news.holding = false;
        }
        news.holding
    }

    fn lose_patience(&mut self) {
        self.news.holding = false;
        if let Some(Err(error)) = self.timer.as_mut().map(TimerFd::wait) {
            tracing::debug!(%error, "a timer that has not ended");
        }
    }

    /// Hears what the guest sends.
    fn transmit(&mut self, epoll: &Epoll) {
        let Self { table, memory, queues, notifier, space, blocked, .. } = self;
        let Some(active) = queues.get_mut(TRANSMIT) else { return };
        let mut round = Round::of(BATCH);
        *blocked = false;
        while round.left > 0 {
            if table.is_full_of_resets() {
                *blocked = true;
                break;
            }
            let Some(chain) = active.take(memory) else { break };
            let head = chain.head_index();
            match packet::read(memory, chain, space) {
                Some((header, data)) => table.hear(&header, data, epoll),
                None => tracing::debug!("the guest sends what is no vsock packet"),
            }
            active.give(memory, head, 0);
            round.gave();
        }
        active.end_round(memory, &**notifier, TRANSMIT, round);
    }

    /// Gives the guest what is for it.
    fn receive(&mut self) {
        let Self { table, memory, queues, notifier, space, .. } = self;
        let Some(active) = queues.get_mut(RECEIVE) else { return };
        let mut round = Round::of(BATCH);
        while round.left > 0 && table.has_something() {
            let first = active.queue.next_avail();
            let Some(chain) = active.take(memory) else { break };
            let head = chain.head_index();
            let writer = Writer::new(memory, chain).ok();
            // One that takes no data could not take what comes next.
            let room = writer.as_ref().map_or(0, |writer| writer.available_bytes().saturating_sub(HEADER));
            let written = match (writer, room) {
                (Some(mut writer), 1..) => {
                    let room = room.min(space.len());
                    let Some((header, length)) = table.say(&mut space[..room]) else {
                        active.queue.set_next_avail(first);
                        break;
                    };
                    packet::write(&mut writer, &header, &space[..length])
                }
                _ => 0,
            };
            active.give(memory, head, written);
            round.gave();
        }
        active.end_round(memory, &**notifier, RECEIVE, round);
        if self.blocked && !self.table.is_full_of_resets() {
            self.again(TRANSMIT);
        }
    }
}

fn available(active: &ActiveQueue, memory: &GuestMemoryMmap) -> Option<u16> {
    active.queue.avail_idx(memory, Ordering::Acquire).ok().map(|index| index.0)
}

/// How far the driver has come with its buffers. It will kick when it offers one more, though not all have been taken.
fn offered(active: &mut ActiveQueue, memory: &GuestMemoryMmap) -> Option<u16> {
    let next = active.queue.next_avail();
    let index = available(active, memory)?;
    active.queue.set_next_avail(index);
    if let Err(error) = active.queue.enable_notification(memory) {
        tracing::debug!(%error, "a queue of the guest is broken");
    }
    active.queue.set_next_avail(next);
    Some(index)
}
