//! Keeping VMs that could not be restored, until somebody has mended what was in the way, or gives them up.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use super::work::{Fate, Outcome};
use crate::control::interface::RamFile;
use crate::control::keeper::{Keeper, KeeperError, KeptFiles, RestoredMachine, serve};
use crate::control::server::chain;
use crate::control::socket::RunDir;

/// A VM that is kept, or was. While somebody does something with it, it is away.
struct Place {
    name: String,
    outcome: Option<Outcome>,
}

/// How long somebody who has asked may take to hear the answer, when nobody is needed here any more.
const GOODBYE: Duration = Duration::from_secs(5);

/// All VMs of a live update, of which some are kept.
#[derive(Default)]
struct Places {
    places: Mutex<Vec<Place>>,
    changed: Condvar,
    /// How many are connected.
    connections: Mutex<usize>,
    disconnected: Condvar,
}

/// Keeps what is to be kept, and serves those who ask for it. Returns when none is kept any more.
pub fn keep(dir: &RunDir, outcomes: Vec<Outcome>) -> Vec<Outcome> {
    let place = |outcome: Outcome| Place { name: outcome.work.vm.name.clone(), outcome: Some(outcome) };
    let keeper =
        Arc::new(Places { places: Mutex::new(outcomes.into_iter().map(place).collect()), ..Places::default() });
    let served = dir.listen_as_supervisor().map_err(|error| chain(&error)).and_then(|listener| {
        let keeper: Arc<dyn Keeper> = keeper.clone();
        serve(keeper, listener).map_err(|error| error.to_string())
    });
    if let Err(error) = served {
        tracing::error!(error, "VMs are kept, and nobody can ask for them");
        loop {
            thread::park();
        }
    }
    let is_kept = |place: &Place| place.outcome.as_ref().is_none_or(|outcome| outcome.fate.is_kept());
    let mut places = keeper.lock();
    while places.iter().any(is_kept) {
        places = keeper.changed.wait(places).unwrap_or_else(PoisonError::into_inner);
    }
    let outcomes = places.drain(..).filter_map(|place| place.outcome).collect();
    drop(places);
    keeper.await_goodbye();
    outcomes
}

impl Places {
    /// Whoever has got a VM away from here has not heard of it yet.
    fn await_goodbye(&self) {
        let connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.disconnected.wait_timeout_while(connections, GOODBYE, |connections| *connections > 0);
        if waited.is_ok_and(|(_, waited)| waited.timed_out()) {
            tracing::warn!("somebody who is connected is left without an answer");
        }
    }

    fn count(&self, change: impl FnOnce(usize) -> usize) {
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        *connections = change(*connections);
        self.disconnected.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a kept VM, does something with it, and puts back what it has become.
    fn change<T>(
        &self,
        name: &str,
        change: impl FnOnce(Outcome) -> (Outcome, Result<T, KeeperError>),
    ) -> Result<T, KeeperError> {
        let outcome = {
            let mut places = self.lock();
            let place = find(&mut places, name)?;
            place.outcome.take().ok_or_else(|| KeeperError::Busy { name: name.to_owned() })?
        };
        let (outcome, result) = change(outcome);
        if let Ok(place) = find(&mut self.lock(), name) {
            place.outcome = Some(outcome);
        }
        self.changed.notify_all();
        result
    }
}

/// The place of a VM that is kept, or of which that is not known at the moment.
fn find<'a>(places: &'a mut [Place], name: &str) -> Result<&'a mut Place, KeeperError> {
    let kept = |place: &&mut Place| place.outcome.as_ref().is_none_or(|outcome| outcome.fate.is_kept());
    let found = places.iter_mut().find(|place| place.name == name).filter(kept);
    found.ok_or_else(|| KeeperError::NotKept { name: name.to_owned() })
}

impl Keeper for Places {
    fn connected(&self) {
        self.count(|connections| connections + 1);
    }

    fn disconnected(&self) {
        self.count(|connections| connections.saturating_sub(1));
    }

    fn restore(&self, name: &str) -> Result<RestoredMachine, KeeperError> {
        self.change(name, |outcome| {
            let outcome = outcome.try_again();
            let result = match &outcome.fate {
                Fate::Kept(kept) => Err(KeeperError::NotRestored { reason: kept.reason.clone() }),
                _ => Ok(RestoredMachine {
                    attempts: outcome.work.attempts(),
                    blackout_ms: outcome.work.timeline.blackout_ms(),
                }),
            };
            (outcome, result)
        })
    }

    fn files(&self, name: &str) -> Result<(KeptFiles, Vec<OwnedFd>), KeeperError> {
        self.change(name, |mut outcome| {
            let files = outcome.retrieve_kept().and_then(|files| {
                let descriptors: Result<Vec<OwnedFd>, _> =
                    std::iter::once(&files.state).chain(&files.ram).map(OwnedFd::try_clone).collect();
                descriptors.map_err(|error| error.to_string())
            });
            let vm = &outcome.work.vm;
            let ram = vm.ram.iter().map(|&(token, size)| RamFile { token, size }).collect();
            let kept = KeptFiles { document_bytes: vm.document_bytes, ram };
            let result = files.map(|files| (kept, files)).map_err(|reason| KeeperError::NoFiles { reason });
            (outcome, result)
        })
    }

    fn discard(&self, name: &str) -> Result<(), KeeperError> {
        self.change(name, |outcome| {
            tracing::warn!(vm = name, "it is given up, and its memory is lost");
            let (outcome, noted) = outcome.discard();
            (outcome, noted.map_err(|error| KeeperError::NotGivenUp { reason: error.to_string() }))
        })
    }
}
