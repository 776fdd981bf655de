//! A terminal at a guest's serial port: what the guest says is added to a file, what is written into a FIFO is typed.
use anyhow::{Context, Result};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use std::fs::File;
use std::io::{ErrorKind, Read, Write, copy};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// How long `vmm` may take to open the port.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a terminal says when it is connected.
pub const READY: &str = "connected";

/// Connects to the socket and stays until the port is closed.
pub fn main(socket: &str, typed: &str, said: &str) -> Result<()> {
    let port = connect(socket)?;
    mknodat(CWD, typed, FileType::Fifo, Mode::from_raw_mode(0o600), 0)
        .with_context(|| format!("cannot make {typed}"))?;
    // Open for writing too, so that it has no end when somebody who has typed closes it.
    let mut keys =
        File::options().read(true).write(true).open(typed).with_context(|| format!("cannot open {typed}"))?;
    let mut log =
        File::options().create(true).append(true).open(said).with_context(|| format!("cannot open {said}"))?;
    let mut line = port.try_clone().context("cannot duplicate the connection")?;
    // From now on one can type: earlier, what is written would become a file in the FIFO's place.
    println!("{READY}");
    // Ends with the process.
    thread::spawn(move || copy(&mut keys, &mut line));
    // The guest does not wait for whoever reads, and the folder that the file is in is slow.
    let (sender, receiver) = mpsc::channel::<Vec<u8>>();
    let reader = thread::spawn(move || -> std::io::Result<()> {
        let mut buffer = [0; 4096];
        loop {
            match (&port).read(&mut buffer)? {
                0 => return Ok(()),
                // Fails only when nobody writes any more, which is said below.
                count => drop(sender.send(buffer[..count].to_vec())),
            }
        }
    });
    while let Ok(mut bytes) = receiver.recv() {
        bytes.extend(receiver.try_iter().flatten());
        log.write_all(&bytes).with_context(|| format!("cannot write {said}"))?;
    }
    let read = reader.join().map_err(|_| anyhow::anyhow!("the thread that reads {socket} died"))?;
    read.with_context(|| format!("cannot read {socket}"))
}

/// Connects as soon as somebody listens.
fn connect(socket: &str) -> Result<UnixStream> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(socket) {
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                if Instant::now() > deadline {
                    return Err(error).with_context(|| format!("nobody listens on {socket}"));
                }
                thread::sleep(Duration::from_millis(10));
            }
            port => return port.with_context(|| format!("cannot connect to {socket}")),
        }
    }
}
