//! Calculations and memory traffic with known results, in several threads.
use super::pattern::{difference, fill};
use super::report::Report;
use anyhow::{Context, Result, bail};
use guest_kernel::pattern::scramble;
use std::io::Write;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

/// What is calculated at once.
const STEPS: u64 = 200_000;
/// A thread that has not finished a round for so long stands still. Generous: emulation is slow.
const PATIENCE: Duration = Duration::from_secs(120);

/// What a thread says after each round.
type Said = (u64, Option<String>);

/// Works for ever. `size` is the memory of each thread in bytes.
pub fn run(threads: u64, size: u64, report: &mut Report<impl Write>) -> Result<()> {
    let size = usize::try_from(size).context("that is more memory than there can be")?;
    report.start(format_args!("threads={threads} bytes={size}"))?;
    let (sender, receiver) = channel();
    for thread in 0..threads {
        let sender = sender.clone();
        thread::spawn(move || {
            give_way();
            work(thread, size, &sender);
        });
    }
    drop(sender);
    let mut rounds = 0_u64;
    loop {
        match receiver.recv_timeout(PATIENCE) {
            Ok((_, None)) => rounds += 1,
            Ok((thread, Some(wrong))) => report.damage("work", format_args!("thread={thread} {wrong}"))?,
            Err(RecvTimeoutError::Timeout) => report.damage("work", format_args!("stands=still"))?,
            Err(RecvTimeoutError::Disconnected) => bail!("no thread works any more"),
        }
        report.progress(format_args!("rounds={rounds}"))?;
    }
}

/// Takes what other loads leave: there is always enough, and on few and slow processors they would hardly get on beside this.
fn give_way() {
    const LEAST: i32 = 19;
    // Nobody is refused to be less important. And if so, all are only slower.
    let _ = rustix::process::nice(LEAST);
}

fn work(thread: u64, size: usize, sender: &Sender<Said>) {
    let mut memory = vec![0; size];
    let expected = (whole_numbers(thread), fractions(thread));
    for round in 1.. {
        let seed = thread << 48 | round;
        fill(seed, 0, &mut memory);
        let mut wrong = None;
        // Long enough for the guest to be paused while numbers are in registers and the memory is only in caches.
        let found = (whole_numbers(thread), fractions(thread));
        if found != expected {
            wrong = Some(format!("found={found:x?} expected={expected:x?}"));
        }
        if let Some(at) = difference(seed, 0, &memory) {
            wrong = Some(format!("memory={at:#x}"));
        }
        if sender.send((thread, wrong)).is_err() {
            return;
        }
    }
}

/// A chain of whole numbers: an error anywhere shows in its end.
fn whole_numbers(seed: u64) -> u64 {
    (0..STEPS).fold(seed, |value, step| scramble(value ^ step))
}

/// A chain of fractions in four lanes, so that SIMD registers are in use; its bits at the end. The chain is chaotic: the least
/// error grows with every step, where a chain that settles would forget it.
fn fractions(seed: u64) -> u64 {
    const GOLDEN_RATIO: f64 = 0.618_033_988_749_895;
    let mut lanes = [1.0, 2.0, 3.0, 4.0].map(|lane: f64| ((lane + seed as f64) * GOLDEN_RATIO).fract());
    for _ in 0..STEPS {
        for lane in &mut lanes {
            *lane = 3.99 * *lane * (1.0 - *lane);
        }
    }
    lanes.iter().fold(0, |bits, lane| scramble(bits ^ lane.to_bits()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_on_a_sound_machine_find_nothing_wrong() {
        let (sender, receiver) = channel();
        thread::spawn(move || work(3, 1 << 16, &sender));
        for said in receiver.iter().take(3) {
            assert_eq!(said, (3, None));
        }
    }

    #[test]
    fn results_depend_on_the_thread() {
        assert_ne!(whole_numbers(1), whole_numbers(2));
        assert_ne!(fractions(1), fractions(2));
    }
}
