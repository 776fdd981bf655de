//! What a timeline tells.

use kho_abi::document::timeline::{Phase, TimelineV3, UnknownPhase};

#[test]
fn phases_have_names_and_are_found_by_them() {
    for phase in Phase::ALL {
        assert_eq!(Phase::from_name(phase.name()), Some(phase));
        assert_eq!(phase.to_string().parse(), Ok(phase));
    }
    assert!(Phase::ALL.is_sorted());
    assert_eq!("Prepared".parse::<Phase>(), Err(UnknownPhase));
}

#[test]
fn a_phase_marked_again_counts_from_the_last_mark() {
    let mut timeline = TimelineV3::new(1_000_000);
    timeline.mark(Phase::FirstInstruction, 900);
    timeline.mark(Phase::PauseAsked, 500);
    timeline.mark(Phase::FirstInstruction, 2500);
    assert_eq!(timeline.marks, [(Phase::PauseAsked, 500), (Phase::FirstInstruction, 2500)]);
    assert_eq!(timeline.blackout_ms(), Some(2.0));
    assert_eq!(timeline.between_ms(Phase::FirstInstruction, Phase::PauseAsked), Some(-2.0));
}

#[test]
fn phases_tell_the_time_since_the_one_before_across_those_not_reached() {
    let mut host = TimelineV3::new(1000);
    host.mark(Phase::UpdateStarted, 100);
    host.mark(Phase::RebootCalled, 700);
    let mut vm = TimelineV3::new(1000);
    vm.mark(Phase::PauseAsked, 400);
    host.merge(&vm);
    let phases = [(Phase::UpdateStarted, 0.0), (Phase::PauseAsked, 300.0), (Phase::RebootCalled, 300.0)];
    assert_eq!(host.phases(), phases);
}

#[test]
fn nothing_is_told_without_a_frequency_or_a_mark() {
    let mut timeline = TimelineV3::default();
    timeline.mark(Phase::PauseAsked, 1);
    timeline.mark(Phase::FirstInstruction, 2);
    assert_eq!(timeline.blackout_ms(), None);
    assert_eq!(timeline.phases(), []);
    assert_eq!(TimelineV3::new(1000).blackout_ms(), None);
}
