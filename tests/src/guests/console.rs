//! Somebody at a guest's console: reads what its serial port says, types, and goes on after a live update.
use crate::host::{Host, PATIENCE, Process};
use crate::init::terminal::READY;
use crate::link::SHARE;
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::io::ErrorKind;
use std::time::Duration;

/// How many bytes a serial port takes at once. What is typed faster than the guest reads is lost, as on a real line.
const LINE_MAXIMUM: usize = 64;
/// The end of what root's shell says before it reads a line.
pub const PROMPT: &str = "# ";
/// How much of what the guest has said last is shown after a failure.
const TAIL: usize = 600;

/// Where `vmm restore` writes about the VMs that it looks after.
const SUPERVISOR_LOG: &str = "/run/vmm/.restore.log";

/// A terminal at the socket behind a guest's serial port.
#[derive(Debug)]
pub struct Console {
    guest: String,
    patience: Duration,
    terminal: Process,
    boot: u32,
    position: usize,
}

impl Console {
    /// The serial port of a guest that has a console: a value of `--serial`.
    pub fn serial(guest: &str) -> String {
        format!("socket={}", socket(guest))
    }

    /// Connects, as soon as there is something to connect to. Whatever the guest is waited for may take as long as `patience`.
    pub fn attach(host: &mut Host, guest: &str, patience: Duration) -> Result<Self> {
        // An earlier guest of this name may have left something behind.
        let _ = fs::remove_file(host.local(&log(guest)));
        let terminal = terminal(host, guest)?;
        Ok(Self { guest: guest.into(), patience, terminal, boot: host.boots(), position: 0 })
    }

    /// Connects once more, after a live update of the host.
    pub fn attach_again(&mut self, host: &mut Host) -> Result<()> {
        self.terminal = terminal(host, &self.guest)?;
        self.boot = host.boots();
        Ok(())
    }

    /// All that the guest has said, without the terminal's control sequences.
    pub fn said(&self, host: &Host) -> Result<String> {
        let path = host.local(&log(&self.guest));
        match fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
            bytes => Ok(plain(&bytes.with_context(|| format!("cannot read {}", path.display()))?)),
        }
    }

    /// Waits until the guest says this, and gives what it has said before.
    pub fn await_text(&mut self, host: &mut Host, text: &str) -> Result<String> {
        let what = format!("'{}' on the console of {}", text.escape_debug(), self.guest);
        let (before, ()) = self.await_match(host, &what, |said| Some((said.find(text)?, text.len(), ())))?;
        Ok(before)
    }

    /// Waits until something is found in what the guest says: its position, its length and its meaning.
    fn await_match<T>(
        &mut self,
        host: &mut Host,
        what: &str,
        find: impl Fn(&str) -> Option<(usize, usize, T)>,
    ) -> Result<(String, T)> {
        host.wait_until(what, self.patience, |host| {
            let said = self.said(host)?;
            let rest = said.get(self.position..).unwrap_or_default();
            if let Some((start, length, meaning)) = find(rest) {
                self.position += start + length;
                return Ok(Some((rest[..start].to_owned(), meaning)));
            }
            if host.boots() != self.boot || host.has_ended(&self.terminal)? {
                let last = &rest[rest.len().saturating_sub(TAIL)..];
                // What has become of a restored VM is known there alone.
                let log = host.read(SUPERVISOR_LOG).unwrap_or_default();
                bail!("nobody is at the console any more; last it said: {last}\nand the supervisor: {log}");
            }
            Ok(None)
        })
    }

    /// Types a line.
    pub fn type_line(&mut self, host: &mut Host, line: &str) -> Result<()> {
        ensure!(line.len() < LINE_MAXIMUM, "'{line}' is more than a serial port takes at once");
        host.write(&keys(&self.guest), &format!("{line}\n"))
    }

    /// Has the shell run a command, waits for its end and gives what it has said. Fails unless the command succeeds.
    pub fn run(&mut self, host: &mut Host, command: &str) -> Result<String> {
        // What is typed comes back, too, but has no number in it.
        self.type_line(host, &format!("{command}; echo \"=$?=\""))?;
        let what = format!("the end of `{command}` in {}", self.guest);
        let (said, status) = self.await_match(host, &what, status)?;
        // What is typed before the shell asks for it comes back twice.
        self.await_text(host, PROMPT)?;
        let (_, output) = said.split_once('\n').unwrap_or_default();
        ensure!(status == 0, "`{command}` in {} ended with exit status {status}: {output}", self.guest);
        Ok(output.to_owned())
    }

    /// Waits for the end of the guest, and gives what it has said meanwhile.
    pub fn await_end(&mut self, host: &mut Host) -> Result<String> {
        let what = format!("the end of {}", self.guest);
        host.wait_until(&what, self.patience, |host| Ok(host.has_ended(&self.terminal)?.then_some(())))?;
        let said = self.said(host)?;
        let last = said.get(self.position..).unwrap_or_default().to_owned();
        self.position = said.len();
        Ok(last)
    }
}

