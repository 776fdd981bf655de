//! A client that talks to an echo on its host over vsock, and an echo that its host talks to. Connections do not outlive the host's
//! kernel: either has to notice, and the client connects again. Only what is wrong while a connection holds is damage.
use super::report::Report;
use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc;
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

fn socket() -> Result<OwnedFd> {
    // SAFETY: the call takes no pointers.
    let raw = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    ensure!(raw >= 0, "cannot create a socket: {}", std::io::Error::last_os_error());
    // SAFETY: the descriptor is new, open, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// An address, and its size as system calls want it.
fn address(cid: u32, port: u32) -> Result<(libc::sockaddr_vm, libc::socklen_t)> {
    // SAFETY: the structure consists of numbers, for which zero is a value.
    let mut address: libc::sockaddr_vm = unsafe { mem::zeroed() };
    address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).context("no family of addresses")?;
    address.svm_cid = cid;
    address.svm_port = port;
    let size = libc::socklen_t::try_from(size_of::<libc::sockaddr_vm>()).context("no size of addresses")?;
    Ok((address, size))
}

fn connect(cid: u32, port: u32) -> Result<File> {
    let socket = socket()?;
    let (address, size) = address(cid, port)?;
    // SAFETY: the pointer is to a structure of that size that lives until the call returns.
    let status = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), size) };
    ensure!(status == 0, "cannot connect: {}", std::io::Error::last_os_error());
    Ok(socket.into())
}

fn listen(port: u32) -> Result<OwnedFd> {
    const BACKLOG: libc::c_int = 16;
    let socket = socket()?;
    let (address, size) = address(libc::VMADDR_CID_ANY, port)?;
    // SAFETY: the pointer is to a structure of that size that lives until the call returns.
    let status = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) };
    ensure!(status == 0, "cannot have port {port}: {}", std::io::Error::last_os_error());
    // SAFETY: the call takes no pointers.
    let status = unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) };
    ensure!(status == 0, "cannot listen: {}", std::io::Error::last_os_error());
    Ok(socket)
}

fn accept(listener: &OwnedFd) -> Result<File> {
    // SAFETY: without an address the call takes no pointers.
    let raw =
        unsafe { libc::accept4(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC) };
    ensure!(raw >= 0, "cannot take in a connection: {}", std::io::Error::last_os_error());
    // SAFETY: the descriptor is new, open, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) }.into())
}

/// Sends everything back that comes in over any connection to a port, for ever, and tells how connections end.
pub fn answer(port: u32, report: &mut Report<impl Write>) -> Result<()> {
    let listener = listen(port)?;
    report.start(format_args!("port={port}"))?;
    let (ending, endings) = mpsc::channel();
    thread::spawn(move || {
        while let Ok(mut connection) = accept(&listener) {
            let ending = ending.clone();
            thread::spawn(move || {
                let ended = connection.try_clone().and_then(|mut back| std::io::copy(&mut connection, &mut back));
                // Nobody listens any more only when the program ends.
                let _unheard = ending.send(ended.map_err(|error| error.kind()));
            });
        }
    });
    let (mut whole, mut resets) = (0_u64, 0_u64);
    for ended in endings {
        match ended {
            Ok(_) => whole += 1,
            Err(ErrorKind::ConnectionReset) => resets += 1,
            Err(other) => report.damage("vsock", format_args!("ended={other}"))?,
        }
        report.progress(format_args!("whole={whole} resets={resets}"))?;
    }
    anyhow::bail!("no more connections can be taken in")
}

/// From the host: connects to a port of the guest where an echo is, sends so many KiB, and gets them back; then stays connected to
/// the end, or ends the connection, in which the guest agrees.
pub fn reach(path: &Path, port: u32, kib: u64, stay: bool) -> Result<()> {
    let mut connection = UnixStream::connect(path).with_context(|| format!("cannot connect to {}", path.display()))?;
    connection.write_all(format!("CONNECT {port}\n").as_bytes())?;
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        let mut byte = [0];
        connection.read_exact(&mut byte).context("the guest does not answer")?;
        answer.extend(byte);
    }
    ensure!(answer.starts_with(b"OK "), "the answer is {:?}", String::from_utf8_lossy(&answer));
    let sent: Vec<u8> = (0..kib << 10).map(|at| (at ^ at >> 8).to_le_bytes()[0]).collect();
    let mut received = vec![0; sent.len()];
    let mut writer = connection.try_clone()?;
    thread::scope(|scope| {
        let sending = scope.spawn(|| {
            writer.write_all(&sent)?;
            if stay { Ok(()) } else { writer.shutdown(Shutdown::Write) }
        });
        connection.read_exact(&mut received).context("not all came back")?;
        sending.join().map_err(|_| anyhow::anyhow!("the sending thread died"))?.context("not all could be sent")
    })?;
    ensure!(received == sent, "something else came back than was sent");
    println!("echoed={}", sent.len());
    let more = connection.read(&mut [0]);
    ensure!(matches!(more, Ok(0)), "instead of an end there came {more:?}");
    Ok(())
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
