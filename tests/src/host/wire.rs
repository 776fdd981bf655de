//! The build machine's end of the virtio-serial port, and a watch on the shared folder: both wake the same wait.
use crate::link::{Request, Say};
use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A folder for the socket: short and private, as the target folder's path may exceed what a socket's address holds.
pub struct SocketFolder {
    path: PathBuf,
}

impl SocketFolder {
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFolder {
    fn drop(&mut self) {
        // A leftover in the temporary folder harms nobody.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// The connection.
pub struct Wire {
    stream: UnixStream,
    received: Vec<u8>,
    log: File,
    changes: OwnedFd,
    _folder: SocketFolder,
}

impl Wire {
    /// Makes the socket that QEMU connects to.
    pub fn listen() -> Result<(UnixListener, SocketFolder)> {
        let path = std::env::temp_dir().join(format!("kho-vmm-lab-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).with_context(|| format!("cannot create {}", path.display()))?;
        let folder = SocketFolder { path };
        let listener = UnixListener::bind(folder.path.join("link")).context("cannot listen for QEMU")?;
        listener.set_nonblocking(true).context("cannot configure the socket")?;
        Ok((listener, folder))
    }

    /// Waits for QEMU to connect. All that is said goes to `log` too.
    pub fn accept(listener: UnixListener, folder: SocketFolder, share: &Path, log: &Path) -> Result<Self> {
        let mut ready = [PollFd::new(&listener, PollFlags::IN)];
        let patience = Timespec { tv_sec: 30, tv_nsec: 0 };
        if poll(&mut ready, Some(&patience)).context("cannot wait for QEMU")? == 0 {
            bail!("QEMU did not connect to the lab's socket: see qemu.log");
        }
        let (stream, _) = listener.accept().context("cannot accept QEMU's connection")?;
        stream.set_nonblocking(true).context("cannot configure the socket")?;
        let log = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
        let changes = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)
            .context("cannot watch files")?;
        let events = inotify::WatchFlags::MODIFY | inotify::WatchFlags::CREATE | inotify::WatchFlags::CLOSE_WRITE;
        inotify::add_watch(&changes, share, events).with_context(|| format!("cannot watch {}", share.display()))?;
        Ok(Self { stream, received: Vec::new(), log, changes, _folder: folder })
    }

    /// Says something to the host.
    pub fn send(&mut self, request: &Request) -> Result<()> {
        let mut line = serde_json::to_string(request).context("cannot encode a request")?;
        line.push('\n');
        self.log.write_all(format!("> {line}").as_bytes()).context("cannot write link.log")?;
        self.stream.set_nonblocking(false).context("cannot configure the socket")?;
        self.stream.write_all(line.as_bytes()).context("the host does not listen: QEMU has ended")?;
        self.stream.set_nonblocking(true).context("cannot configure the socket")
    }

    /// All that the host has said since the last call, and whether it can say more.
    pub fn receive(&mut self) -> Result<(Vec<Say>, bool)> {
        let mut open = true;
        let mut chunk = [0; 65536];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => {
                    open = false;
                    break;
                }
                Ok(size) => self.received.extend_from_slice(&chunk[..size]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                    open = false;
                    break;
                }
                Err(error) => return Err(error).context("cannot read the link"),
            }
        }
        let Some(end) = self.received.iter().rposition(|&byte| byte == b'\n') else { return Ok((Vec::new(), open)) };
        let lines: Vec<u8> = self.received.drain(..=end).collect();
        let mut said = Vec::new();
        for line in String::from_utf8_lossy(&lines).lines().filter(|line| !line.is_empty()) {
            self.log.write_all(format!("< {line}\n").as_bytes()).context("cannot write link.log")?;
            // Half a line can only be what a kernel was saying when it was replaced.
            if let Ok(say) = serde_json::from_str(line) {
                said.push(say);
            }
        }
        Ok((said, open))
    }

    /// Has the emulated host take an interrupt, by an empty line that nobody answers. Hosts on x86_64 were seen to stand still for ever,
    /// with the emulator busy: as if the processor had lost its timer's interrupt and waited for any other. That this is so, and
    /// that an interrupt helps, is not proven.
    pub fn nudge(&mut self) {
        // When the host listens to nothing, or has ended, others say so.
        let _ = self.stream.write(b"\n");
    }

    /// Waits until the host says something or a shared file changes, at most for the given time. False when nothing did.
    pub fn wait(&mut self, patience: Duration) -> Result<bool> {
        let timeout = Timespec {
            tv_sec: patience.as_secs().try_into().context("an unreasonable time to wait")?,
            tv_nsec: patience.subsec_nanos().into(),
        };
        let mut ready = [PollFd::new(&self.stream, PollFlags::IN), PollFd::new(&self.changes, PollFlags::IN)];
        let happened = match poll(&mut ready, Some(&timeout)) {
            Ok(count) => count > 0,
            Err(rustix::io::Errno::INTR) => true,
            Err(error) => return Err(error).context("cannot wait for the host"),
        };
        // Which file changed does not matter: whoever waits looks again.
        let mut events = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.changes, &mut events);
        while reader.next().is_ok() {}
        Ok(happened)
    }
}
