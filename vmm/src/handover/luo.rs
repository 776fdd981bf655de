//! `/dev/liveupdate`: sessions, and the files in them (Linux `include/uapi/linux/liveupdate.h`).
//!
//! Closing means something here. An *outgoing* session (created in this kernel) that is closed gives up all files put
//! into it: it must be held until the reboot. An *incoming* session (retrieved from the last kernel) that is closed
//! frees every file not yet retrieved from it: it must be held until its VM runs.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use kho_abi::uapi;

/// The device.
pub const DEVICE: &str = "/dev/liveupdate";

/// What can go wrong with the live update orchestrator.
#[derive(Debug, thiserror::Error)]
pub enum LuoError {
    /// The kernel has none.
    #[error("this kernel has no {DEVICE}")]
    Absent,
    /// The device admits one process at a time.
    #[error("{DEVICE} is held by {holder}, still so after {} s", patience.as_secs())]
    Busy {
        /// Who has it open.
        holder: String,
        /// How long we waited.
        patience: Duration,
    },
    /// The device does not open.
    #[error("cannot open {DEVICE}")]
    Open {
        /// Why.
        source: io::Error,
    },
    /// Nothing was handed over under this name.
    #[error("the last kernel handed over no session called {session}")]
    NotHandedOver {
        /// The session.
        session: String,
    },
    /// Another process has retrieved it and holds it.
    #[error("another process already holds the session {session} from the last kernel")]
    HeldElsewhere {
        /// The session.
        session: String,
    },
    /// The name is in use.
    #[error("a session called {session} exists already")]
    NameTaken {
        /// The session.
        session: String,
    },
    /// The name does not fit.
    #[error("'{session}' cannot be the name of a session")]
    Name {
        /// The session.
        session: String,
    },
    /// Anything else about a session.
    #[error("cannot {operation} the session {session}")]
    Session {
        /// What was tried.
        operation: &'static str,
        /// On which.
        session: String,
        /// Why it failed.
        source: io::Error,
    },
    /// Anything about a file in a session.
    #[error("cannot {operation} file {token:#x} of the session {session}")]
    File {
        /// What was tried.
        operation: &'static str,
        /// In which session.
        session: String,
        /// The file's number.
        token: u64,
        /// Why it failed.
        source: io::Error,
    },
}

impl LuoError {
    /// What the operator can do about it.
    pub fn help(&self) -> Option<String> {
        let code = |source: &io::Error| source.raw_os_error().unwrap_or_default();
        let help = match self {
            Self::Absent => {
                "boot a kernel built with CONFIG_LIVEUPDATE, with `kho=on liveupdate=on` on its command line \
                 (7.2 or newer)"
            }
            Self::Busy { .. } => "let that process finish, or end it, and try again",
            Self::Open { source } if code(source) == libc::EIO => {
                "the kernel cannot read what the last one handed over (see `dmesg | grep -i luo`): it is kept in \
                 memory until the next reboot, and only a kernel with the same handover format can read it"
            }
            Self::Open { source } if matches!(code(source), libc::EACCES | libc::EPERM) => "run vmm as root",
            Self::NameTaken { .. } => "another live update is in preparation: wait for it to end",
            Self::HeldElsewhere { .. } => "`vmm restore --all` is at work, or keeps a VM: see `vmm list`",
            Self::File { operation: "preserve", source, .. } => match code(source) {
                libc::EBUSY => {
                    "the file is preserved in another session: an earlier live update is not finished, see `vmm list`"
                }
                libc::ENOENT => "the kernel preserves no such file: RAM has to be a memfd without huge pages (hugetlb)",
                libc::ENOMEM => {
                    "not enough free memory to back all of the guest, or a page of it was in use all the time: free some, \
                     or use fewer guests, and try again"
                }
                libc::EINVAL => "the memfd has seals that do not survive a live update",
                _ => return None,
            },
            Self::File { operation: "retrieve", source, .. } => match code(source) {
                libc::ENOMEM => {
                    "the retrieving process may not have that much memory: lift memory.max of its cgroup and \
                     reboot; this file's memory is lost"
                }
                libc::ENOENT => "the last kernel did not hand that file over",
                _ => return None,
            },
            _ => return None,
        };
        Some(help.to_owned())
    }
}

