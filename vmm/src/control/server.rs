//! The server's side of the Varlink interface: a thread in each VM's process.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use super::accept;
use super::balloon::{BalloonError, BalloonStatus, Statistic};
use super::interface::{
    FrozenDocument, MachineError, MachineState, MachineStatus, Mark, PreparedFiles, RamFile, marks,
};
use super::lease::Lease;
use crate::device::virtio::balloon::BalloonError as NoneOrSize;
use crate::vm::{Frozen, Prepared, Vm, VmError};

/// A VM as the control thread uses it; calls block. There is one kind, and another one in the tests of this module, as
/// a real VM needs KVM.
pub trait Guest: Send + Sync {
    /// See [`Vm::status`].
    fn status(&self) -> MachineStatus;
    /// See [`Vm::pause`].
    fn pause(&self) -> Result<(), MachineError>;
    /// See [`Vm::resume`].
    fn resume(&self) -> Result<(), MachineError>;
    /// See [`Vm::stop`].
    fn stop(&self);
    /// See [`Vm::prepare`].
    fn prepare(&self) -> Result<Prepared, MachineError>;
    /// See [`Vm::freeze`].
    fn freeze(&self, generation: u64) -> Result<Frozen, MachineError>;
    /// See [`Vm::thaw`].
    fn thaw(&self) -> Result<(), MachineError>;
    /// See [`Vm::balloon`].
    fn balloon(&self) -> Result<BalloonStatus, BalloonError>;
    /// See [`Vm::set_balloon`].
    fn set_balloon(&self, bytes: u64) -> Result<(), BalloonError>;
}

impl Guest for Vm {
    fn status(&self) -> MachineStatus {
        Self::status(self).into()
    }

    fn pause(&self) -> Result<(), MachineError> {
        Self::pause(self).map_err(|error| failed("pause", &error))
    }

    fn resume(&self) -> Result<(), MachineError> {
        Self::resume(self).map_err(|error| failed("resume", &error))
    }

    fn stop(&self) {
        Self::stop(self);
    }

    fn prepare(&self) -> Result<Prepared, MachineError> {
        Self::prepare(self).map_err(|error| failed("prepare", &error))
    }

    fn freeze(&self, generation: u64) -> Result<Frozen, MachineError> {
        Self::freeze(self, generation).map_err(|error| failed("freeze", &error))
    }

    fn thaw(&self) -> Result<(), MachineError> {
        Self::thaw(self).map_err(|error| failed("thaw", &error))
    }

    fn balloon(&self) -> Result<BalloonStatus, BalloonError> {
        Self::balloon(self).map(BalloonStatus::from).map_err(|error| balloon_failed(&error))
    }

    fn set_balloon(&self, bytes: u64) -> Result<(), BalloonError> {
        Self::set_balloon(self, bytes).map_err(|error| balloon_failed(&error))
    }
}

/// Serves `guest` on `listener`, from a thread of its own, for as long as the process lives. Returns the lease under which a live
/// update holds it.
pub fn serve(guest: Arc<dyn Guest>, listener: UnixListener) -> io::Result<Lease> {
    let thawed = Arc::clone(&guest);
    let lease = Lease::new(move || {
        if let Err(error) = thawed.thaw() {
            tracing::error!(%error, "cannot take back what the live update had begun");
        }
    });
    let held = lease.clone();
    accept::serve(listener, move || Machine { guest: Arc::clone(&guest), lease: held.clone() })?;
    Ok(lease)
}

/// An error with all its causes, for a peer that gets nothing but a string.
pub fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(error.source(), |cause| cause.source())
        .fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// The service, for one connection.
struct Machine {
    guest: Arc<dyn Guest>,
    lease: Lease,
}

fn failed(operation: &str, error: &dyn std::error::Error) -> MachineError {
    MachineError::OperationFailed { operation: operation.to_owned(), reason: chain(error) }
}

fn balloon_failed(error: &VmError) -> BalloonError {
    match error {
        VmError::Balloon(NoneOrSize::None) => BalloonError::NoBalloon,
        other => BalloonError::OperationFailed { reason: chain(other) },
    }
}

