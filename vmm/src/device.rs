//! What a guest finds besides CPUs, memory and interrupt controllers; and the loop that brings the outside world to it.

pub mod serial;
pub mod virtio;

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};

/// Holds the event loop back while the devices' state is being taken, and until they run on.
#[derive(Default)]
pub struct Gate {
    closed: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    /// Waits for the event that is being handled, and lets no other through.
    pub fn close(&self) {
        *self.closed.lock().unwrap_or_else(PoisonError::into_inner) = true;
    }

    /// Lets events through again.
    pub fn open(&self) {
        *self.closed.lock().unwrap_or_else(PoisonError::into_inner) = false;
        self.opened.notify_all();
    }

    /// Does what an event asks for, once the gate is open.
    fn pass(&self, action: impl FnOnce()) {
        let mut closed = self.closed.lock().unwrap_or_else(PoisonError::into_inner);
        while *closed {
            closed = self.opened.wait(closed).unwrap_or_else(PoisonError::into_inner);
        }
        action();
    }
}

struct Gated<S> {
    gate: Arc<Gate>,
    subscriber: S,
}

impl<S: MutEventSubscriber> MutEventSubscriber for Gated<S> {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let Self { gate, subscriber } = self;
        gate.pass(|| subscriber.process(events, ops));
    }

    fn init(&mut self, ops: &mut EventOps) {
        self.subscriber.init(ops);
    }
}

/// Starts the thread in which the outside world's events reach the devices.
pub fn start_event_loop(gate: Arc<Gate>, input: serial::SerialInput) -> io::Result<()> {
    let failed = |error: event_manager::Error| io::Error::other(format!("event loop: {error:?}"));
    let mut manager = EventManager::<Box<dyn MutEventSubscriber + Send>>::new().map_err(failed)?;
    manager.add_subscriber(Box::new(Gated { gate, subscriber: input }));
    thread::Builder::new().name("devices".to_owned()).spawn(move || {
        loop {
            if let Err(error) = manager.run() {
                tracing::warn!(?error, "devices: an event could not be waited for");
            }
        }
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn closed_gate_holds_events_back_until_it_opens() {
        let gate = Arc::new(Gate::default());
        gate.close();
        let (done, passed) = mpsc::channel();
        let other = gate.clone();
        thread::spawn(move || other.pass(|| done.send(()).unwrap()));
        assert!(passed.recv_timeout(Duration::from_millis(50)).is_err());
        gate.open();
        passed.recv_timeout(Duration::from_secs(10)).unwrap();
    }
}
