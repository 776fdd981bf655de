//! A memory balloon (virtio 1.2, 5.5): the guest gives memory back to the host, what the operator asks it for and what it has free
//! anyway.
//!
//! Memory goes back in whole blocks of 2 MiB, when all pages of one are in the balloon. A smaller hole would split the huge page
//! that it is in, and what the next kernel has to do inside the pause of a live update it does once for each piece.
//!
//! While RAM is held for a live update nothing is given back, and the driver does not notice. What comes of that later depends on
//! whose the memory is by then. Pages in the balloon are nobody's until the driver asks for them back on the deflate queue, so which
//! they are is kept, through the update, too, and what is still there afterwards is given back then. Pages that the driver reports
//! as free are its own again as soon as it is told so, and it may use them without another word: that report is forgotten.

mod control;
mod pages;
mod statistics;
#[cfg(test)]
mod tests;
mod work;

use std::sync::Arc;

use kho_abi::document::virtio::{BalloonV1, VirtioState};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

pub use self::control::{BalloonError, BalloonStatus, Control};
use self::pages::Pages;
use self::work::BalloonWork;
use super::worker::Worker;
use super::{Activation, ActiveQueue, VirtioDevice, VirtioError, read_space};

/// The driver takes no page back before it has told, and was heard.
const F_MUST_TELL_HOST: u32 = 0;
/// There is a queue for statistics.
const F_STATS_VQ: u32 = 1;
/// The driver takes pages back before the guest kills a process for want of memory.
const F_DEFLATE_ON_OOM: u32 = 2;
/// There is a queue for reports of free pages.
const F_REPORTING: u32 = 5;

/// Entries of the queues: pages for the balloon, pages out of it, statistics, reports. As there is no queue of free page hints, which
/// has the number before that of reports, the specification and drivers disagree on that of reports: it is one of the last two.
const QUEUE_SIZES: [u16; 5] = [128; 5];

const NAME: &str = "the balloon";

/// A balloon.
pub struct Balloon {
    control: Arc<Control>,
    /// What is in it, while the thread does not have that.
    pages: Pages,
    running: Option<Worker<BalloonWork>>,
}

impl Balloon {
    /// An empty one.
    pub fn new(control: &Arc<Control>) -> Self {
        let pages = Pages::new(control.discards().size());
        Self { control: control.clone(), pages, running: None }
    }

    fn empty(&self) -> Pages {
        Pages::new(self.control.discards().size())
    }
}

impl VirtioDevice for Balloon {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        1 << F_MUST_TELL_HOST | 1 << F_STATS_VQ | 1 << F_DEFLATE_ON_OOM | 1 << F_REPORTING
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_space(&self.control.config_space(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.control.write_config(offset, data);
    }

    fn start(&mut self, activation: Activation) -> Result<(), VirtioError> {
        let Activation { memory, features, queues, notifier } = activation;
        let pages = std::mem::replace(&mut self.pages, Pages::new(0));
        let work = BalloonWork::new(memory, queues, notifier.clone(), self.control.clone(), pages, features)
            .and_then(|work| Worker::start("balloon", work));
        match work {
            Ok(worker) => self.running = Some(worker),
            Err(source) => {
                self.pages = self.empty();
                let operation = "start its thread".to_owned();
                return Err(VirtioError::System { device: NAME.to_owned(), operation, source });
            }
        }
        self.control.started(notifier, features & 1 << F_STATS_VQ != 0);
        Ok(())
    }

    fn stop(&mut self) -> Vec<ActiveQueue> {
        self.control.stopped();
        let Some(worker) = self.running.take() else { return Vec::new() };
        match worker.stop() {
            Some(work) => {
                let (queues, pages) = work.into_parts();
                self.pages = pages;
                queues
            }
            None => {
                self.pages = self.empty();
                Vec::new()
            }
        }
    }

    /// The driver has all of its pages again. What the operator has asked for stays.
    fn reset(&mut self) {
        self.pages = self.empty();
        self.control.reset();
    }

    /// Nothing of it lasts.
    fn flush(&mut self) -> Result<(), VirtioError> {
        Ok(())
    }

    fn save(&self) -> VirtioState {
        let Self { control, pages, running: _ } = self;
        let (target, actual) = control.save();
        VirtioState::Balloon(BalloonV1 { target, actual, blocks: pages.save() })
    }

    fn restore(&mut self, state: &VirtioState) -> Result<(), VirtioError> {
        let VirtioState::Balloon(BalloonV1 { target, actual, blocks }) = state else {
            return Err(VirtioError::other_kind(NAME));
        };
        let unfit = |reason| VirtioError::Unfit { device: NAME.to_owned(), reason };
        self.pages = Pages::restored(self.control.discards().size(), blocks).map_err(unfit)?;
        self.control.restore(*target, *actual).map_err(unfit)
    }

    /// What is to be said is said at every start.
    fn after_restore(&mut self) {}
}