impl Machine {
    /// The same for the balloon, which the guest may be waited for.
    async fn call_balloon<T: Send + 'static>(
        &self,
        call: impl FnOnce(&dyn Guest) -> Result<T, BalloonError> + Send + 'static,
    ) -> Result<T, BalloonError> {
        let guest = Arc::clone(&self.guest);
        let called = tokio::task::spawn_blocking(move || call(guest.as_ref())).await;
        called.unwrap_or_else(|error| Err(BalloonError::OperationFailed { reason: chain(&error) }))
    }

    /// Calls into the VM, which blocks: for milliseconds as a rule, for seconds where RAM has to be filled in.
    async fn call<T: Send + 'static>(
        &self,
        operation: &'static str,
        call: impl FnOnce(&dyn Guest, &Lease) -> Result<T, MachineError> + Send + 'static,
    ) -> Result<T, MachineError> {
        let (guest, lease) = (Arc::clone(&self.guest), self.lease.clone());
        let called = tokio::task::spawn_blocking(move || call(guest.as_ref(), &lease)).await;
        called.unwrap_or_else(|error| Err(failed(operation, &error)))
    }
}

fn prepare(
    guest: &dyn Guest,
    lease: &Lease,
    handed: Vec<OwnedFd>,
) -> Result<(PreparedFiles, Vec<OwnedFd>), MachineError> {
    let count = u32::try_from(handed.len()).unwrap_or(u32::MAX);
    let Ok([handed]) = <[OwnedFd; 1]>::try_from(handed) else { return Err(MachineError::LeaseMissing { count }) };
    lease.reclaim();
    // Before anything is done: a guest that ends meanwhile is waited for by whoever holds the lease, and the end of that is noticed.
    let granted = lease.grant(handed).map_err(|error| failed("watch the lease", &error))?;
    // Where somebody else holds it, the VM is prepared already, and says so.
    let prepared = guest.prepare().inspect_err(|_| {
        // One whose guest has ended meanwhile waits for the live update to find that out, and to let it go.
        if granted && guest.status().state != MachineState::Ended {
            lease.release()
        }
    })?;
    if !lease.is_held() {
        // It has ended before there was anything to take back.
        guest.thaw()?;
        let reason = "the live update that has asked for it is gone".to_owned();
        return Err(MachineError::OperationFailed { operation: "prepare".to_owned(), reason });
    }
    let ram = prepared.ram.iter().map(|&(token, size, _)| RamFile { token, size }).collect();
    let mut files = vec![prepared.state];
    files.extend(prepared.ram.into_iter().map(|(_, _, file)| file));
    Ok((PreparedFiles { state_token: prepared.state_token, ram }, files))
}

/// A virtual machine whose guest outlives a change of its host's kernel.
#[zlink::service(
    interface = "org.kho-vmm.Machine1",
    vendor = "kho-vmm",
    product = "vmm",
    version = env!("CARGO_PKG_VERSION")
)]
impl Machine {
    /// What the VM is and does.
    #[zlink(interface = "org.kho-vmm.Machine1", types = [MachineState, Mark, RamFile])]
    async fn status(&self) -> Result<MachineStatus, MachineError> {
        self.call("status", |guest, _| Ok(guest.status())).await
    }

    /// Pauses the guest.
    async fn pause(&self) -> Result<(), MachineError> {
        self.call("pause", |guest, _| guest.pause()).await
    }

    /// Lets a paused guest run on.
    async fn resume(&self) -> Result<(), MachineError> {
        self.call("resume", |guest, _| guest.resume()).await
    }

    /// Ends the VM, as if its power were cut. The process ends, and may do so before the reply is read.
    async fn stop(&self) -> Result<(), MachineError> {
        self.guest.stop();
        Ok(())
    }

    /// Readies the VM for a live update while its guest runs. Comes with one file descriptor, the lease: the read end
    /// of a pipe; when its write end is closed, the VM takes prepare and freeze back. Returns the state file, then the
    /// RAM files, to be preserved under their tokens.
    #[zlink(return_fds)]
    async fn prepare(&self, #[zlink(fds)] lease: Vec<OwnedFd>) -> (Result<PreparedFiles, MachineError>, Vec<OwnedFd>) {
        match self.call("prepare", |guest, held| prepare(guest, held, lease)).await {
            Ok((prepared, files)) => (Ok(prepared), files),
            Err(error) => (Err(error), Vec::new()),
        }
    }

