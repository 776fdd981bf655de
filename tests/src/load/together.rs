//! Several loads at once, each a process of its own. None of them may end.
use anyhow::{Context, Result, bail};
use std::process::{Child, Command};

/// On a guest's kernel command line: a load with its options, separated by commas.
pub const PARAMETER: &str = "lab.load";

/// The loads that a kernel's command line asks for.
fn asked(command_line: &str) -> Vec<String> {
    let value = |word: &str| word.strip_prefix(PARAMETER)?.strip_prefix('=').map(String::from);
    command_line.split_ascii_whitespace().filter_map(value).collect()
}

/// Runs them until one of them ends, which is an error.
pub fn run(loads: &[String]) -> Result<()> {
    let command_line;
    let loads = if loads.is_empty() {
        command_line = std::fs::read_to_string("/proc/cmdline").context("cannot read the kernel's command line")?;
        asked(&command_line)
    } else {
        loads.to_vec()
    };
    let program = std::env::current_exe().context("cannot tell which program this is")?;
    let start = |load: &String| {
        let child = Command::new(&program).args(load.split(',')).spawn();
        Ok((child.with_context(|| format!("cannot start the load {load}"))?, load.clone()))
    };
    let children = loads.iter().map(start).collect::<Result<Vec<(Child, String)>>>()?;
    if children.is_empty() {
        return Ok(());
    }
    let (pid, status) = rustix::process::wait(rustix::process::WaitOptions::empty())
        .context("cannot wait for a load")?
        .context("there is no load to wait for")?;
    let ended = children.iter().find(|(child, _)| child.id().cast_signed() == pid.as_raw_nonzero().get());
    bail!("the load {:?} has ended: {status:?}", ended.map(|(_, load)| load));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_are_found_on_a_command_line() {
        let line = "console=ttyS0 lab.load=ticks,--hz,50 quiet lab.loads=x lab.load=records,--file,/data/records";
        assert_eq!(asked(line), ["ticks,--hz,50", "records,--file,/data/records"]);
        assert!(asked("console=ttyS0").is_empty());
    }
}
