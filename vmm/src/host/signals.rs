//! Signals as values: those that ask a process to end are awaited by a thread instead of ending it.

use std::io;
use std::mem::MaybeUninit;

/// Those that ask a process to end.
const ENDING: [libc::c_int; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// A signal's name.
pub fn name(signal: i32) -> &'static str {
    match signal {
        libc::SIGTERM => "SIGTERM",
        libc::SIGINT => "SIGINT",
        libc::SIGHUP => "SIGHUP",
        _ => "a signal",
    }
}

/// Signals that no longer do anything by themselves.
pub struct Signals(libc::sigset_t);

impl Signals {
    /// Holds back the signals that ask a process to end, in this thread and all that it starts from now on: so this
    /// comes before the first thread.
    pub fn hold() -> io::Result<Self> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: the call fills the set it is given, which is ours.
        unsafe { libc::sigemptyset(set.as_mut_ptr()) };
        for signal in ENDING {
            // SAFETY: the set was initialized above, and the signal numbers are valid.
            unsafe { libc::sigaddset(set.as_mut_ptr(), signal) };
        }
        // SAFETY: sigemptyset has initialized it.
        let set = unsafe { set.assume_init() };
        // SAFETY: the set is valid, and the old mask is not asked for.
        let error = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        if error == 0 { Ok(Self(set)) } else { Err(io::Error::from_raw_os_error(error)) }
    }

    /// Waits for the next one, in a thread of its own, and hands it over; for as long as `on_signal` wants more.
    pub fn watch(self, mut on_signal: impl FnMut(i32) -> bool + Send + 'static) -> io::Result<()> {
        std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
            loop {
                let mut signal = 0;
                // SAFETY: both pointers are valid for the call, and the set was initialized by sigemptyset.
                let error = unsafe { libc::sigwait(&raw const self.0, &raw mut signal) };
                if error != 0 || !on_signal(signal) {
                    break;
                }
            }
        })?;
        Ok(())
    }
}

/// Lets the signals through again in a process about to be started; to be called between fork and exec, where a mask
/// set by [`Signals::hold`] would otherwise be inherited.
pub fn release_in_child() -> io::Result<()> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the call fills the set it is given, which is ours.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: the set was initialized above, and the old mask is not asked for. Both calls are async-signal-safe.
    let error = unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, set.as_ptr(), std::ptr::null_mut()) };
    if error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(error)) }
}
