//! VMs that nobody can ask: their sockets are not in the run folder. They would end with this kernel, and no update would notice.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;

use clap::Parser;

use super::Finding;
use crate::cli::{Cli, Command};
use crate::control::socket::RunDir;

/// Looks for them among all processes.
pub fn check(dir: &RunDir) -> Vec<Finding> {
    let served = |name: &String| {
        let socket = UnixStream::connect(dir.socket(name)).ok()?;
        let peer = rustix::net::sockopt::socket_peercred(&socket).ok()?;
        u32::try_from(peer.pid.as_raw_nonzero().get()).ok()
    };
    let known: BTreeSet<u32> = dir.names("sock").iter().filter_map(served).collect();
    let stray = |pid: &u32| !known.contains(pid) && is_vm(*pid);
    processes().into_iter().filter(stray).map(finding).collect()
}

fn processes() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

fn is_vm(pid: u32) -> bool {
    let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
    read("comm").trim_ascii_end() == b"vmm" && runs_a_vm(&read("cmdline"))
}

/// Whether that is `vmm run`.
fn runs_a_vm(command_line: &[u8]) -> bool {
    // Each word has a NUL behind it.
    let words = command_line.strip_suffix(&[0]).unwrap_or_default().split(|byte| *byte == 0);
    Cli::try_parse_from(words.map(OsStr::from_bytes)).is_ok_and(|cli| matches!(cli.command, Command::Run(_)))
}

fn finding(pid: u32) -> Finding {
    Finding::failure(
        "vm-stray",
        format!(
            "process {pid} is a VM that cannot be asked: its socket is not in the run folder. It would end with this kernel"
        ),
        format!("let its guest power off, or end it (kill {pid}); --force vm-stray leaves it behind"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_runs_a_vm_is_one() {
        assert!(runs_a_vm(b"vmm\0--log\0info\0run\0--name\0a\0--kernel\0k\0--append\0\0"));
        assert!(runs_a_vm(b"/usr/bin/vmm\0--log=warn\0--log-format=text\0run\0--restore\x005\0"));
        for other in [&b"vmm\0list\0"[..], b"vmm\0restore\0--all\0", b"vmm\0", b"", b"vmm\0status\0run\0"] {
            assert!(!runs_a_vm(other), "{}", String::from_utf8_lossy(other));
        }
    }
}
