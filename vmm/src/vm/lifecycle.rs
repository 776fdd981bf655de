//! What a VM is doing, and what may be done with it when: a state machine without a machine.
//!
//! | | start | pause | resume | prepare | freeze | thaw | end |
//! |---|---|---|---|---|---|---|---|
//! | built | running, or paused as before | | | | | built | ended |
//! | running | | paused | running | prepared | | running | ended |
//! | paused | | paused | running | prepared | | paused | ended |
//! | prepared | | | | | frozen | as before prepare | ended |
//! | frozen | | | | | | as before prepare | ended |
//! | ended | | | | | | ended | ended |
//!
//! What is empty is forbidden, and changes nothing. Who moves it: the operator pauses, resumes and ends; `vmm update` prepares,
//! freezes and thaws, and the end of its lease thaws, too; the guest ends, by whatever it does. An end counts once, the first.

use super::{Ending, State};

/// What can be done with a VM, or happens to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The guest runs for the first time in this process.
    Start,
    /// The operator wants it to stand still.
    Pause,
    /// The operator wants it to run.
    Resume,
    /// Its memory is about to be preserved.
    Prepare,
    /// It stands still for a live update, its document is written.
    Freeze,
    /// The live update is called off.
    Thaw,
}

impl Event {
    /// As it is told to somebody who has asked for it.
    pub fn wish(self) -> &'static str {
        match self {
            Self::Start => "start it",
            Self::Pause => "pause it",
            Self::Resume => "resume it",
            Self::Prepare => "prepare it for a live update",
            Self::Freeze => "freeze it",
            Self::Thaw => "thaw it",
        }
    }
}

/// What a VM is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lifecycle {
    state: State,
    /// Whether its guest runs outside of live updates, as the operator has it.
    wanted: State,
    /// How it has ended, and what it was doing then.
    ending: Option<(Ending, State)>,
}

/// What an event leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Next {
    state: State,
    wanted: State,
}

impl Lifecycle {
    /// Of a VM that was just built.
    pub fn new() -> Self {
        Self { state: State::Built, wanted: State::Running, ending: None }
    }

    /// Of one whose guest was paused before a live update.
    pub fn paused() -> Self {
        Self { wanted: State::Paused, ..Self::new() }
    }

    /// What it is doing.
    pub fn state(&self) -> State {
        self.state
    }

    /// Whether the guest runs, or would if there were no live update.
    pub fn wants_to_run(&self) -> bool {
        self.wanted == State::Running
    }

    /// How it has ended.
    pub fn ending(&self) -> Option<&Ending> {
        self.ending.as_ref().map(|(ending, _)| ending)
    }

    /// Whether it has ended by itself under a live update, which then goes on without it. One that was frozen can be ended by its
    /// operator only.
    pub fn has_ended_prepared(&self) -> bool {
        matches!(self.ending, Some((_, State::Prepared)))
    }

    /// Where an event would lead; None where it is forbidden. Nothing has changed yet: what has to be done for it may fail.
    pub fn after(&self, event: Event) -> Option<Next> {
        use State::{Built, Ended, Frozen, Paused, Prepared, Running};
        let settled = |state| Some(Next { state, wanted: state });
        let updating = |state| Some(Next { state, wanted: self.wanted });
        match (self.state, event) {
            (Built, Event::Start) => settled(self.wanted),
            (Running | Paused, Event::Resume) => settled(Running),
            (Running | Paused, Event::Pause) => settled(Paused),
            (Running | Paused, Event::Prepare) => updating(Prepared),
            (Prepared, Event::Freeze) => updating(Frozen),
            (Prepared | Frozen, Event::Thaw) => settled(self.wanted),
            (Built | Running | Paused | Ended, Event::Thaw) => updating(self.state),
            _ => None,
        }
    }

    /// What was done led there.
    pub fn enter(&mut self, next: Next) {
        (self.state, self.wanted) = (next.state, next.wanted);
    }

    /// It ends, whatever it was doing. The first ending counts: a guest that is stopped while it powers off has powered off.
    pub fn end(&mut self, ending: Ending) {
        self.ending.get_or_insert((ending, self.state));
        self.state = State::Ended;
    }
}

#[cfg(test)]
mod tests {
    use State::{Built, Ended, Frozen, Paused, Prepared, Running};

    use super::*;