    /// Pauses the guest and writes its document into the state file. The generation is that of the live update.
    async fn freeze(&self, generation: u64) -> Result<FrozenDocument, MachineError> {
        let frozen = self.call("freeze", move |guest, _| guest.freeze(generation)).await?;
        Ok(FrozenDocument { document_bytes: frozen.document_bytes, marks: marks(&frozen.marks) })
    }

    /// Takes back prepare and freeze: the guest is as it was before.
    async fn thaw(&self) -> Result<(), MachineError> {
        let thaw = |guest: &dyn Guest, lease: &Lease| {
            lease.release();
            guest.thaw()
        };
        self.call("thaw", thaw).await
    }

    /// How the VM's balloon is. The guest is asked for statistics and waited for, for a second at most.
    #[zlink(interface = "org.kho-vmm.Balloon1", types = [Statistic])]
    async fn get(&self) -> Result<BalloonStatus, BalloonError> {
        self.call_balloon(|guest| guest.balloon()).await
    }

    /// Asks the guest to give so many bytes of its memory back. How far it has come, `Get` tells.
    async fn set_target(&self, bytes: u64) -> Result<(), BalloonError> {
        self.call_balloon(move |guest| guest.set_balloon(bytes)).await
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::fs::FileExt;
    use std::os::unix::net::UnixStream;
    use std::sync::Mutex;
    use std::thread;
    use std::time::{Duration, Instant};

    use kho_abi::document::timeline::Phase;

    use super::*;
    use crate::control::client::{Client, ClientError};
    use crate::control::lease;
    use crate::control::socket::{Claim, RunDir};

    const LIMIT: Duration = Duration::from_secs(10);

    /// A VM without KVM: the states, and files of one page.
    struct Fake(Mutex<MachineState>, Duration);

    impl Fake {
        fn change(&self, operation: &str, from: &[MachineState], to: MachineState) -> Result<(), MachineError> {
            let mut state = self.0.lock().unwrap();
            if !from.contains(&state) {
                let reason = format!("the VM is {}", state.name());
                return Err(MachineError::OperationFailed { operation: operation.into(), reason });
            }
            *state = to;
            Ok(())
        }
    }

    fn memfd(content: &[u8]) -> OwnedFd {
        let file = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        File::from(file.try_clone().unwrap()).write_all_at(content, 0).unwrap();
        file
    }

    fn content(file: &OwnedFd) -> Vec<u8> {
        let mut content = vec![0; 3];
        File::from(file.try_clone().unwrap()).read_exact_at(&mut content, 0).unwrap();
        content
    }

    impl Guest for Fake {
        fn status(&self) -> MachineStatus {
            let state = *self.0.lock().unwrap();
            let name = "a".to_owned();
            let (memory, cpus, generation, document_bytes) = (1 << 40, 1, 3, 0);
            let marks = vec![Mark { phase: "pause-asked".into(), counter: u64::MAX >> 1 }];
            let counter_hz = Some(1000);
            let serial_dropped = Some(5);
            MachineStatus {
                name,
                state,
                pid: 1,
                memory,
                cpus,
                generation,
                document_bytes,
                counter_hz,
                marks,
                serial_dropped,
            }
        }
        fn pause(&self) -> Result<(), MachineError> {
            self.change("pause", &[MachineState::Running], MachineState::Paused)
        }
        fn resume(&self) -> Result<(), MachineError> {
            self.change("resume", &[MachineState::Paused], MachineState::Running)
        }
        fn stop(&self) {
            *self.0.lock().unwrap() = MachineState::Ended;
        }
        fn prepare(&self) -> Result<Prepared, MachineError> {
            self.change("prepare", &[MachineState::Running], MachineState::Prepared)?;
            thread::sleep(self.1);
            self.change("prepare", &[MachineState::Prepared], MachineState::Prepared)?;
            let ram = vec![(0x100, 4096, memfd(b"low")), (0x101, 8192, memfd(b"top"))];
            Ok(Prepared { state_token: 1, state: memfd(b"doc"), ram })
        }
        fn freeze(&self, generation: u64) -> Result<Frozen, MachineError> {
            self.change("freeze", &[MachineState::Prepared], MachineState::Frozen)?;
            Ok(Frozen { document_bytes: generation, marks: vec![(Phase::PauseAsked, 7)] })
        }
        fn thaw(&self) -> Result<(), MachineError> {
            match self.status().state {
                MachineState::Ended => Ok(()),
                _ => self.change("thaw", &[MachineState::Prepared, MachineState::Frozen], MachineState::Running),
            }
        }
        fn balloon(&self) -> Result<BalloonStatus, BalloonError> {
            let statistics = vec![Statistic { name: "free_bytes".into(), value: u64::MAX >> 1 }];
            Ok(BalloonStatus { target: 1 << 30, actual: 4096, backed: 0, statistics, statistics_age_ms: Some(7) })
        }
        fn set_balloon(&self, bytes: u64) -> Result<(), BalloonError> {
            match bytes {
                0 => Ok(()),
                1 => Err(BalloonError::NoBalloon),
                _ => Err(BalloonError::OperationFailed { reason: "too much".into() }),
            }
        }
    }

    fn served() -> (tempfile::TempDir, RunDir, Claim) {
        served_with(Duration::ZERO)
    }

    fn served_with(preparation: Duration) -> (tempfile::TempDir, RunDir, Claim) {
        let (folder, dir, claim, _) = served_under_a_lease(preparation);
        (folder, dir, claim)
    }

    fn served_under_a_lease(preparation: Duration) -> (tempfile::TempDir, RunDir, Claim, Lease) {
        let folder = tempfile::tempdir().unwrap();
        let dir = RunDir::at(&folder.path().join("vmm"));
        let claim = Claim::take(&dir, "a").unwrap();
        let guest = Arc::new(Fake(Mutex::new(MachineState::Running), preparation));
        let lease = serve(guest, claim.listen().unwrap()).unwrap();
        (folder, dir, claim, lease)
    }

    #[test]
    fn verbs_reach_the_vm_and_refusals_come_back() {
        let (_folder, dir, _claim) = served();
        let mut client = Client::connect(&dir, "a", LIMIT).unwrap();
        let status = client.status().unwrap();
        assert_eq!((status.memory, status.generation, status.marks[0].counter), (1 << 40, 3, u64::MAX >> 1));
        client.pause().unwrap();
        assert_eq!(client.status().unwrap().state, MachineState::Paused);
        let refused = client.pause().unwrap_err();
        assert!(matches!(refused, ClientError::Refused { operation: "pause", .. }));
        assert!(chain(&refused).contains("the VM is paused"));
        client.resume().unwrap();
        assert!(matches!(Client::connect(&dir, "b", LIMIT), Err(ClientError::NotThere { .. })));
    }

    #[test]
    fn balloon_has_an_interface_of_its_own() {
        let (_folder, dir, _claim) = served();
        let mut client = Client::connect(&dir, "a", LIMIT).unwrap();
        let balloon = client.balloon().unwrap().unwrap();
        assert_eq!((balloon.target, balloon.statistics[0].value), (1 << 30, u64::MAX >> 1));
        client.set_balloon(0).unwrap();
        let refused = client.set_balloon(1).unwrap_err();
        assert!(chain(&refused).contains("vmm run --balloon"), "{}", chain(&refused));
        assert!(chain(&client.set_balloon(2).unwrap_err()).contains("too much"));
        // The connection is as good as before.
        assert_eq!(client.status().unwrap().state, MachineState::Running);
    }

    #[test]
    fn files_come_with_their_tokens_and_freeze_follows() {
        let (_folder, dir, _claim) = served();
        let mut client = Client::connect(&dir, "a", LIMIT).unwrap();
        let (_holder, handed_out) = lease::pair().unwrap();
        let (prepared, files) = client.prepare(handed_out).unwrap();
        assert_eq!(prepared.state_token, 1);
        assert_eq!(prepared.ram, [RamFile { token: 0x100, size: 4096 }, RamFile { token: 0x101, size: 8192 }]);
        assert_eq!(files.iter().map(content).collect::<Vec<_>>(), [b"doc", b"low", b"top"]);
        let frozen = client.freeze(9).unwrap();
        assert_eq!((frozen.document_bytes, frozen.marks.len()), (9, 1));
        client.thaw().unwrap();
        assert_eq!(client.status().unwrap().state, MachineState::Running);
    }

    #[test]
    fn vm_runs_on_when_the_update_dies_frozen() {
        let (_folder, dir, _claim) = served();
        let mut client = Client::connect(&dir, "a", LIMIT).unwrap();
        let (holder, handed_out) = lease::pair().unwrap();
        client.prepare(handed_out).unwrap();
        client.freeze(1).unwrap();
        drop(holder);
        let deadline = Instant::now() + LIMIT;
        while client.status().unwrap().state != MachineState::Running {
            assert!(Instant::now() < deadline);
            thread::sleep(Duration::from_millis(5));
        }
        // And the next update finds it ready.
        let (_holder, handed_out) = lease::pair().unwrap();
        client.prepare(handed_out).unwrap();
    }

    #[test]
    fn guest_that_ends_while_it_is_prepared_is_held_until_the_update_has_seen_it() {
        let (_folder, dir, _claim, lease) = served_under_a_lease(Duration::from_millis(300));
        let mut update = Client::connect(&dir, "a", LIMIT).unwrap();
        let (_holder, handed_out) = lease::pair().unwrap();
        let preparing = thread::spawn(move || (update.prepare(handed_out).map(|_| ()), update));
        let mut other = Client::connect(&dir, "a", LIMIT).unwrap();
        let deadline = Instant::now() + LIMIT;
        while other.status().unwrap().state != MachineState::Prepared {
            assert!(Instant::now() < deadline);
        }
        other.stop().unwrap();
        let (prepared, mut update) = preparing.join().unwrap();
        assert!(matches!(prepared, Err(ClientError::Refused { .. })));
        assert!(lease.is_held());
        assert_eq!(update.status().unwrap().state, MachineState::Ended);
        update.thaw().unwrap();
        assert!(!lease.is_held());
    }

    #[test]
    fn second_update_is_refused_while_the_first_holds_the_vm() {
        let (_folder, dir, _claim) = served();
        let mut first = Client::connect(&dir, "a", LIMIT).unwrap();
        let mut second = Client::connect(&dir, "a", LIMIT).unwrap();
        let (_holder, handed_out) = lease::pair().unwrap();
        first.prepare(handed_out).unwrap();
        let (other_holder, handed_out) = lease::pair().unwrap();
        assert!(matches!(second.prepare(handed_out), Err(ClientError::Refused { .. })));
        drop(other_holder);
        thread::sleep(Duration::from_millis(50));
        assert_eq!(first.status().unwrap().state, MachineState::Prepared);
    }

    #[test]
    fn interface_describes_itself() {
        let (_folder, dir, _claim) = served();
        // By hand: this is what `varlinkctl` sends, and no code of ours is on this side.
        let mut socket = UnixStream::connect(dir.socket("a")).unwrap();
        let parameters = r#"{"interface":"org.kho-vmm.Machine1"}"#;
        let method = "org.varlink.service.GetInterfaceDescription";
        write!(socket, r#"{{"method":"{method}","parameters":{parameters}}}{}"#, '\0').unwrap();
        let mut reply = Vec::new();
        BufReader::new(socket).read_until(0, &mut reply).unwrap();
        reply.pop();
        let reply: serde_json::Value = serde_json::from_slice(&reply).unwrap();
        let described = reply["parameters"]["description"].as_str().unwrap();
        for part in ["method Prepare() -> (", "ram: []RamFile", "error LeaseMissing", "type MachineState"] {
            assert!(described.contains(part), "{part} is not in\n{described}");
        }
    }

    #[test]
    fn status_does_not_wait_for_another_clients_prepare() {
        let (_folder, dir, _claim) = served_with(Duration::from_secs(20));
        let mut update = Client::connect(&dir, "a", Duration::from_secs(2)).unwrap();
        let (_holder, handed_out) = lease::pair().unwrap();
        assert!(matches!(update.prepare(handed_out), Err(ClientError::TimedOut { .. })));
        let mut other = Client::connect(&dir, "a", LIMIT).unwrap();
        assert_eq!(other.status().unwrap().state, MachineState::Prepared);
        // The late reply to `Prepare` is not taken for that to the next call.
        update.thaw().unwrap();
        assert_eq!(update.status().unwrap().state, MachineState::Running);
    }
}
