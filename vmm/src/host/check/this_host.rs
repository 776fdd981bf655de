//! This host: its kernel, and what it lets us do.

use std::fs;
use std::io;

use super::Finding;
use crate::control::socket::RunDir;
use crate::handover::luo::{self, DEVICE};
use crate::host::inspect;
use crate::host::kept::KeptVm;
use crate::host::report;

/// What a file of the kernel's says.
type Check = fn(&str) -> Finding;

/// All that can be known.
pub fn check(dir: &RunDir) -> Vec<Finding> {
    let mut findings = settings();
    findings.extend([device(), last_update(dir)]);
    findings
}

/// What does not depend on what others do meanwhile.
pub fn settings() -> Vec<Finding> {
    let mut findings = vec![kvm(), kernel()];
    match read("/proc/cmdline") {
        Ok(line) => findings.extend(["kho", "liveupdate"].map(|parameter| parameter_is_on(&line, parameter))),
        Err(finding) => findings.push(finding),
    }
    let sysctls: [(&str, Check); 5] = [
        ("/proc/sys/kernel/kexec_load_disabled", kexec),
        ("/sys/kernel/security/lockdown", lockdown),
        ("/sys/kernel/mm/transparent_hugepage/shmem_enabled", huge_pages),
        ("/proc/sys/vm/memfd_noexec", noexec),
        ("/proc/cpuinfo", counter),
    ];
    // What is not there is not in the way: an older kernel, or one without that feature.
    let there = sysctls.into_iter().filter_map(|(path, check)| fs::read_to_string(path).ok().map(|text| check(&text)));
    findings.extend(there);
    findings
}

fn read(path: &'static str) -> Result<String, Finding> {
    fs::read_to_string(path)
        .map_err(|error| Finding::failure("host", format!("cannot read {path}: {error}"), "run vmm as root"))
}

fn kvm() -> Finding {
    match kvm_ioctls::Kvm::new() {
        Ok(kvm) => Finding::ok("kvm", format!("/dev/kvm, API version {}", kvm.get_api_version())),
        Err(error) => Finding::failure(
            "kvm",
            format!("cannot open /dev/kvm: {error}"),
            "load the module kvm_intel or kvm_amd, and run vmm as root",
        ),
    }
}

fn kernel() -> Finding {
    let name = rustix::system::uname();
    let release = name.release().to_string_lossy().into_owned();
    Finding::ok("kernel", format!("Linux {release}, {}", name.machine().to_string_lossy()))
}

fn parameter_is_on(line: &str, parameter: &'static str) -> Finding {
    if super::next_kernel::is_on(line, parameter) {
        return Finding::ok(parameter, format!("{parameter}=on on the kernel's command line"));
    }
    let help = format!("boot this host with {parameter}=on");
    Finding::failure(parameter, format!("{parameter}=on is not on the kernel's command line"), help)
}

/// Whether `/dev/liveupdate` can be had; it has one user at a time.
fn device() -> Finding {
    const CHECK: &str = "device";
    match fs::File::options().read(true).write(true).open(DEVICE) {
        Ok(_) => Finding::ok(CHECK, format!("{DEVICE} is free")),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            let by =
                luo::holder().map_or_else(|| "another process".to_owned(), |(pid, name)| format!("{name} ({pid})"));
            let help = "it is needed for moments only: look who holds it for longer, and why";
            Finding::failure(CHECK, format!("{DEVICE} is in use by {by}"), help)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Finding::failure(
            CHECK,
            format!("there is no {DEVICE}"),
            "the kernel needs CONFIG_LIVEUPDATE (7.1 or newer), and kho=on liveupdate=on",
        ),
        Err(error) => {
            Finding::failure(CHECK, format!("cannot open {DEVICE}: {error}"), "run vmm as root; `dmesg` tells more")
        }
    }
}

fn kexec(text: &str) -> Finding {
    const CHECK: &str = "kexec";
    match text.trim() {
        "0" => Finding::ok(CHECK, "kexec is allowed"),
        _ => Finding::failure(
            CHECK,
            "kernel.kexec_load_disabled is set",
            "it cannot be taken back before the next boot; whoever sets it has to leave it",
        ),
    }
}

/// The mode in force is the one in brackets.
fn bracketed(text: &str) -> &str {
    text.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map_or(text.trim(), |(mode, _)| mode)
}