    const EVENTS: [Event; 6] = [Event::Start, Event::Pause, Event::Resume, Event::Prepare, Event::Freeze, Event::Thaw];

    fn go(events: &[Event]) -> Lifecycle {
        let mut lifecycle = Lifecycle::new();
        for event in events {
            let next = lifecycle.after(*event).unwrap_or_else(|| panic!("{event:?} of {lifecycle:?}"));
            lifecycle.enter(next);
        }
        lifecycle
    }

    /// Every state, with the operator wanting the guest to run and not.
    fn all() -> Vec<Lifecycle> {
        use Event::{Freeze, Pause, Prepare, Start};
        let ways: [&[Event]; 7] = [
            &[],
            &[Start],
            &[Start, Pause],
            &[Start, Prepare],
            &[Start, Pause, Prepare],
            &[Start, Prepare, Freeze],
            &[Start, Pause, Prepare, Freeze],
        ];
        let mut all: Vec<Lifecycle> = ways.into_iter().map(go).collect();
        let mut ended = go(&[Start]);
        ended.end(Ending::PowerOff);
        all.push(ended);
        all
    }

    #[test]
    fn every_event_leads_where_the_table_says_or_nowhere() {
        // In the order of the events, for each of the states above.
        let table = [
            (Built, [Some(Running), None, None, None, None, Some(Built)]),
            (Running, [None, Some(Paused), Some(Running), Some(Prepared), None, Some(Running)]),
            (Paused, [None, Some(Paused), Some(Running), Some(Prepared), None, Some(Paused)]),
            (Prepared, [None, None, None, None, Some(Frozen), Some(Running)]),
            (Prepared, [None, None, None, None, Some(Frozen), Some(Paused)]),
            (Frozen, [None, None, None, None, None, Some(Running)]),
            (Frozen, [None, None, None, None, None, Some(Paused)]),
            (Ended, [None, None, None, None, None, Some(Ended)]),
        ];
        for (lifecycle, (state, leads)) in all().iter().zip(table) {
            assert_eq!(lifecycle.state(), state);
            for (event, expected) in EVENTS.iter().zip(leads) {
                let found = lifecycle.after(*event).map(|next| next.state);
                assert_eq!(found, expected, "{event:?} of {lifecycle:?}");
            }
        }
    }

    #[test]
    fn any_state_ends_once_and_nothing_comes_after() {
        for mut lifecycle in all() {
            let first = lifecycle.ending().cloned().unwrap_or(Ending::Reset);
            lifecycle.end(Ending::Reset);
            lifecycle.end(Ending::Stopped);
            assert_eq!((lifecycle.state(), lifecycle.ending()), (Ended, Some(&first)));
            for event in EVENTS.into_iter().filter(|event| *event != Event::Thaw) {
                assert_eq!(lifecycle.after(event), None, "{event:?}");
            }
        }
    }

    #[test]
    fn a_guest_that_was_paused_before_a_live_update_is_paused_after_it() {
        let mut lifecycle = Lifecycle::paused();
        lifecycle.enter(lifecycle.after(Event::Start).unwrap());
        assert_eq!((lifecycle.state(), lifecycle.wants_to_run()), (Paused, false));
        lifecycle.enter(lifecycle.after(Event::Resume).unwrap());
        assert_eq!((lifecycle.state(), lifecycle.wants_to_run()), (Running, true));
    }

    #[test]
    fn an_end_under_a_live_update_is_known_for_one() {
        let lifecycles = all();
        let known = lifecycles.into_iter().map(|mut lifecycle| {
            let state = lifecycle.state();
            lifecycle.end(Ending::Reset);
            (state, lifecycle.has_ended_prepared())
        });
        assert!(known.into_iter().all(|(state, known)| known == (state == Prepared)));
    }

    #[test]
    fn a_live_update_that_is_called_off_leaves_the_operators_wish() {
        for paused in [false, true] {
            let before = if paused { go(&[Event::Start, Event::Pause]) } else { go(&[Event::Start]) };
            for events in [&[Event::Prepare, Event::Thaw][..], &[Event::Prepare, Event::Freeze, Event::Thaw]] {
                let mut lifecycle = before.clone();
                for event in events {
                    let next = lifecycle.after(*event).unwrap();
                    lifecycle.enter(next);
                }
                assert_eq!(lifecycle, before);
            }
        }
    }
}
