//! What the threads of devices do with their queues. A driver can write anything into a ring: what makes no sense is left alone,
//! and said only to who debugs, as a guest must not fill the host's log.

use virtio_queue::{DescriptorChain, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{ActiveQueue, Notifier};

/// What a thread does with a queue before it looks at anything else.
#[derive(Clone, Copy)]
pub struct Round {
    /// How many chains may still be taken.
    pub left: usize,
    /// Whether one was given back that the driver has not been told of.
    pub given: bool,
}

impl Round {
    /// A round of so many chains.
    pub fn of(left: usize) -> Self {
        Self { left, given: false }
    }

    /// A chain was taken and given back.
    pub fn gave(&mut self) {
        *self = Self { left: self.left - 1, given: true };
    }
}

impl ActiveQueue {
    /// The next available chain. When there is none, the driver will kick for the next one.
    pub fn take<'m>(&mut self, memory: &'m GuestMemoryMmap) -> Option<DescriptorChain<&'m GuestMemoryMmap>> {
        if !self.queue.ready() {
            return None;
        }
        // A ring that says twice that there is something, and has nothing, is broken.
        for _ in 0..2 {
            if let Some(chain) = self.queue.pop_descriptor_chain(memory) {
                return Some(chain);
            }
            match self.queue.enable_notification(memory) {
                Ok(false) => return None,
                Ok(true) => {}
                Err(error) => {
                    tracing::debug!(%error, "a queue of the guest is broken");
                    return None;
                }
            }
        }
        tracing::debug!("a queue of the guest says that it has what it has not");
        None
    }

    /// Gives a chain back with so many bytes written into it. The driver is to be told, by [`Self::tell`].
    pub fn give(&mut self, memory: &GuestMemoryMmap, head: u16, written: u32) {
        if let Err(error) = self.queue.add_used(memory, head, written) {
            tracing::debug!(%error, head, "a chain of the guest cannot be given back");
        }
    }

    /// Gives chains back that belong together, with the bytes written into each: the driver finds all of them, or none. It is to
    /// be told by [`Self::tell_surely`].
    pub fn give_together(&mut self, memory: &GuestMemoryMmap, chains: &[(u16, u32)]) {
        let size = self.queue.size();
        let sound: Vec<_> = chains.iter().filter(|(head, _)| *head < size).collect();
        let Some(((last, written), others)) = sound.split_last() else { return };
        for (head, written) in others {
            // As the queue does it for one, but for the count, which the last one brings up to date for all.
            let next = self.queue.next_used();
            let element = u64::from(*head) | u64::from(*written) << 32;
            let at = self.queue.used_ring().checked_add(4 + u64::from(next % size) * 8);
            let put = at.map(|at| memory.write_obj(element.to_le(), GuestAddress(at)));
            if !matches!(put, Some(Ok(()))) {
                tracing::debug!(head, "a chain of the guest cannot be given back");
                return;
            }
            self.queue.set_next_used(next.wrapping_add(1));
        }
        self.give(memory, *last, *written);
    }

    /// Tells the driver that chains were given back, if it wants to know.
    pub fn tell(&mut self, memory: &GuestMemoryMmap, notifier: &dyn Notifier, number: u16) {
        // Where it cannot be known whether the driver wants to be told, it is told.
        if self.queue.needs_notification(memory).unwrap_or(true) {
            notifier.queue_used(number);
        }
    }

    /// Ends a round. The driver is told of what was given back; what there may be beyond a whole round is for another one.
    pub fn end_round(&mut self, memory: &GuestMemoryMmap, notifier: &dyn Notifier, number: usize, round: Round) {
        if round.given {
            self.tell(memory, notifier, number as u16);
        }
        if round.left == 0 {
            self.again();
        }
    }

    /// Tells the driver that chains were given back, some of them together: the queue has not counted these, so that it cannot
    /// know whether the driver wants to know.
    pub fn tell_surely(&mut self, memory: &GuestMemoryMmap, notifier: &dyn Notifier, number: u16) {
        // It begins to count anew all the same.
        let _ = self.queue.needs_notification(memory);
        notifier.queue_used(number);
    }

    /// Takes a kick.
    pub fn kicked(&self) {
        if let Err(error) = self.kick.read() {
            tracing::debug!(%error, "a kick that was none");
        }
    }

    /// Has the thread come back for what is left, after it has looked whether it is to stop.
    pub fn again(&self) {
        if let Err(error) = self.kick.write(1) {
            tracing::error!(%error, "what is left in a queue may wait for the guest's next kick");
        }
    }
}