/// Calls a live update request.
fn request<T>(file: BorrowedFd<'_>, number: u32, argument: &mut T) -> io::Result<()> {
    // SAFETY: every request of this interface reads and writes no more than the struct whose size is in its first field.
    // The callers below pass the struct that belongs to the number, whose Default has filled that size in; it lives
    // and is borrowed exclusively for the call.
    let result =
        unsafe { libc::ioctl(file.as_raw_fd(), libc::c_ulong::from(number) as _, std::ptr::from_mut(argument)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Takes over a descriptor that a request returned.
fn adopt(descriptor: i32) -> io::Result<OwnedFd> {
    if descriptor < 0 {
        return Err(io::Error::other("the kernel returned no file"));
    }
    // SAFETY: the kernel has just installed this descriptor for us, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// The open device. It admits one opener on the host, so it is kept open no longer than it takes to get the sessions,
/// which outlive it.
#[derive(Debug)]
pub struct Device(File);

impl Device {
    /// Opens the device, waiting up to `patience` while another process has it.
    pub fn open(patience: Duration) -> Result<Self, LuoError> {
        let deadline = Instant::now() + patience;
        loop {
            let source = match OpenOptions::new().read(true).write(true).open(DEVICE) {
                Ok(file) => return Ok(Self(file)),
                Err(source) => source,
            };
            match source.raw_os_error() {
                Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => return Err(LuoError::Absent),
                Some(libc::EBUSY) if Instant::now() < deadline => thread::sleep(Duration::from_millis(10)),
                Some(libc::EBUSY) => return Err(LuoError::Busy { holder: holder_in_words(), patience }),
                _ => return Err(LuoError::Open { source }),
            }
        }
    }

    /// Creates a session to be handed to the next kernel.
    pub fn create_session(&self, name: &str) -> Result<OutgoingSession, LuoError> {
        let field = uapi::session_name(name).ok_or_else(|| LuoError::Name { session: name.to_owned() })?;
        let mut argument = uapi::CreateSession { name: field, ..Default::default() };
        let session = request(self.0.as_fd(), uapi::CREATE_SESSION, &mut argument).and_then(|()| adopt(argument.fd));
        let session = session.map_err(|source| match source.raw_os_error() {
            Some(libc::EEXIST) => LuoError::NameTaken { session: name.to_owned() },
            _ => LuoError::Session { operation: "create", session: name.to_owned(), source },
        })?;
        Ok(OutgoingSession { file: session, name: name.to_owned() })
    }

    /// Retrieves a session that the last kernel handed over. There is no way to look without taking.
    pub fn retrieve_session(&self, name: &str) -> Result<IncomingSession, LuoError> {
        let field = uapi::session_name(name).ok_or_else(|| LuoError::Name { session: name.to_owned() })?;
        let mut argument = uapi::RetrieveSession { name: field, ..Default::default() };
        let session = request(self.0.as_fd(), uapi::RETRIEVE_SESSION, &mut argument).and_then(|()| adopt(argument.fd));
        let session = session.map_err(|source| match source.raw_os_error() {
            Some(libc::ENOENT) => LuoError::NotHandedOver { session: name.to_owned() },
            Some(libc::EINVAL) => LuoError::HeldElsewhere { session: name.to_owned() },
            _ => LuoError::Session { operation: "retrieve", session: name.to_owned(), source },
        })?;
        Ok(IncomingSession { file: session, name: name.to_owned() })
    }
}

/// Who has the device open, as far as /proc tells: the process and its name.
pub fn holder() -> Option<(u32, String)> {
    fs::read_dir("/proc").ok()?.flatten().find_map(|process| {
        let pid = process.file_name().to_str()?.parse().ok()?;
        let mut files = fs::read_dir(process.path().join("fd")).ok()?.flatten();
        files.find(|file| fs::read_link(file.path()).is_ok_and(|path| path.as_os_str() == DEVICE))?;
        let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
        Some((pid, name.trim().to_owned()))
    })
}

/// The same in words.
fn holder_in_words() -> String {
    let words = |(pid, name)| format!("process {pid} ({name})");
    holder().map_or_else(|| "a process that /proc does not show".to_owned(), words)
}

/// A session to be handed to the next kernel. Dropping it gives up all that was put into it.
#[derive(Debug)]
pub struct OutgoingSession {
    file: OwnedFd,
    name: String,
}

impl OutgoingSession {
    /// The name to retrieve it by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Puts a file into it. A memfd stays readable and writable, but not resizable; all its holes are filled.
    ///
    /// What it has in the memory that the next kernel is to begin with (KHO's scratch) the kernel moves elsewhere first, and does not
    /// try for long: where a page is in use right then, as those of running guests are, it says that there is no memory (ENOMEM).
    /// So it is asked again, for about a second.
    pub fn preserve(&self, token: u64, file: BorrowedFd<'_>) -> Result<(), LuoError> {
        self.preserve_with(token, file, || thread::sleep(Duration::from_millis(50)))
    }

    fn preserve_with(&self, token: u64, file: BorrowedFd<'_>, mut wait: impl FnMut()) -> Result<(), LuoError> {
        const TRIES: u32 = 20;
        let preserve = || {
            let mut argument = uapi::PreserveFd { fd: file.as_raw_fd(), token, ..Default::default() };
            request(self.file.as_fd(), uapi::PRESERVE_FD, &mut argument)
        };
        let mut done = preserve();
        for _ in 1..TRIES {
            if !done.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::ENOMEM)) {
                break;
            }
            tracing::debug!(session = self.name, token, "there is no memory, or a page is in use: once more");
            wait();
            done = preserve();
        }
        done.map_err(|source| LuoError::File { operation: "preserve", session: self.name.clone(), token, source })
    }
}

/// A session from the last kernel. Dropping it frees every file that has not been retrieved.
#[derive(Debug)]
pub struct IncomingSession {
    file: OwnedFd,
    name: String,
}

impl IncomingSession {
    /// A session that another process of ours has retrieved and passed on.
    pub fn adopt(file: OwnedFd, name: &str) -> Self {
        Self { file, name: name.to_owned() }
    }

    /// Takes a file out of it; the same file each time, until the session is finished. A failure is final: the kernel
    /// frees what it could not restore.
    pub fn retrieve(&self, token: u64) -> Result<OwnedFd, LuoError> {
        let mut argument = uapi::RetrieveFd { token, ..Default::default() };
        request(self.file.as_fd(), uapi::RETRIEVE_FD, &mut argument)
            .and_then(|()| adopt(argument.fd))
            .map_err(|source| LuoError::File { operation: "retrieve", session: self.name.clone(), token, source })
    }

    /// Ends the handover of its files: from now on they live as long as somebody has them open.
    pub fn finish(self) -> Result<(), LuoError> {
        request(self.file.as_fd(), uapi::FINISH, &mut uapi::Finish::default()).map_err(|source| LuoError::Session {
            operation: "finish",
            session: self.name.clone(),
            source,
        })
    }
}

impl From<IncomingSession> for OwnedFd {
    fn from(session: IncomingSession) -> Self {
        session.file
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use rustix::pipe::SpliceFlags;

    use super::*;

    /// As many as a pipe may hold.
    const PAGES: usize = 256;

    /// A new file of so many bytes, with memory behind all of it.
    fn filled(size: usize) -> File {
        const STEP: usize = 1 << 20;
        let mut file: File = rustix::fs::memfd_create("memory", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into();
        for _ in 0..size / STEP {
            file.write_all(&[0; STEP]).unwrap();
        }
        file
    }

    /// Bytes of a line of `/proc/meminfo`.
    fn meminfo(name: &str) -> usize {
        let text = fs::read_to_string("/proc/meminfo").unwrap();
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() << 10
    }

    #[test]
    #[ignore = "needs root and a kernel with LUO; run in the lab's host"]
    fn memory_of_which_a_page_is_in_use_is_preserved_when_it_is_no_more() {
        // What the next kernel begins with is lent to whoever needs movable memory (CMA), from when it is most of what is free.
        let scratch = meminfo("CmaFree:");
        let filler = filled(meminfo("MemFree:") - scratch - scratch / 2);
        let size = (scratch / 4).next_multiple_of(PAGES * 4096);
        let memory = filled(size);
        assert!(meminfo("CmaFree:") < scratch, "nothing is where the next kernel begins");
        drop(filler);

        // Pages all over it are in a pipe, that is, in use.
        let (mut reader, writer) = io::pipe().unwrap();
        rustix::pipe::fcntl_setpipe_size(&writer, PAGES * 4096).unwrap();
        for number in 0..PAGES {
            let mut at = (number * (size / PAGES)) as u64;
            let spliced = rustix::pipe::splice(&memory, Some(&mut at), &writer, None, 1, SpliceFlags::empty());
            assert_eq!(spliced.unwrap(), 1);
        }

        let session = Device::open(Duration::ZERO).unwrap().create_session("kho-vmm.test").unwrap();
        let mut waited = 0;
        let preserved = session.preserve_with(1, memory.as_fd(), || {
            waited += 1;
            if waited == 1 {
                reader.read_exact(&mut [0; PAGES]).unwrap();
            }
        });
        preserved.unwrap();
        assert_eq!(waited, 1);
    }
}