/// The first line that ends with `=STATUS=` in a text: where that is, how long it is, and the status.
fn status(said: &str) -> Option<(usize, usize, u8)> {
    let mut position = 0;
    for line in said.split_inclusive('\n') {
        // A command's last words may have no newline at their end.
        if let Some((words, number)) = line.strip_suffix("=\n").and_then(|line| line.rsplit_once('='))
            && let Ok(number) = number.parse()
        {
            return Some((position + words.len(), line.len() - words.len(), number));
        }
        position += line.len();
    }
    None
}

/// Starts a terminal, and waits until one can type.
fn terminal(host: &mut Host, guest: &str) -> Result<Process> {
    let terminal = host.spawn(&["/init", &socket(guest), &keys(guest), &format!("{SHARE}/{}", log(guest))])?;
    let what = format!("a connection to the console of {guest}");
    host.wait_until(&what, PATIENCE, |host| {
        if host.stdout(&terminal)?.contains(READY) {
            return Ok(Some(()));
        }
        if host.has_ended(&terminal)? {
            bail!("the terminal has ended: {}", host.wait(&terminal)?);
        }
        Ok(None)
    })?;
    Ok(terminal)
}

fn socket(guest: &str) -> String {
    format!("/run/{guest}.console")
}

fn keys(guest: &str) -> String {
    format!("/run/{guest}.keys")
}

fn log(guest: &str) -> String {
    format!("guest-{guest}.log")
}

/// The text among what a terminal is told, byte by byte, so that it only grows when more is said.
fn plain(bytes: &[u8]) -> String {
    let mut text = String::new();
    let mut rest = bytes;
    while let Some((&first, behind)) = rest.split_first() {
        rest = behind;
        match first {
            0x1b => match control_sequence(rest) {
                Some(length) => rest = &rest[length..],
                // Its end is still to come.
                None => break,
            },
            b'\n' | b'\t' | b' '..=b'~' => text.push(char::from(first)),
            0x80.. => text.push('?'),
            _ => {}
        }
    }
    text
}

/// The length of a terminal's control sequence, of which the escape character was read; nothing where it is not whole.
fn control_sequence(bytes: &[u8]) -> Option<usize> {
    let (&kind, parameters) = bytes.split_first()?;
    let behind = |end: &dyn Fn(&u8) -> bool| Some(2 + parameters.iter().position(end)?);
    match kind {
        b'[' => behind(&|byte| (0x40..=0x7e).contains(byte)),
        // Up to a bell or a string terminator, whose backslash then follows.
        b']' | b'P' | b'_' | b'^' => {
            let end = behind(&|byte| matches!(byte, 0x07 | 0x1b))?;
            if bytes[end - 1] == 0x07 { Some(end) } else { bytes.get(end).map(|_| end + 1) }
        }
        b' '..=b'/' => behind(&|byte| (0x30..=0x7e).contains(byte)),
        _ => Some(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_sequences_are_taken_out_and_text_stays() {
        let said = b"\x1b[?2004h\x1b]3008;start=x\x1b\\root\x1b]0;title\x07@\x1b[01;32mdebian\x1b[0m\x1b(B:~# \xe2\x97\x8f\r\n";
        assert_eq!(plain(said), "root@debian:~# ???\n");
    }

    #[test]
    fn text_only_grows_when_more_is_said() {
        let said = b"a\x1b[1;2mb\x1b]8;;x\x1b\\c\x1b(Bd\xc3\xa4e";
        for end in 0..said.len() {
            assert!(plain(said).starts_with(&plain(&said[..end])), "{end}");
        }
    }

    #[test]
    fn exit_status_is_found_behind_what_was_typed_and_behind_words_without_a_newline() {
        let typed = "cat x; echo \"=$?=\"\n";
        for (output, before) in [("a=b\n=17=\n# ", "a=b\n"), ("last=words=17=\n# ", "last=words"), ("=17=\n", "")] {
            let said = format!("{typed}{output}");
            let (start, length, number) = status(&said).unwrap_or_default();
            assert_eq!((&said[typed.len()..start], length, number), (before, 5, 17));
        }
        assert_eq!(status(&format!("{typed}last=1=")), None);
        assert_eq!(status(&format!("{typed}last=x=\n")), None);
    }
}
