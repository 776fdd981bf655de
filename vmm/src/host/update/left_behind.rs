//! VMs that the operator leaves out of a live update. They end with the old kernel, so they are paused before file systems are written
//! back: what they have written until then is on the disks. Until the reboot that, too, can be undone.

use std::time::Duration;

use crate::control::client::{Client, ClientError};
use crate::control::interface::MachineState;
use crate::control::server::chain;
use crate::control::socket::RunDir;

/// A VM that is left out.
pub struct LeftBehind {
    /// Its name.
    pub name: String,
    client: Result<Client, ClientError>,
    /// Whether it runs as soon as the update is undone.
    paused: bool,
}

impl LeftBehind {
    /// The VM of that name. Whether it answers does not matter.
    pub fn new(dir: &RunDir, name: &str, limit: Duration) -> Self {
        Self { name: name.to_owned(), client: Client::connect(dir, name, limit), paused: false }
    }

    /// Pauses it, unless it is, and says so before. What does not answer ends as it is.
    pub fn pause(&mut self, announce: impl FnOnce(&str)) -> Result<(), String> {
        let unheard = |error: &ClientError| format!("it does not answer: {}", chain(error));
        let client = self.client.as_mut().map_err(|error| unheard(error))?;
        if client.status().map_err(|error| unheard(&error))?.state == MachineState::Running {
            announce(&self.name);
            client.pause().map_err(|error| unheard(&error))?;
            self.paused = true;
        }
        Ok(())
    }

    /// Lets it run on.
    pub fn resume(&mut self) {
        if let (true, Ok(client)) = (std::mem::take(&mut self.paused), &mut self.client)
            && let Err(error) = client.resume()
        {
            tracing::error!(error = %chain(&error), vm = self.name, "it stays paused: `vmm resume` lets it run");
        }
    }
}
