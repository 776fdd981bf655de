//! What has the driver tell the network where the guest is now.
//!
//! An announcement can be lost: a bridge's port forwards nothing before the kernel has taken notice of its carrier, which it may do
//! but once a second, and a guest that was just restored is faster. So the driver is asked again after each, a few times.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

/// From the end of an announcement until the next is asked for.
pub const WAITS: [Duration; 5] = [
    Duration::from_millis(100),
    Duration::from_millis(300),
    Duration::from_millis(600),
    Duration::from_millis(1500),
    Duration::from_millis(3500),
];

/// The announcements of a device. Its thread hears of what the driver does, and asks again.
pub struct Announcements {
    asked: AtomicBool,
    /// So many of the waits are over.
    waited: AtomicUsize,
}

impl Default for Announcements {
    /// None are wanted.
    fn default() -> Self {
        Self { asked: AtomicBool::new(false), waited: AtomicUsize::new(WAITS.len()) }
    }
}

impl Announcements {
    /// Asks for the first, from which the others follow.
    pub fn start(&self) {
        // In this order: the thread may look at any time, and must not wait for a second one before the first is asked for.
        self.ask(true);
        self.waited.store(0, Ordering::Release);
    }

    /// Has none follow, and asks for one or for none.
    pub fn end(&self, asked: bool) {
        self.waited.store(WAITS.len(), Ordering::Release);
        self.ask(asked);
    }

    fn ask(&self, asked: bool) {
        self.asked.store(asked, Ordering::Release);
    }

    /// Whether the driver is asked to announce itself.
    pub fn are_asked_for(&self) -> bool {
        self.asked.load(Ordering::Acquire)
    }

    /// The driver says that it has announced itself. Says whether it was asked to.
    pub fn made(&self) -> bool {
        self.asked.swap(false, Ordering::AcqRel)
    }

    /// How long to wait before [`Self::again`]; none while the driver is asked, and when it was asked often enough.
    pub fn wait(&self) -> Option<Duration> {
        if self.are_asked_for() { None } else { WAITS.get(self.waited.load(Ordering::Acquire)).copied() }
    }

    /// Asks once more.
    pub fn again(&self) {
        self.waited.fetch_add(1, Ordering::AcqRel);
        self.ask(true);
    }
}
