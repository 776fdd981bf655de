//! The guardian: a process that holds what was handed over, and does nothing that could go wrong.
//!
//! Sessions live as long as somebody has them open, and guests' memory lives in them. So the process that has retrieved them forks,
//! as long as it has one thread; the child does the work, with the same files open. Should it die, of whatever, the next one is forked
//! and goes on where the ledger says that it was.

use std::io;

use crate::handover::ledger::Ledger;

/// How often a worker is forked.
pub const ATTEMPTS: u32 = 3;

/// What a process is after the fork.
pub enum Role {
    /// The one that works, with the number of the attempt, from 1.
    Worker(u32),
    /// The one that guards: the worker has ended by itself, with this status.
    Guardian(u8),
    /// The one that works, and there is none that guards.
    Alone,
    /// The one that guards, whose workers were all killed.
    Bereft,
}

/// Forks a worker. In the guardian this returns when the work is done, or cannot be. To be called as long as there is but one thread.
pub fn post(ledger: &Ledger) -> Role {
    for attempt in 1..=ATTEMPTS {
        // SAFETY: nothing that another thread could hold is missing in the child, as there is no other thread.
        let pid = match unsafe { libc::fork() } {
            0 => return Role::Worker(attempt),
            pid if pid > 0 => pid,
            _ if attempt == 1 => {
                let error = io::Error::last_os_error();
                tracing::warn!(%error, "there is no process to be had that would guard what was handed over");
                return Role::Alone;
            }
            _ => break,
        };
        let ended = match wait(pid) {
            Ok(ended) => ended,
            Err(error) => {
                tracing::error!(%error, "cannot wait for the process that restores");
                break;
            }
        };
        // It leaves its last word when nothing is held that anybody needs, and not before.
        if let Ok(Some(_)) = ledger.last_word() {
            return Role::Guardian(u8::try_from(libc::WEXITSTATUS(ended)).unwrap_or(u8::MAX));
        }
        let signal = libc::WIFSIGNALED(ended).then(|| libc::WTERMSIG(ended));
        tracing::error!(attempt, signal, "the process that restores has ended early; all it had is held here");
    }
    Role::Bereft
}

/// Waits for a child; its status as waitpid(2) tells it.
fn wait(pid: libc::pid_t) -> io::Result<i32> {
    let mut status = 0;
    loop {
        // SAFETY: the status is ours, and the process is a child of this one that nobody else waits for.
        let found = unsafe { libc::waitpid(pid, &raw mut status, 0) };
        let error = io::Error::last_os_error();
        match () {
            () if found == pid => return Ok(status),
            () if error.kind() == io::ErrorKind::Interrupted => {}
            () => return Err(error),
        }
    }
}
