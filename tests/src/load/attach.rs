//! A client of a guest's serial port on a socket, on its host.
use anyhow::{Context, Result, ensure};
use std::io::{Read, Write, stdout};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// What it does once it is attached.
#[derive(Clone, Debug)]
pub enum Manner {
    /// Tells what it hears until so many lines are whole, and detaches.
    Lines(u64),
    /// Tells what it hears until a line with this in it is whole, and detaches.
    Until(String),
    /// Says a line and detaches.
    Say(String),
    /// Neither reads nor goes away.
    Still,
}

/// Attaches.
pub fn run(socket: &Path, manner: &Manner) -> Result<()> {
    let mut port = UnixStream::connect(socket).with_context(|| format!("cannot attach to {}", socket.display()))?;
    match manner {
        Manner::Lines(lines) => {
            let enough = |heard: &[u8]| heard.iter().filter(|&&byte| byte == b'\n').count() as u64 >= *lines;
            listen(&mut port, enough, &mut stdout())?;
            leave(&mut port, &mut stdout())
        }
        Manner::Until(text) => {
            let enough = |heard: &[u8]| {
                let whole = heard.split_inclusive(|&byte| byte == b'\n').filter(|line| line.ends_with(b"\n"));
                whole.into_iter().any(|line| String::from_utf8_lossy(line).contains(text))
            };
            listen(&mut port, enough, &mut stdout())?;
            leave(&mut port, &mut stdout())
        }
        Manner::Say(text) => port.write_all(format!("{text}\n").as_bytes()).context("cannot say it"),
        Manner::Still => loop {
            thread::park();
        },
    }
}

fn listen(port: &mut impl Read, enough: impl Fn(&[u8]) -> bool, output: &mut impl Write) -> Result<()> {
    let (mut heard, mut buffer) = (Vec::new(), [0; 4096]);
    while !enough(&heard) {
        let count = port.read(&mut buffer).context("cannot listen")?;
        ensure!(count > 0, "the port was closed");
        heard.extend_from_slice(&buffer[..count]);
        output.write_all(&buffer[..count]).and_then(|()| output.flush()).context("cannot tell what was heard")?;
    }
    Ok(())
}

/// Tells what is on its way, too: what is left unread when the socket is closed is lost. A port that is never quiet is left all the same.
fn leave(port: &mut UnixStream, output: &mut impl Write) -> Result<()> {
    const QUIET: Duration = Duration::from_millis(300);
    const PATIENCE: Duration = Duration::from_secs(3);
    port.set_read_timeout(Some(QUIET)).context("cannot set a time-out")?;
    let (begun, mut buffer) = (Instant::now(), [0; 4096]);
    while begun.elapsed() < PATIENCE {
        let Ok(count @ 1..) = port.read(&mut buffer) else { break };
        output.write_all(&buffer[..count]).and_then(|()| output.flush()).context("cannot tell what was heard")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_hears_until_it_has_enough_and_notices_when_there_is_no_more() {
        let (mut port, mut heard) = (&b"one\ntwo\n"[..], Vec::new());
        listen(&mut port, |heard| heard.ends_with(b"two\n"), &mut heard).expect("two lines");
        assert_eq!(heard, b"one\ntwo\n");
        assert!(listen(&mut port, |heard| heard.ends_with(b"three\n"), &mut heard).is_err());
    }
}
