//! A running VM's balloon, as its control socket sees it.

use std::time::Duration;

use super::{State, Vm, VmError};
use crate::device::virtio::balloon::{BalloonError, BalloonStatus};
use crate::machine::MachineError;
use crate::memory::MemoryError;

/// How long a guest has to tell how it is; else what it told last counts.
const PATIENCE: Duration = Duration::from_secs(1);

impl Vm {
    /// What its balloon is asked for, and how it is. Waits for the guest, for a bounded time.
    pub fn balloon(&self) -> Result<BalloonStatus, VmError> {
        let control = self.0.machine.balloon().ok_or(BalloonError::None)?;
        control.status(PATIENCE).map_err(|source| {
            let operation = "find out how much of it is backed with memory";
            MachineError::from(MemoryError::System { operation, source }).into()
        })
    }

    /// Asks the guest to have so many bytes in its balloon.
    pub fn set_balloon(&self, bytes: u64) -> Result<(), VmError> {
        let balloon = self.0.machine.balloon().ok_or(BalloonError::None)?;
        // Under the lock: a document that is being written has either all of it or nothing.
        let control = self.0.control();
        match control.lifecycle.state() {
            State::Running | State::Paused | State::Prepared => Ok(balloon.set_target(bytes)?),
            state => Err(VmError::State { operation: "ask for its memory", state }),
        }
    }
}
