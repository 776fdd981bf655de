//! A client that talks to an echo on its host over vsock. Connections do not outlive the host's kernel: it has to notice, and connect
//! again. Only what is wrong while a connection holds is damage.
use super::report::Report;
use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;
use std::{mem, thread};

/// The host's address.
pub const HOST: u32 = libc::VMADDR_CID_HOST;

const MESSAGE: usize = 16;
/// From one message to the next, and from one attempt to connect to the next.
const REST: Duration = Duration::from_millis(100);

/// Talks for ever.
pub fn run(cid: u32, port: u32, report: &mut Report<impl Write>) -> Result<()> {
    report.start(format_args!("port={port}"))?;
    let (mut connections, mut number) = (0_u64, 0);
    loop {
        if let Ok(connection) = connect(cid, port) {
            connections += 1;
            // How the connection ended is of no interest: that the next one works is.
            let _ended = talk(connection, &mut number, connections, report)?;
        }
        thread::sleep(REST);
    }
}

/// Talks until the connection ends. Fails only when it cannot report.
fn talk(
    mut connection: impl Read + Write,
    number: &mut u64,
    connections: u64,
    report: &mut Report<impl Write>,
) -> Result<std::io::Error> {
    loop {
        *number += 1;
        let mut message = [0; MESSAGE];
        message[..8].copy_from_slice(&connections.to_le_bytes());
        message[8..].copy_from_slice(&number.to_le_bytes());
        let mut answer = [0; MESSAGE];
        if let Err(ended) = connection.write_all(&message).and_then(|()| connection.read_exact(&mut answer)) {
            return Ok(ended);
        }
        if answer != message {
            report.damage("vsock", format_args!("sent={message:02x?} received={answer:02x?}"))?;
        }
        report.progress(format_args!("echoes={number} connections={connections}"))?;
        thread::sleep(REST);
    }
}

fn connect(cid: u32, port: u32) -> Result<File> {
    // SAFETY: the call takes no pointers.
    let raw = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    ensure!(raw >= 0, "cannot create a socket: {}", std::io::Error::last_os_error());
    // SAFETY: the descriptor is new, open, and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(raw) };
    // SAFETY: the structure consists of numbers, for which zero is a value.
    let mut address: libc::sockaddr_vm = unsafe { mem::zeroed() };
    address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).context("no family of addresses")?;
    address.svm_cid = cid;
    address.svm_port = port;
    let size = libc::socklen_t::try_from(size_of::<libc::sockaddr_vm>()).context("no size of addresses")?;
    // SAFETY: the pointer is to a structure of that size that lives until the call returns.
    let status = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), size) };
    ensure!(status == 0, "cannot connect: {}", std::io::Error::last_os_error());
    Ok(socket.into())
}

/// Sends everything back that comes in over any connection to a UNIX socket, for ever.
pub fn echo(path: &Path) -> Result<()> {
    let listener = UnixListener::bind(path).with_context(|| format!("cannot listen at {}", path.display()))?;
    println!("listening");
    loop {
        let (mut connection, _) = listener.accept().context("cannot take in a connection")?;
        thread::spawn(move || {
            let mut back = connection.try_clone()?;
            std::io::copy(&mut connection, &mut back)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::ALWAYS;
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn an_echo_is_recognized_and_a_wrong_one_is_damage() {
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        let host = thread::spawn(move || {
            let mut message = [0; MESSAGE];
            for spoil in [0, 1] {
                theirs.read_exact(&mut message).expect("a message");
                message[9] ^= spoil;
                theirs.write_all(&message).expect("an answer");
            }
        });
        let mut said = Vec::new();
        let mut number = 0;
        talk(ours, &mut number, 1, &mut Report::new("vsock", ALWAYS, &mut said)).expect("an ended connection");
        host.join().expect("the host's end");
        let said = String::from_utf8(said).expect("text");
        assert!(
            said.starts_with("LOAD line n=1 of=vsock echoes=1 connections=1\nDAMAGE vsock of=vsock sent="),
            "{said}"
        );
    }

    #[test]
    fn the_echo_sends_back_what_each_connection_sends() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("echo");
        let listening = path.clone();
        thread::spawn(move || echo(&listening));
        let connect = || loop {
            if let Ok(connection) = UnixStream::connect(&path) {
                return connection;
            }
            thread::yield_now();
        };
        let mut connections = [connect(), connect()];
        for (connection, text) in connections.iter_mut().zip([b"one", b"two"]) {
            connection.write_all(text).expect("a message");
            let mut answer = [0; 3];
            connection.read_exact(&mut answer).expect("an answer");
            assert_eq!(&answer, text);
        }
    }
}
