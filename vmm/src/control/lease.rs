//! The lease under which a VM is held ready for a live update.
//!
//! A VM that is prepared or frozen waits for `vmm update` to commit. Should that process die, in whatever way, nobody
//! would tell the VM to run on. So `Prepare` comes with the read end of a pipe whose write end only that process holds:
//! the kernel closes it with the process, the read end hangs up, and the VM thaws by itself.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};

/// Creates a lease: the end that keeps it alive, and the end to hand out.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    Ok((write, read))
}

/// The VM's side: who holds it, if anyone.
#[derive(Clone)]
pub struct Lease {
    current: Arc<Mutex<Current>>,
    thaw: Arc<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
struct Current {
    /// Counts grants, so that the end of an old lease is never taken for that of a newer one.
    serial: u64,
    held: Option<OwnedFd>,
}

impl Lease {
    /// A lease that nobody holds; `thaw` is called when a holder disappears.
    pub fn new(thaw: impl Fn() + Send + Sync + 'static) -> Self {
        Self { current: Arc::default(), thaw: Arc::new(thaw) }
    }

    /// Whether somebody holds it.
    pub fn is_held(&self) -> bool {
        self.lock().held.is_some()
    }

    /// Thaws at once if the holder is gone, rather than when the watcher gets to it: a second `vmm update` right after
    /// one that was killed must not find the VM still prepared.
    pub fn reclaim(&self) {
        let mut current = self.lock();
        if current.held.as_ref().is_some_and(|lease| hung_up(lease.as_fd(), Some(&Timespec::default()))) {
            current.held = None;
            (self.thaw)();
        }
    }

    /// Grants it to whoever holds the other end of `lease`, and watches that end. `false` where somebody else holds it, who keeps it.
    pub fn grant(&self, lease: OwnedFd) -> io::Result<bool> {
        let watched = lease.try_clone()?;
        let serial = {
            let mut current = self.lock();
            if current.held.is_some() {
                return Ok(false);
            }
            current.serial += 1;
            current.held = Some(lease);
            current.serial
        };
        let lease = self.clone();
        let watcher = std::thread::Builder::new().name("lease".to_owned()).spawn(move || {
            hung_up(watched.as_fd(), None);
            lease.end(serial);
        });
        if let Err(error) = watcher {
            self.release();
            return Err(error);
        }
        Ok(true)
    }

    /// Waits until nobody holds it any more.
    pub fn await_release(&self) {
        const LOOK: Duration = Duration::from_millis(5);
        while self.lock().held.is_some() {
            std::thread::sleep(LOOK);
        }
    }

    /// Gives it back: from now on the holder may go without anything happening.
    pub fn release(&self) {
        self.lock().held = None;
    }

    fn end(&self, serial: u64) {
        // The lock is kept while thawing, so that a new lease cannot be granted in between and be thawed by this one.
        let mut current = self.lock();
        if current.serial == serial && current.held.take().is_some() {
            tracing::warn!("the live update that held this VM is gone: the guest runs on");
            (self.thaw)();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Current> {
        // What is behind the lock is valid at every moment, so a panic elsewhere does not spoil it.
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits until the other end of a pipe is closed; without a time-out, for as long as it takes.
fn hung_up(lease: BorrowedFd<'_>, timeout: Option<&Timespec>) -> bool {
    loop {
        // No events asked for: POLLHUP and POLLERR come anyway, and data in the pipe, which nobody should have written,
        // does not wake the watcher over and over.
        let mut polled = [PollFd::from_borrowed_fd(lease, PollFlags::empty())];
        match rustix::event::poll(&mut polled, timeout) {
            Err(rustix::io::Errno::INTR) => {}
            // A file that cannot be watched is no lease: better to thaw than never to.
            Err(_) => return true,
            Ok(0) if timeout.is_some() => return false,
            Ok(_) if polled[0].revents().is_empty() => {}
            Ok(_) => return true,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    fn lease() -> (Lease, mpsc::Receiver<()>) {
        let (thawed, receiver) = mpsc::channel();
        (Lease::new(move || thawed.send(()).unwrap()), receiver)
    }

    #[test]
    fn vm_thaws_when_the_holder_goes() {
        let (lease, thawed) = lease();
        let (holder, handed_out) = pair().unwrap();
        assert!(lease.grant(handed_out).unwrap());
        assert!(lease.is_held());
        assert!(thawed.recv_timeout(Duration::from_millis(50)).is_err());
        drop(holder);
        thawed.recv_timeout(Duration::from_secs(5)).unwrap();
        assert!(!lease.is_held());
    }

    #[test]
    fn released_lease_ends_without_effect() {
        let (lease, thawed) = lease();
        let (holder, handed_out) = pair().unwrap();
        assert!(lease.grant(handed_out).unwrap());
        lease.release();
        drop(holder);
        assert!(thawed.recv_timeout(Duration::from_millis(100)).is_err());
    }

    #[test]
    fn end_of_an_old_lease_leaves_a_new_one_alone() {
        let (lease, thawed) = lease();
        let (old_holder, handed_out) = pair().unwrap();
        assert!(lease.grant(handed_out).unwrap());
        lease.release();
        let (_new_holder, handed_out) = pair().unwrap();
        assert!(lease.grant(handed_out).unwrap());
        drop(old_holder);
        assert!(thawed.recv_timeout(Duration::from_millis(100)).is_err());
        assert!(lease.is_held());
    }

    #[test]
    fn reclaim_thaws_exactly_once_and_only_without_a_holder() {
        let (lease, thawed) = lease();
        let (holder, handed_out) = pair().unwrap();
        assert!(lease.grant(handed_out).unwrap());
        lease.reclaim();
        assert!(lease.is_held());
        drop(holder);
        lease.reclaim();
        thawed.recv_timeout(Duration::from_secs(5)).unwrap();
        assert!(thawed.recv_timeout(Duration::from_millis(100)).is_err());
    }

    #[test]
    fn holder_keeps_it_when_somebody_else_asks() {
        let (lease, thawed) = lease();
        let (holder, handed_out) = pair().unwrap();
        assert!(lease.grant(handed_out).unwrap());
        let (other, handed_out) = pair().unwrap();
        assert!(!lease.grant(handed_out).unwrap());
        drop(other);
        assert!(thawed.recv_timeout(Duration::from_millis(100)).is_err());
        drop(holder);
        thawed.recv_timeout(Duration::from_secs(5)).unwrap();
    }

    #[test]
    fn data_in_the_pipe_is_no_end() {
        let (lease, thawed) = lease();
        let (holder, handed_out) = pair().unwrap();
        rustix::io::write(&holder, b"still here").unwrap();
        assert!(lease.grant(handed_out).unwrap());
        assert!(thawed.recv_timeout(Duration::from_millis(100)).is_err());
        drop(holder);
        thawed.recv_timeout(Duration::from_secs(5)).unwrap();
    }
}
