//! What tidies up when `vmm update` is killed. The kernel closes its files then, so that sessions end, and VMs hear of it by their lease;
//! but the next kernel would stay loaded, and a VM that was to be left behind stay paused. So a child that does nothing else waits for the
//! end of the process that works, and takes back what it was told of.

use std::io::{self, BufRead, BufReader, PipeReader, PipeWriter, Write};
use std::time::Duration;

use crate::control::client::Client;
use crate::control::server::chain;
use crate::control::socket::RunDir;
use crate::host::kexec;

/// How long to wait for a VM.
const PATIENCE: Duration = Duration::from_secs(5);
/// What is said of it, a line each.
const LOADS: &str = "loads";
const PAUSES: &str = "pauses ";
const DONE: &str = "done";

/// The other end: what this process does that would outlive it.
pub struct Janitor(Option<(PipeWriter, libc::pid_t)>);

impl Janitor {
    /// Starts it. To be called as long as there is but one thread. An update without one is no worse, unless it is killed.
    pub fn post(dir: &RunDir) -> Self {
        let posted = io::pipe().and_then(|(ear, words)| {
            // SAFETY: nothing that another thread could hold is missing in the child, as there is no other thread.
            match unsafe { libc::fork() } {
                0 => {
                    drop(words);
                    tidy_up(dir, ear);
                    // SAFETY: it ends here, and nothing of the parent's that is to be done at an end is done twice.
                    unsafe { libc::_exit(0) }
                }
                child if child > 0 => Ok((words, child)),
                _ => Err(io::Error::last_os_error()),
            }
        });
        let posted =
            posted.inspect_err(|error| tracing::warn!(%error, "nobody would tidy up, should this process be killed"));
        Self(posted.ok())
    }

    /// The next kernel is about to be loaded.
    pub fn loads(&self) {
        self.tell(LOADS);
    }

    /// A VM is about to be paused.
    pub fn pauses(&self, name: &str) {
        self.tell(&format!("{PAUSES}{name}"));
    }

    /// Nothing is left to be taken back.
    pub fn done(&self) {
        self.tell(DONE);
    }

    fn tell(&self, word: &str) {
        let Some((words, _)) = &self.0 else { return };
        let mut words = words;
        if let Err(error) = words.write_all(format!("{word}\n").as_bytes()) {
            tracing::warn!(%error, "nobody would tidy up any more, should this process be killed");
        }
    }
}

impl Drop for Janitor {
    fn drop(&mut self) {
        if let Some((words, child)) = self.0.take() {
            drop(words);
            // SAFETY: the child is this process's own, nobody else waits for it, and its status is not asked for. It ends by itself now.
            unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
        }
    }
}

/// Listens until nobody can say anything more.
fn tidy_up(dir: &RunDir, ear: PipeReader) {
    let (mut loaded, mut paused) = (false, Vec::new());
    for word in BufReader::new(ear).lines().map_while(Result::ok) {
        match word.strip_prefix(PAUSES) {
            Some(name) => paused.push(name.to_owned()),
            None if word == LOADS => loaded = true,
            None => (loaded, paused) = (false, Vec::new()),
        }
    }
    for name in paused {
        let resumed = Client::connect(dir, &name, PATIENCE).and_then(|mut client| client.resume());
        if let Err(error) = resumed {
            tracing::error!(error = %chain(&error), vm = name, "it stays paused: `vmm resume` lets it run");
        }
    }
    // Whoever has the lock by now is the next update, and loads its own kernel in place of this one.
    if loaded && let Ok(_lock) = dir.exclusive("update") {
        tracing::warn!("the live update was killed: the next kernel is unloaded");
        kexec::unload();
    }
}
