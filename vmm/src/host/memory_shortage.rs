//! Who goes when this host is short of memory. A guest never should for the sake of a command.

use std::fs;

const SCORE: &str = "/proc/self/oom_score_adj";
/// Before all others (Linux's Documentation/filesystems/proc.rst, 3.1).
const FIRST: &str = "1000";

/// While it lives, the kernel ends this process before any other. Nothing that has guests' memory in its care may be started from
/// it meanwhile, as that would inherit it.
pub struct FirstToGo {
    before: Option<String>,
}

impl FirstToGo {
    /// From now on.
    pub fn new() -> Self {
        let before = fs::read_to_string(SCORE).ok();
        set(FIRST);
        Self { before }
    }
}

impl Drop for FirstToGo {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            set(before);
        }
    }
}

fn set(score: &str) {
    if let Err(error) = fs::write(SCORE, score) {
        tracing::info!(%error, "{SCORE} cannot be written");
    }
}
