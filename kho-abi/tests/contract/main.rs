//! What the contracts promise: whatever is written is read back, and whatever is wrong is refused without a panic.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod damage;
mod golden;
mod hostile;
mod layout;
mod round_trip;
mod sample;
mod timeline;
mod uapi;

use proptest::test_runner::Config;

/// Cases for tests that cost microseconds each.
const CHEAP: u32 = 100_000;
/// Cases for tests that build whole trees.
const TREES: u32 = 2_000;

/// `default` cases, or as many as `PROPTEST_CASES` says.
fn cases(default: u32) -> Config {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(default);
    // A failing case is printed and becomes a test of its own; no file beside the sources remembers it.
    Config { cases, failure_persistence: None, ..Config::default() }
}