fn lockdown(text: &str) -> Finding {
    const CHECK: &str = "lockdown";
    match bracketed(text) {
        "none" => Finding::ok(CHECK, "the kernel is not locked down"),
        mode => Finding::warning(
            CHECK,
            format!("the kernel is locked down ({mode}): it takes only a signed next kernel, and shows no memory"),
            "sign the next kernel; `vmm inspect --host` and the proof need lockdown=none",
        ),
    }
}

fn huge_pages(text: &str) -> Finding {
    const CHECK: &str = "huge-pages";
    match bracketed(text) {
        mode @ ("advise" | "always" | "within_size" | "force") => {
            Finding::ok(CHECK, format!("shmem may use pages of 2 MiB ({mode})"))
        }
        mode => Finding::warning(
            CHECK,
            format!(
                "shmem does not use pages of 2 MiB ({mode}): guests' memory takes many times as long to be handed over"
            ),
            "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled, before guests are started",
        ),
    }
}

fn noexec(text: &str) -> Finding {
    const CHECK: &str = "memfd-noexec";
    match text.trim() {
        "0" => Finding::ok(CHECK, "memfds are not forced to be noexec"),
        value => Finding::failure(
            CHECK,
            format!("vm.memfd_noexec is {value}: guests' memory could not be mapped again after an update"),
            "sysctl vm.memfd_noexec=0, and start guests anew",
        ),
    }
}

/// aarch64's counter is always one that goes on; on x86_64 the processor says so.
fn counter(text: &str) -> Finding {
    const CHECK: &str = "counter";
    let flags = text.lines().find(|line| line.starts_with("flags"));
    match flags.map(|line| line.split_whitespace().any(|flag| flag == "nonstop_tsc")) {
        None => Finding::ok(CHECK, "the counter goes on through a kexec"),
        Some(true) => Finding::ok(CHECK, "the TSC goes on through a kexec"),
        Some(false) => Finding::warning(
            CHECK,
            "the processor does not say that its TSC never stops: the pause may be reckoned wrong",
            "compare the guests' clocks after an update",
        ),
    }
}

fn last_update(dir: &RunDir) -> Finding {
    const CHECK: &str = "last-update";
    let kept = KeptVm::all(dir);
    // To ask LUO for what waits would be to take it.
    if kept.is_empty() && inspect::was_handed_something() && !dir.supervisor_log().exists() {
        let found = "this kernel was started by a live update, and nobody has looked yet for VMs to restore";
        let help = "`vmm restore --all`; an update would begin with it where there are any, and go no further";
        return Finding::warning(CHECK, found, help);
    }
    if kept.is_empty() {
        return Finding::ok(CHECK, "no VM of the last update waits or is kept");
    }
    let memory = kept.iter().map(|vm| vm.memory).sum();
    let names: Vec<&str> = kept.iter().map(|vm| vm.name.as_str()).collect();
    Finding::failure(
        CHECK,
        format!("{} of the last update kept, {} of memory", names.join(", "), report::bytes(memory)),
        "`vmm list` tells the reasons; a further update would lose that memory",
    )
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn settings_are_read_as_the_kernel_writes_them() {
        use Verdict::{Failure, Ok, Warning};
        let cases: [(Check, &str, Verdict); 11] = [
            (kexec, "0\n", Ok),
            (kexec, "1\n", Failure),
            (lockdown, "[none] integrity confidentiality\n", Ok),
            (lockdown, "none [integrity] confidentiality\n", Warning),
            (huge_pages, "always within_size [advise] never deny force\n", Ok),
            (huge_pages, "always within_size advise [never] deny force\n", Warning),
            (noexec, "0\n", Ok),
            (noexec, "2\n", Failure),
            (counter, "processor\t: 0\nflags\t\t: fpu nonstop_tsc sse\n", Ok),
            (counter, "processor\t: 0\nflags\t\t: fpu sse\n", Warning),
            (counter, "processor\t: 0\nFeatures\t: fp asimd\n", Ok),
        ];
        for (check, text, verdict) in cases {
            assert_eq!(check(text).verdict, verdict, "{text}");
        }
    }

    #[test]
    fn a_finding_that_is_not_well_says_what_to_do() {
        let text = parameter_is_on("quiet", "kho").to_string();
        assert_eq!(
            text,
            "NOT OK   kho              kho=on is not on the kernel's command line\n                         → boot this host with kho=on"
        );
    }
}
