//! `vmm check`: whether a live update of this host could go ahead, a line per question, and what to do where it could not.

mod finding;
mod initrd;
pub mod machines;
pub mod next_kernel;
pub mod strays;
pub mod this_host;

use serde_json::json;

pub use finding::{Finding, Verdict};

use super::report;
use crate::cli::{CheckArgs, status};
use crate::control::socket::RunDir;

/// The questions' names.
pub const NAMES: [&str; 28] = [
    "counter",
    "device",
    "host",
    "huge-pages",
    "kexec",
    "kernel",
    "kho",
    "kho-version",
    "kvm",
    "last-update",
    "liveupdate",
    "lockdown",
    "luo-version",
    "memfd-noexec",
    "memfd-version",
    "memory",
    "next-cmdline",
    "next-config",
    "next-initrd",
    "next-kernel",
    "next-machine",
    "next-page-size",
    "scratch",
    "vm",
    "vm-cgroup",
    "vm-disk",
    "vm-seals",
    "vm-stray",
];

/// `vmm check`.
pub fn check(dir: &RunDir, arguments: &CheckArgs) -> anyhow::Result<u8> {
    let mut findings = this_host::check(dir);
    findings.extend(machines::check(dir, &[]));
    findings.extend(strays::check(dir));
    if let Some(next) = &arguments.next {
        findings.extend(next_kernel::check(next));
    }
    let ready = findings.iter().all(|finding| finding.verdict != Verdict::Failure);
    if arguments.json {
        report::print_json(&json!({"ready": ready, "checks": findings}));
    } else {
        findings.iter().for_each(|finding| report::print(&finding.to_string()));
        let failed = findings.iter().filter(|finding| finding.verdict == Verdict::Failure).count();
        report::print(&match failed {
            0 => "an update could go ahead".to_owned(),
            failed => format!("an update could not go ahead: {failed} of {} checks failed", findings.len()),
        });
    }
    Ok(if ready { status::DONE } else { status::FAILED })
}
