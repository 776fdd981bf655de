//! A serial port on a socket, to which one attaches and from which one detaches.
use anyhow::{Context, Result, ensure};
use guest_kernel::protocol::{Line, Speaker};
use tests::architecture::Architecture;
use tests::guests::Guest;
use tests::host::{Host, HostConfig, PATIENCE, Process, Side};
use tests::link::SHARE;
use tests::operator::{self, Update};

on_one_architecture! { aarch64, a_console_is_left_and_found_again_with_all_that_was_said }

const ORACLE: &str = "/run/oracle.console";
const FLOOD: &str = "/run/flood.console";

fn a_console_is_left_and_found_again_with_all_that_was_said(architecture: Architecture) -> Result<()> {
    Host::with(HostConfig::new("console", architecture, 1024)?, |host| {
        std::fs::copy(&host.config().products.load, host.local("lab-load"))?;
        // It says far more than anybody reads.
        Guest::linux("flood", 192)
            .with("lab.load=ticks,--every,1")
            .option("serial", &format!("socket={FLOOD}"))
            .start(host)?;
        Guest::resting_oracle("oracle", 64).option("serial", &format!("socket={ORACLE}")).start(host)?;
        host.wait_until("both VMs and their consoles", PATIENCE, |host| {
            let consoles = host.run(&["ls", ORACLE, FLOOD])?;
            Ok((consoles.code == Some(0) && operator::list(host)?.len() == 2).then_some(()))
        })?;
        let before = attach(host, ORACLE, &["--lines", "3"])?;
        let before = host.wait(&before)?.success()?.stdout;
        ensure!(before.starts_with("ORACLE start"), "what was said before anybody attached is not there: {before}");

        let mut dropped = 0;
        host.wait_until("more output than is kept", PATIENCE, |host| {
            dropped = dropped_bytes(host, "flood")?;
            Ok((dropped > 0).then_some(()))
        })?;
        operator::live_update_of_all(host, Side::Newer, &Update::default())?;

        // Nobody was attached to the oracle from its third line on.
        let between = attach(host, ORACLE, &["--until", "ORACLE pause"])?;
        let between = host.wait(&between)?.success()?.stdout;
        ensure!(between.contains("ORACLE line"), "nothing is from before the update: {between}");
        let after = attach(host, ORACLE, &["--lines", "3"])?;
        let after = host.wait(&after)?.success()?.stdout;
        let said = format!("{before}{between}{after}");
        let beats = beats(&said, Speaker::Oracle);
        ensure!(consecutive(&beats), "of what was said something is missing or twice: {said}");
        ensure!(!said.contains("DAMAGE"), "{said}");
        ensure!(dropped_bytes(host, "oracle")? == 0, "the oracle's output was dropped");

        let carried = dropped_bytes(host, "flood")?;
        ensure!(carried >= dropped, "of {dropped} bytes dropped only {carried} are known after the update");
        let text = host.run(&["vmm", "status", "flood"])?.success()?.stdout;
        ensure!(text.contains("bytes of output were dropped"), "{text}");
        let still = attach(host, FLOOD, &["--still"])?;
        host.wait_until("the guest to go on for all that its reader stands still", PATIENCE, |host| {
            ensure!(!host.has_ended(&still)?, "the reader has gone");
            Ok((dropped_bytes(host, "flood")? > carried + 1000).then_some(()))
        })?;
        // The newest client is the one.
        let reader = attach(host, FLOOD, &["--lines", "400"])?;
        let heard = host.wait(&reader)?.success()?.stdout;
        // Other programs of the guest speak as well, and the first line has lost its beginning.
        let beats = self::beats(&heard, Speaker::Load);
        ensure!(beats.len() > 300 && consecutive(&beats), "of what was kept something is missing or twice: {beats:?}");

        let typist = attach(host, FLOOD, &["--say", "poweroff"])?;
        host.wait(&typist)?.success()?;
        host.wait_until("the guest to do what was typed", PATIENCE, |host| {
            Ok((operator::list(host)?.iter().all(|vm| vm["name"] != "flood")).then_some(()))
        })?;
        host.power_off()
    })
}

/// Somebody at a console.
pub fn attach(host: &mut Host, socket: &str, manner: &[&str]) -> Result<Process> {
    let program = format!("{SHARE}/lab-load");
    host.spawn(&[&[program.as_str(), "attach", "--socket", socket], manner].concat())
}

fn dropped_bytes(host: &mut Host, name: &str) -> Result<u64> {
    let status = operator::status(host, name)?;
    status["serial_dropped_bytes"]
        .as_u64()
        .with_context(|| format!("the status does not tell what was dropped: {status}"))
}

/// The numbers of a speaker's signs of life, but for a last line that is not whole: whoever detaches may do so in the midst of a number.
fn beats(text: &str, by: Speaker) -> Vec<u64> {
    let (text, _) = text.rsplit_once('\n').unwrap_or_default();
    let number = |line| match Line::parse(line)? {
        Line::Beat { n, speaker, .. } if speaker == by => Some(n),
        _ => None,
    };
    text.lines().filter_map(number).collect()
}

fn consecutive(numbers: &[u64]) -> bool {
    numbers.windows(2).all(|pair| matches!(pair, [one, next] if one + 1 == *next))
}
