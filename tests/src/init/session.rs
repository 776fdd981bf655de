//! A session of the live update orchestrator under a name of somebody else's choice, as another program may have one.
use anyhow::{Context, Result};
use kho_abi::uapi::{CREATE_SESSION, CreateSession, session_name};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::thread;

/// What is said when the session is there.
pub const HELD: &str = "held";

/// Creates the session and holds it until this process ends.
pub fn main(name: &str) -> Result<()> {
    let device = "/dev/liveupdate";
    let file = File::options().read(true).write(true).open(device).with_context(|| format!("cannot open {device}"))?;
    let name = session_name(name).context("that is no name of a session")?;
    let mut argument = CreateSession { name, ..CreateSession::default() };
    // SAFETY: the request reads and writes no more than the struct that belongs to it, which lives for the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), CREATE_SESSION as _, &raw mut argument) };
    if result < 0 {
        return Err(std::io::Error::last_os_error()).context("cannot create the session");
    }
    // The device admits one at a time, and the session outlives it. Nobody closes the session's descriptor.
    drop(file);
    println!("{HELD}");
    loop {
        thread::park();
    }
}
