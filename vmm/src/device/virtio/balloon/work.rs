//! The thread of a balloon: notes which pages the driver puts in and takes out, and gives to the host what is whole.
//!
//! The driver may say anything of any page. It can only harm itself as long as a page is discarded for no other reason than that it
//! has said so and not taken it back since. What it says on the deflate queue and cannot be understood may name any page, so then
//! none is taken to be in the balloon any more.

use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use virtio_queue::{DescriptorChain, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{Epoll, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use super::control::Control;
use super::pages::{BLOCK, PAGE, Pages};
use super::statistics::Statistics;
use super::{F_MUST_TELL_HOST, F_REPORTING, F_STATS_VQ};
use crate::device::virtio::serve::Round;
use crate::device::virtio::worker::Work;
use crate::device::virtio::{ActiveQueue, Notifier};
use crate::memory::discards::Discarded;

/// The queues, and the numbers of their kicks. That of reports is any other.
pub const INFLATE: usize = 0;
pub const DEFLATE: usize = 1;
pub const STATISTICS: usize = 2;
/// The numbers of the other events.
pub const RELEASED: u64 = 100;
pub const REFRESH: u64 = 101;
const TIMER: u64 = 102;

/// So many chains of a queue are taken before the thread looks whether it is to stop.
const BATCH: usize = 4;
/// So many pages can be named by one request. Linux names 256.
const NAMED_MAX: usize = 16 << 10;
/// So many bytes of one report count. Linux reports 128 MiB.
const REPORTED_MAX: u64 = 256 << 20;
/// So many blocks are given back before the thread looks whether it is to stop.
const BLOCKS_MAX: u64 = 32;

/// When the host could not take memory back, it is asked again after so long: `vmm update` may not have let go of it yet.
const RETRY: Duration = Duration::from_secs(1);
/// At once, but not before the thread has looked for other events.
const NOW: Duration = Duration::from_nanos(1);

/// What the thread works with.
pub struct BalloonWork {
    memory: GuestMemoryMmap,
    queues: Vec<ActiveQueue>,
    notifier: Arc<dyn Notifier>,
    control: Arc<Control>,
    pages: Pages,
    features: u64,
    /// From which block on whole blocks are to be given back, whenever they became whole.
    sweep: Option<u64>,
    timer: TimerFd,
    /// The chain of the driver's statistics, which it gets back when it is to tell them anew.
    statistics: Option<u16>,
}

impl BalloonWork {
    /// The work of a driver that is ready.
    pub fn new(
        memory: GuestMemoryMmap,
        queues: Vec<ActiveQueue>,
        notifier: Arc<dyn Notifier>,
        control: Arc<Control>,
        pages: Pages,
        features: u64,
    ) -> io::Result<Self> {
        let timer = TimerFd::new()?;
        Ok(Self { memory, queues, notifier, control, pages, features, sweep: None, timer, statistics: None })
    }

    /// Gives the queues back, and what is in the balloon.
    pub fn into_parts(self) -> (Vec<ActiveQueue>, Pages) {
        (self.queues, self.pages)
    }

    /// A queue.
    #[cfg(test)]
    pub fn queue(&self, number: usize) -> &virtio_queue::Queue {
        &self.queues[number].queue
    }

    /// The blocks that are in the balloon.
    #[cfg(test)]
    pub fn whole_blocks(&self) -> Vec<u64> {
        std::iter::successors(self.pages.whole(0, 1), |run| self.pages.whole(run.end, 1)).map(|run| run.start).collect()
    }

    /// Whether there is something to be given back.
    #[cfg(test)]
    pub fn is_sweeping(&self) -> bool {
        self.sweep.is_some()
    }

    fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }
}

impl Work for BalloonWork {
    fn sources(&self) -> Vec<(RawFd, EventSet, u64)> {
        let kicks = self.queues.iter().zip(0..).map(|(active, number)| (active.kick.as_raw_fd(), number));
        let others = [
            (self.control.discards().released().as_raw_fd(), RELEASED),
            (self.control.refresh().as_raw_fd(), REFRESH),
            (self.timer.as_raw_fd(), TIMER),
        ];
        kicks.chain(others).map(|(descriptor, number)| (descriptor, EventSet::IN, number)).collect()
    }

    fn handle(&mut self, source: u64, _: EventSet, _: &Epoll) {
        match source {
            // Each was seen to be readable; should it not be after all, there is nothing to be lost by a look.
            RELEASED => {
                let _ = self.control.discards().released().read();
                self.start_sweep();
            }
            REFRESH => {
                let _ = self.control.refresh().read();
                self.ask_for_statistics();
            }
            TIMER => {
                // It is not read, as that would wait for one that was set anew since.
                if let Err(error) = self.timer.clear() {
                    tracing::warn!(%error, "a timer of the balloon cannot be stopped");
                }
                self.go_on_sweeping();
            }
            queue => {
                let queue = queue as usize;
                if let Some(active) = self.queues.get(queue) {
                    active.kicked();
                }
                self.serve(queue);
            }
        }
    }

    fn begin(&mut self) {
        for queue in 0..self.queues.len() {
            self.serve(queue);
        }
        // Figures from before a pause are old.
        self.ask_for_statistics();
        // What was in the balloon already may be backed by memory again since a live update was prepared.
        self.start_sweep();
    }

    /// Puts the driver's statistics back, so that it does not notice. They were taken last.
    fn finish(&mut self) {
        if let (Some(_), Some(active)) = (self.statistics.take(), self.queues.get_mut(STATISTICS)) {
            active.queue.set_next_avail(active.queue.next_avail().wrapping_sub(1));
        }
    }
}

type Chain<'m> = DescriptorChain<&'m GuestMemoryMmap>;

impl BalloonWork {
    fn serve(&mut self, queue: usize) {
        match queue {
            STATISTICS if self.has(F_STATS_VQ) => self.take_statistics(),
            INFLATE | DEFLATE => self.requests(queue, if queue == INFLATE { Self::inflate } else { Self::deflate }),
            _ if self.has(F_REPORTING) => self.requests(queue, Self::report),
            _ => {}
        }
    }

    /// Does what the chains of a queue ask for.
    fn requests(&mut self, number: usize, serve: impl Fn(&mut Self, &GuestMemoryMmap, Chain<'_>)) {
        let memory = self.memory.clone();
        let mut round = Round::of(BATCH);
        while round.left > 0 {
            let Some(chain) = self.queues.get_mut(number).and_then(|active| active.take(&memory)) else { break };
            let head = chain.head_index();
            serve(self, &memory, chain);
            if let Some(active) = self.queues.get_mut(number) {
                active.give(&memory, head, 0);
            }
            round.gave();
        }
        if let Some(active) = self.queues.get_mut(number) {
            active.end_round(&memory, &*self.notifier, number, round);
        }
    }

    /// Pages are put into the balloon.
    fn inflate(&mut self, memory: &GuestMemoryMmap, chain: Chain<'_>) {
        // A driver that has not promised to tell before it takes a page back may have done so already with any that it has named
        // earlier, so that no block of several requests can be known to be whole.
        if !self.has(F_MUST_TELL_HOST) {
            return;
        }
        let mut whole = Vec::new();
        let Self { control, pages, .. } = self;
        let understood = for_each_page(memory, chain, control, |page| whole.extend(pages.insert(page)));
        if !understood {
            tracing::debug!("the guest puts into its balloon what is no memory");
        }
        whole.sort_unstable();
        if whole.len() as u64 > BLOCKS_MAX {
            self.start_sweep();
            return;
        }
        for run in whole.chunk_by(|one, next| one + 1 == *next) {
            let Some(first) = run.first() else { continue };
            match self.control.discards().discard(first * BLOCK, run.len() as u64 * BLOCK) {
                Ok(Discarded::Done) => {}
                // It is done, with all that is in the balloon then, when RAM is released.
                Ok(Discarded::Held) => break,
                Err(error) => {
                    tracing::debug!(%error, "memory of the balloon cannot be given back yet");
                    self.start_sweep();
                    break;
                }
            }
        }
    }

    /// Pages are taken out of the balloon. The driver may use them once it has its chain back.
    fn deflate(&mut self, memory: &GuestMemoryMmap, chain: Chain<'_>) {
        let Self { control, pages, .. } = self;
        if !for_each_page(memory, chain, control, |page| pages.remove(page)) {
            tracing::debug!("the guest takes out of its balloon what is no memory: none is given back any more");
            pages.clear();
        }
    }

    /// Pages are free, and are so until the driver has its chain back.
    fn report(&mut self, _: &GuestMemoryMmap, chain: Chain<'_>) {
        let discards = self.control.discards();
        let mut rest = REPORTED_MAX;
        for descriptor in chain.writable() {
            let length = u64::from(descriptor.len());
            let Some(offset) = discards.offset(descriptor.addr().0, length) else { continue };
            // The whole blocks in it. What lies in the memfd is far from the end of 64 bits.
            let (start, end) = (offset.next_multiple_of(BLOCK), (offset + length) / BLOCK * BLOCK);
            let wanted = end.saturating_sub(start).min(rest);
            rest -= wanted;
            match discards.discard(start, wanted) {
                Ok(Discarded::Done) => {}
                // Later it may not be free any more.
                Ok(Discarded::Held) => break,
                Err(error) => tracing::debug!(%error, "free memory of the guest is not given back"),
            }
        }
    }

    /// Takes what the driver tells, and keeps the chain.
    fn take_statistics(&mut self) {
        let Self { memory, queues, notifier, control, statistics, .. } = self;
        let Some(active) = queues.get_mut(STATISTICS) else { return };
        let mut round = Round::of(BATCH);
        while round.left > 0 {
            let Some(chain) = active.take(memory) else { break };
            round.left -= 1;
            // A driver has one. Of another's chains the last is kept.
            if let Some(head) = statistics.replace(chain.head_index()) {
                active.give(memory, head, 0);
                round.given = true;
            }
            if let Ok(mut reader) = chain.reader(memory) {
                control.told(Statistics::read(&mut reader));
            }
        }
        active.end_round(memory, &**notifier, STATISTICS, round);
    }

    /// Has the driver tell statistics, unless it is about to.
    fn ask_for_statistics(&mut self) {
        let Self { memory, queues, notifier, statistics, .. } = self;
        if let (Some(head), Some(active)) = (statistics.take(), queues.get_mut(STATISTICS)) {
            active.give(memory, head, 0);
            active.tell(memory, &**notifier, STATISTICS as u16);
        }
    }

    /// Has all be given back that is whole.
    fn start_sweep(&mut self) {
        self.sweep = Some(0);
        self.sweep_after(NOW);
    }

    fn sweep_after(&mut self, delay: Duration) {
        if let Err(error) = self.timer.reset(delay, None) {
            tracing::warn!(%error, "memory in the balloon is not given back");
        }
    }

    /// Gives back some more of what is whole.
    pub fn go_on_sweeping(&mut self) {
        let Some(blocks) = self.sweep.take().and_then(|from| self.pages.whole(from, BLOCKS_MAX)) else { return };
        match self.control.discards().discard(blocks.start * BLOCK, (blocks.end - blocks.start) * BLOCK) {
            Ok(Discarded::Done) => {
                self.sweep = Some(blocks.end);
                self.sweep_after(NOW);
            }
            // All is gone through once more when RAM is released.
            Ok(Discarded::Held) => {}
            Err(error) => {
                tracing::debug!(%error, "memory of the balloon cannot be given back yet");
                self.sweep = Some(0);
                self.sweep_after(RETRY);
            }
        }
    }
}

/// Calls `each` with the place in RAM of every page that a request names; others are left out. Says whether the request could be
/// understood to its end.
fn for_each_page(memory: &GuestMemoryMmap, chain: Chain<'_>, control: &Control, mut each: impl FnMut(u64)) -> bool {
    const NUMBER: usize = size_of::<u32>();
    let Ok(mut reader) = chain.reader(memory) else { return false };
    let length = reader.available_bytes();
    if length == 0 || !length.is_multiple_of(NUMBER) || length > NAMED_MAX * NUMBER {
        return false;
    }
    let mut number = [0; NUMBER];
    for _ in 0..length / NUMBER {
        if reader.read_exact(&mut number).is_err() {
            return false;
        }
        let address = u64::from(u32::from_le_bytes(number)) * PAGE;
        if let Some(offset) = control.discards().offset(address, PAGE) {
            each(offset / PAGE);
        }
    }
    true
}
