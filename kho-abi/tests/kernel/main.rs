//! What the kernel hands over: whatever is written is read back, whatever is wrong is refused without a panic, and the structs are
//! the kernel's own.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod golden;
mod headers;
mod hostile;
mod round_trip;
mod sample;

use proptest::test_runner::Config;

/// `default` cases, or as many as `PROPTEST_CASES` says.
fn cases(default: u32) -> Config {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(default);
    Config { cases, failure_persistence: None, ..Config::default() }
}
