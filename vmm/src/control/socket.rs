//! The run folder: the VMs' sockets and locks, and who may use a name.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

/// The run folder, unless this names another (for tests).
pub const VARIABLE: &str = "KHO_VMM_RUN_DIR";

/// What can go wrong with the run folder.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The folder cannot be used.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Others could reach into the folder.
    #[error("{} is open to other users (mode {mode:o}, owner {owner}): it must be a folder of mode 700 owned by you", path.display())]
    Exposed {
        /// The folder.
        path: PathBuf,
        /// Its mode.
        mode: u32,
        /// Its owner.
        owner: u32,
    },
    /// A VM of this name runs.
    #[error("a VM called {name} is running already")]
    Taken {
        /// The name.
        name: String,
    },
    /// The memory of a VM of this name is kept.
    #[error("a VM called {name} could not be restored after the last live update, and its memory is still kept")]
    Kept {
        /// The name.
        name: String,
    },
    /// The work is being done by another process.
    #[error("another vmm {work} is at work{}", process(.pid))]
    Busy {
        /// The work.
        work: &'static str,
        /// The other process.
        pid: Option<u32>,
    },
}

fn process(pid: &Option<u32>) -> String {
    pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
}

impl SocketError {
    /// What the operator can do about it.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::Exposed { path, .. } => Some(format!("chmod 700 {0}; chown root {0}", path.display())),
            Self::Taken { name } => Some(format!("choose another --name, or end that one with `vmm stop {name}`")),
            Self::Kept { name } => Some(format!(
                "`vmm status {name}` tells why, `vmm restore {name}` tries again; or choose another --name"
            )),
            Self::Busy { .. } => Some("wait for it to end; `vmm list` shows the VMs".to_owned()),
            Self::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                Some("run vmm as root".to_owned())
            }
            Self::Io { .. } => None,
        }
    }

    fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { operation, path: path.to_owned(), source }
    }
}

/// The folder where VMs are found.
#[derive(Clone, Debug)]
pub struct RunDir(PathBuf);

impl RunDir {
    /// The host's run folder.
    pub fn from_environment() -> Self {
        Self(std::env::var_os(VARIABLE).map_or_else(|| PathBuf::from("/run/vmm"), PathBuf::from))
    }

    /// A run folder of one's own.
    #[cfg(test)]
    pub fn at(path: &Path) -> Self {
        Self(path.to_owned())
    }

    /// Creates it where it is not there, and refuses one that others can reach into: a socket in it is as good as root.
    pub fn create(&self) -> Result<(), SocketError> {
        match DirBuilder::new().mode(0o700).create(&self.0) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(SocketError::io("create the folder", &self.0)(error)),
        }
        let metadata = fs::symlink_metadata(&self.0).map_err(SocketError::io("look at the folder", &self.0))?;
        let (mode, owner) = (metadata.mode() & 0o7777, metadata.uid());
        if !metadata.is_dir() || mode & 0o077 != 0 || owner != rustix::process::geteuid().as_raw() {
            return Err(SocketError::Exposed { path: self.0.clone(), mode, owner });
        }
        Ok(())
    }

    /// The socket of a VM.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.file(name, "sock")
    }

    /// The note about a VM whose memory is kept.
    pub fn kept(&self, name: &str) -> PathBuf {
        self.file(name, "kept")
    }

    /// Where the output of a restored VM goes.
    pub fn log(&self, name: &str) -> PathBuf {
        self.file(name, "log")
    }

    /// Where the log of a restoring supervisor goes. A dot, which no VM's name has, keeps it apart from theirs.
    pub fn supervisor_log(&self) -> PathBuf {
        self.0.join(".restore.log")
    }

    /// The socket of a supervisor that keeps VMs.
    pub fn supervisor_socket(&self) -> PathBuf {
        self.0.join(".restore.sock")
    }

    /// Opens that socket, for whoever has the lock of "restore".
    pub fn listen_as_supervisor(&self) -> Result<UnixListener, SocketError> {
        listen(&self.supervisor_socket())
    }

    fn lock(&self, name: &str) -> PathBuf {
        self.file(name, "lock")
    }

    fn file(&self, name: &str, kind: &str) -> PathBuf {
        self.0.join(format!("{name}.{kind}"))
    }

    /// The names of VMs that have a file of this kind (`sock`, `kept`), in order.
    pub fn names(&self, kind: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(&self.0) else { return Vec::new() };
        let mut names: Vec<String> = entries
            .filter_map(|entry| {
                let path = entry.ok()?.path();
                let name = path.file_stem()?.to_str()?;
                let wanted = path.extension()? == kind && kho_abi::names::is_valid_vm_name(name);
                wanted.then(|| name.to_owned())
            })
            .collect();
        names.sort();
        names
    }

    /// Takes the host-wide lock of `work` ("update", "restore"), which only one process may do at a time.
    pub fn exclusive(&self, work: &'static str) -> Result<WorkLock, SocketError> {
        // A dot, which no VM's name has, keeps it apart from the VMs' files.
        let path = self.0.join(format!(".{work}.lock"));
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let mut file = file.map_err(SocketError::io("open", &path))?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let pid = fs::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok());
                return Err(SocketError::Busy { work, pid });
            }
            Err(error) => return Err(SocketError::io("lock", &path)(error.into())),
        }
        let write = |file: &mut File| {
            file.set_len(0)?;
            io::Write::write_all(file, format!("{}\n", std::process::id()).as_bytes())
        };
        // Only for messages: a disk that is full must not keep a guest from being restored.
        if let Err(error) = write(&mut file) {
            tracing::warn!(%error, path = %path.display(), "cannot note the process in its lock");
        }
        Ok(WorkLock { _file: file })
    }
}

