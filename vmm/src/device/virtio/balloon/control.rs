//! What the operator, the driver's registers and the device's thread have in common.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::pages::PAGE;
use super::statistics::Statistics;
use crate::device::virtio::Notifier;
use crate::memory::discards::Discards;

/// Where the driver writes how much it has put into the balloon; before it lies what it is asked for.
const ACTUAL_AT: u64 = 4;

/// Why a balloon cannot be had as asked.
#[derive(Debug, thiserror::Error)]
pub enum BalloonError {
    /// The VM has none.
    #[error("the VM has no balloon: start it with `vmm run --balloon`")]
    None,
    /// More than all of RAM.
    #[error("{asked} bytes cannot be asked of a guest that has {memory} bytes of memory")]
    Size {
        /// What was asked for.
        asked: u64,
        /// The guest's memory.
        memory: u64,
    },
}

/// What an operator can know of a balloon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BalloonStatus {
    /// Bytes that the guest is asked for.
    pub target: u64,
    /// Bytes that the driver says are in the balloon.
    pub actual: u64,
    /// Bytes of the guest's memory that the host has set memory aside for.
    pub backed: u64,
    /// What the driver has told last of the guest's memory.
    pub statistics: Vec<(&'static str, u64)>,
    /// How long ago that was.
    pub statistics_age: Option<Duration>,
}

#[derive(Default)]
struct State {
    /// Pages that the guest is asked for.
    target: u32,
    /// Pages that the driver says are in the balloon.
    actual: u32,
    statistics: Statistics,
    /// When they came, and how often they have.
    came: Option<Instant>,
    times: u64,
    /// How to reach the driver, while the device works.
    notifier: Option<Arc<dyn Notifier>>,
    /// The driver tells statistics.
    tells: bool,
}

/// A balloon as the operator has hold of it.
pub struct Control {
    discards: Arc<Discards>,
    state: Mutex<State>,
    statistics_came: Condvar,
    refresh: EventFd,
}

impl Control {
    /// The control of a balloon in the RAM behind `discards`.
    pub fn new(discards: &Arc<Discards>) -> io::Result<Self> {
        Ok(Self {
            discards: discards.clone(),
            state: Mutex::default(),
            statistics_came: Condvar::new(),
            refresh: EventFd::new(libc::EFD_NONBLOCK)?,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn discards(&self) -> &Discards {
        &self.discards
    }

    /// Readable when the operator wants fresh statistics.
    pub(super) fn refresh(&self) -> &EventFd {
        &self.refresh
    }

    fn pages_of_ram(&self) -> u64 {
        self.discards.size() / PAGE
    }

    /// Asks the guest to have so many bytes in the balloon, rounded down to whole pages.
    pub fn set_target(&self, bytes: u64) -> Result<(), BalloonError> {
        let memory = self.discards.size();
        let pages = u32::try_from(bytes / PAGE).ok().filter(|_| bytes <= memory);
        let mut state = self.state();
        state.target = pages.ok_or(BalloonError::Size { asked: bytes, memory })?;
        // A driver that is not there yet reads it when it comes, and that of a device at rest is told when it works again.
        if let Some(notifier) = &state.notifier {
            notifier.config_changed();
        }
        Ok(())
    }

    /// How the balloon is. The driver has so long to tell how the guest is.
    pub fn status(&self, patience: Duration) -> io::Result<BalloonStatus> {
        let mut state = self.state();
        if state.tells && self.refresh.write(1).is_ok() {
            let times = state.times;
            let waited = self.statistics_came.wait_timeout_while(state, patience, |state| state.times == times);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(BalloonStatus {
            target: u64::from(state.target) * PAGE,
            actual: u64::from(state.actual) * PAGE,
            backed: self.discards.backed()?,
            statistics: state.statistics.named(),
            statistics_age: state.came.map(|came| came.elapsed()),
        })
    }

    /// The driver has told statistics.
    pub(super) fn told(&self, statistics: Statistics) {
        let mut state = self.state();
        (state.statistics, state.came) = (statistics, Some(Instant::now()));
        state.times = state.times.wrapping_add(1);
        self.statistics_came.notify_all();
    }

    /// The device works.
    pub(super) fn started(&self, notifier: Arc<dyn Notifier>, tells: bool) {
        let mut state = self.state();
        // It may not know what was asked for meanwhile.
        if state.target != state.actual {
            notifier.config_changed();
        }
        (state.notifier, state.tells) = (Some(notifier), tells);
    }

    /// The device rests.
    pub(super) fn stopped(&self) {
        let mut state = self.state();
        (state.notifier, state.tells) = (None, false);
    }

    /// The driver is gone, and what it has said does not hold any more.
    pub(super) fn reset(&self) {
        let mut state = self.state();
        (state.actual, state.statistics, state.came) = (0, Statistics::default(), None);
    }

    pub(super) fn config_space(&self) -> [u8; 8] {
        let state = self.state();
        let mut space = [0; 8];
        let (target, actual) = space.split_at_mut(ACTUAL_AT as usize);
        target.copy_from_slice(&state.target.to_le_bytes());
        actual.copy_from_slice(&state.actual.to_le_bytes());
        space
    }

    pub(super) fn write_config(&self, offset: u64, data: &[u8]) {
        let mut state = self.state();
        let mut actual = state.actual.to_le_bytes();
        for (at, byte) in (offset..=u64::MAX).zip(data) {
            let place = at.checked_sub(ACTUAL_AT).and_then(|at| actual.get_mut(usize::try_from(at).ok()?));
            if let Some(place) = place {
                *place = *byte;
            }
        }
        state.actual = u32::from_le_bytes(actual);
    }

    pub(super) fn save(&self) -> (u32, u32) {
        let state = self.state();
        (state.target, state.actual)
    }

    pub(super) fn restore(&self, target: u32, actual: u32) -> Result<(), String> {
        let pages = self.pages_of_ram();
        if u64::from(target) > pages {
            return Err(format!("it is to have {target} pages, and RAM has {pages}"));
        }
        let mut state = self.state();
        (state.target, state.actual) = (target, actual);
        Ok(())
    }
}
