//! A thread that does a device's work: it waits for descriptors, and gives the work back when it is stopped.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::thread::{self, JoinHandle};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// What a worker does.
pub trait Work: Send + 'static {
    /// What to wait for: a descriptor, which events, and the number that [`Self::handle`] is then called with (not `u64::MAX`).
    fn sources(&self) -> Vec<(RawFd, EventSet, u64)>;
    /// Something has happened to a source.
    fn handle(&mut self, source: u64, events: EventSet, epoll: &Epoll);
    /// Called once, before anything is waited for: what came before the thread was there has no event.
    fn begin(&mut self);
    /// Called once, at the end: nothing may be in flight any more when it returns.
    fn finish(&mut self);
}

/// The thread.
pub struct Worker<W> {
    stop: EventFd,
    thread: JoinHandle<W>,
}

const STOP: u64 = u64::MAX;
const EVENTS: usize = 16;

impl<W: Work> Worker<W> {
    /// Starts it.
    pub fn start(name: &str, mut work: W) -> io::Result<Self> {
        let stop = EventFd::new(libc::EFD_NONBLOCK)?;
        let epoll = Epoll::new()?;
        epoll.ctl(ControlOperation::Add, stop.as_raw_fd(), EpollEvent::new(EventSet::IN, STOP))?;
        for (descriptor, events, number) in work.sources() {
            epoll.ctl(ControlOperation::Add, descriptor, EpollEvent::new(events, number))?;
        }
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || {
            work.begin();
            let mut events = [EpollEvent::default(); EVENTS];
            loop {
                let count = match epoll.wait(-1, &mut events) {
                    Ok(count) => count,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => {
                        tracing::error!(%error, "a device's events cannot be waited for");
                        break;
                    }
                };
                // To stop comes first: what else has happened is still there when work goes on.
                if events[..count].iter().any(|event| event.data() == STOP) {
                    break;
                }
                for event in &events[..count] {
                    work.handle(event.data(), event.event_set(), &epoll);
                }
            }
            work.finish();
            work
        })?;
        Ok(Self { stop, thread })
    }

    /// Stops it and gives the work back; none if it has panicked, which is a defect of ours.
    pub fn stop(self) -> Option<W> {
        if let Err(error) = self.stop.write(1) {
            tracing::error!(%error, "a device's thread cannot be told to stop");
        }
        self.thread.join().ok()
    }
}
