//! The UNIX socket at which programs of the host ask for connections to the guest.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with};

use crate::device::virtio::VirtioError;

/// So many programs can wait to be heard.
const BACKLOG: i32 = 128;

/// What the device is called in messages.
pub fn name(path: &Path) -> String {
    format!("vsock socket={}", path.display())
}

/// A new UNIX socket that never waits.
pub fn new_socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Listens at `path`, where nobody else does; what a dead process has left there is replaced.
pub fn open(path: &Path) -> Result<UnixListener, VirtioError> {
    let system = |operation: &str| {
        let operation = operation.to_owned();
        move |error: Errno| VirtioError::System { device: name(path), operation, source: error.into() }
    };
    let unfit = |reason: &str| VirtioError::Unfit { device: name(path), reason: reason.to_owned() };
    let address = SocketAddrUnix::new(path).map_err(system("use that path"))?;
    // Where that cannot be said, binding says why.
    if let Ok(there) = fs::symlink_metadata(path) {
        if !there.file_type().is_socket() {
            return Err(unfit("something that is no socket lies at that path: choose another, or move it away"));
        }
        let probe = new_socket().map_err(system("create a socket"))?;
        match connect(&probe, &address) {
            Err(Errno::CONNREFUSED) => remove(path)?,
            // It was there a moment ago.
            Err(Errno::NOENT) => {}
            Ok(()) | Err(Errno::AGAIN) => {
                return Err(unfit("another process listens at that path: end that one, or choose another path"));
            }
            Err(error) => return Err(system("find out whether somebody listens there")(error)),
        }
    }
    let socket = new_socket().map_err(system("create a socket"))?;
    // Before there is a file, which then never has another mode.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(system("keep others out"))?;
    match bind(&socket, &address) {
        Err(Errno::NOENT | Errno::NOTDIR) => {
            return Err(unfit("the socket's folder is not there: make it (mkdir -p), and try again"));
        }
        result => result.map_err(system("give it its path"))?,
    }
    listen(&socket, BACKLOG).map_err(system("listen"))?;
    Ok(socket.into())
}

fn remove(path: &Path) -> Result<(), VirtioError> {
    fs::remove_file(path).map_err(|source| VirtioError::System {
        device: name(path),
        operation: "replace the socket that a dead process has left".to_owned(),
        source,
    })
}
