//! Interrupts from one CPU to the next: numbered, and the next is sent only when the last has been acknowledged through memory, as
//! a controller keeps one pending interrupt of a kind and no more.

use core::sync::atomic::{AtomicU64, Ordering};

/// In how many ways they are sent in turn, so that one that comes twice is not mistaken for the next.
pub const LANES: u64 = 4;

/// What the sender and the receiver share.
#[derive(Debug, Default)]
pub struct Link {
    sent: AtomicU64,
    taken: AtomicU64,
}

impl Link {
    /// Nothing has been sent yet.
    pub const fn new() -> Self {
        Link { sent: AtomicU64::new(0), taken: AtomicU64::new(0) }
    }

    /// How many have been taken.
    pub fn taken(&self) -> u64 {
        self.taken.load(Ordering::SeqCst)
    }

    /// The receiver has got one, by one of the ways. The error is how many had been taken before one that nobody has sent.
    pub fn take(&self, lane: u64) -> Result<(), u64> {
        let taken = self.taken();
        if taken >= self.sent.load(Ordering::SeqCst) || (taken + 1) % LANES != lane {
            return Err(taken);
        }
        self.taken.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// What the sender has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The last has not come yet.
    Wait,
    /// Send the next, which is numbered already, by this way.
    Send {
        /// Which one.
        lane: u64,
    },
    /// The last has not come for so many counts of running time; it has to be sent once more.
    Lost {
        /// Its number.
        number: u64,
        /// Counts of running time.
        waited: u64,
    },
}

/// What the sender keeps.
#[derive(Debug, Clone, Copy)]
pub struct Sender {
    waited: u64,
    limit: u64,
}

impl Sender {
    /// Lost means: not within so many counts of running time.
    pub fn new(limit: u64) -> Self {
        Sender { waited: 0, limit }
    }

    /// Another look, after `ran` counts of running time. Without `send` it only waits.
    pub fn look(&mut self, link: &Link, ran: u64, send: bool) -> Step {
        let sent = link.sent.load(Ordering::SeqCst);
        if link.taken() == sent {
            self.waited = 0;
            if !send {
                return Step::Wait;
            }
            link.sent.store(sent + 1, Ordering::SeqCst);
            return Step::Send { lane: (sent + 1) % LANES };
        }
        self.waited += ran;
        if self.waited > self.limit {
            return Step::Lost { number: sent, waited: core::mem::take(&mut self.waited) };
        }
        Step::Wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_is_sent_when_the_last_was_taken() {
        let (link, mut sender) = (Link::new(), Sender::new(100));
        for number in 0..9 {
            let lane = (number + 1) % LANES;
            assert_eq!(link.taken(), number);
            assert_eq!(sender.look(&link, 90, false), Step::Wait);
            assert_eq!(sender.look(&link, 90, true), Step::Send { lane });
            assert_eq!(sender.look(&link, 90, true), Step::Wait);
            assert_eq!(link.take(lane), Ok(()));
        }
    }

    #[test]
    fn one_that_comes_twice_is_noticed() {
        let (link, mut sender) = (Link::new(), Sender::new(100));
        assert_eq!(link.take(1), Err(0), "none was sent");
        assert_eq!(sender.look(&link, 0, true), Step::Send { lane: 1 });
        assert_eq!((link.take(1), link.take(1)), (Ok(()), Err(1)));
        assert_eq!(sender.look(&link, 0, true), Step::Send { lane: 2 });
        assert_eq!(link.take(1), Err(1), "even when the next has been sent meanwhile");
        assert_eq!(link.take(2), Ok(()));
    }

    #[test]
    fn one_that_does_not_come_is_lost_after_running_time() {
        let (link, mut sender) = (Link::new(), Sender::new(100));
        assert_eq!(sender.look(&link, 1000, true), Step::Send { lane: 1 });
        assert_eq!(sender.look(&link, 60, true), Step::Wait);
        assert_eq!(sender.look(&link, 60, true), Step::Lost { number: 1, waited: 120 });
        assert_eq!(sender.look(&link, 60, true), Step::Wait, "waited for anew");
        assert_eq!(link.take(1), Ok(()));
        assert_eq!(sender.look(&link, 60, true), Step::Send { lane: 2 });
    }
}