/// A host-wide lock, held while this lives.
#[derive(Debug)]
pub struct WorkLock {
    _file: File,
}

/// A VM's name, held by this process: no other process can be a VM of that name meanwhile.
#[derive(Debug)]
pub struct Claim {
    dir: RunDir,
    name: String,
    _lock: File,
}

impl Claim {
    /// Claims a name. What a dead process left behind is taken over; a live one's name is refused.
    pub fn take(dir: &RunDir, name: &str) -> Result<Self, SocketError> {
        dir.create()?;
        let path = dir.lock(name);
        loop {
            let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
            let file = file.map_err(SocketError::io("open", &path))?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Err(SocketError::Taken { name: name.to_owned() }),
                Err(error) => return Err(SocketError::io("lock", &path)(error.into())),
            }
            // The previous holder deletes the file before it lets go of the lock: a lock on a deleted file is a lock on
            // nothing, while another process may already hold the one on the new file of that name.
            let locked = file.metadata().map_err(SocketError::io("look at", &path))?;
            if fs::metadata(&path).is_ok_and(|there| (there.dev(), there.ino()) == (locked.dev(), locked.ino())) {
                return Ok(Self { dir: dir.clone(), name: name.to_owned(), _lock: file });
            }
        }
    }

    /// Opens the socket of the claimed name.
    pub fn listen(&self) -> Result<UnixListener, SocketError> {
        listen(&self.dir.socket(&self.name))
    }
}

/// Opens a socket in the place of one that a dead process may have left: nobody else uses it, as the caller has a lock.
fn listen(path: &Path) -> Result<UnixListener, SocketError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(SocketError::io("replace the stale socket", path)(error));
        }
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(SocketError::io("open the socket", path))?;
    // The folder keeps others out in the moment before this.
    fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(SocketError::io("protect", path))?;
    Ok(listener)
}

impl Drop for Claim {
    fn drop(&mut self) {
        for path in [self.dir.socket(&self.name), self.dir.lock(&self.name)] {
            if let Err(error) = fs::remove_file(&path)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(%error, path = %path.display(), "cannot delete");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn dir() -> (tempfile::TempDir, RunDir) {
        let folder = tempfile::tempdir().unwrap();
        let dir = RunDir::at(&folder.path().join("vmm"));
        dir.create().unwrap();
        (folder, dir)
    }

    #[test]
    fn second_vm_of_a_name_is_refused_while_the_first_lives() {
        let (_folder, dir) = dir();
        let first = Claim::take(&dir, "a").unwrap();
        let _listener = first.listen().unwrap();
        assert!(matches!(Claim::take(&dir, "a"), Err(SocketError::Taken { .. })));
        Claim::take(&dir, "b").unwrap();
        UnixStream::connect(dir.socket("a")).unwrap();
        drop(first);
        Claim::take(&dir, "a").unwrap();
    }

    #[test]
    fn stale_socket_of_a_dead_process_is_replaced() {
        let (_folder, dir) = dir();
        // What a killed process leaves: both files, no lock.
        drop(UnixListener::bind(dir.socket("a")).unwrap());
        File::create(dir.lock("a")).unwrap();
        assert!(UnixStream::connect(dir.socket("a")).is_err());
        let claim = Claim::take(&dir, "a").unwrap();
        let _listener = claim.listen().unwrap();
        UnixStream::connect(dir.socket("a")).unwrap();
    }

    #[test]
    fn one_of_many_racing_for_a_name_gets_it() {
        let (_folder, dir) = dir();
        for _ in 0..20 {
            let racers: Vec<_> = (0..8)
                .map(|_| {
                    let dir = dir.clone();
                    std::thread::spawn(move || Claim::take(&dir, "a").ok())
                })
                .collect();
            let claims: Vec<Claim> = racers.into_iter().filter_map(|racer| racer.join().unwrap()).collect();
            assert_eq!(claims.len(), 1);
        }
    }

    #[test]
    fn socket_and_folder_are_closed_to_others() {
        let (_folder, dir) = dir();
        let claim = Claim::take(&dir, "a").unwrap();
        let _listener = claim.listen().unwrap();
        assert_eq!(fs::metadata(dir.socket("a")).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(&dir.0).unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn folder_open_to_others_is_refused() {
        let (_folder, dir) = dir();
        fs::set_permissions(&dir.0, Permissions::from_mode(0o755)).unwrap();
        assert!(matches!(dir.create(), Err(SocketError::Exposed { .. })));
    }

    #[test]
    fn files_of_a_vm_that_ended_are_gone() {
        let (_folder, dir) = dir();
        let claim = Claim::take(&dir, "a").unwrap();
        let _listener = claim.listen().unwrap();
        assert_eq!(dir.names("sock"), ["a"]);
        drop(claim);
        assert_eq!(fs::read_dir(&dir.0).unwrap().count(), 0);
    }

    #[test]
    fn second_process_of_a_work_is_refused() {
        let (_folder, dir) = dir();
        let lock = dir.exclusive("restore").unwrap();
        assert!(matches!(dir.exclusive("restore"), Err(SocketError::Busy { pid: Some(_), .. })));
        dir.exclusive("update").unwrap();
        drop(lock);
        dir.exclusive("restore").unwrap();
    }
}
