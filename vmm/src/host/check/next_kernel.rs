//! The next kernel, looked into before anybody boots it: whether it would understand what this one hands over.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::{Finding, Verdict, initrd};
use crate::cli::NextKernelArgs;
use crate::host::kcore::Kcore;
use crate::host::memory_shortage::FirstToGo;
use crate::host::{inspect, report};
use crate::kernel_image::{self, Architecture, Content, KernelImage};

/// What is handed over under each of these names has the layout that the version names, and the next kernel reads no other. Beside
/// them the versions that this program knows, in case the running kernel does not let itself be looked into.
const FORMATS: [(&str, &str, &str); 3] =
    [("kho-version", "kho", "kho-v4"), ("luo-version", "luo", "luo-v5"), ("memfd-version", "memfd", "memfd-v2")];

const SCRATCH: &str = "scratch";

/// Options without which the guests would be lost, or could not run.
const OPTIONS: [&str; 4] = ["KEXEC_HANDOVER", "LIVEUPDATE", "LIVEUPDATE_MEMFD", "KVM"];

/// All that its files tell.
pub fn check(next: &NextKernelArgs) -> Vec<Finding> {
    const CHECK: &str = "next-kernel";
    // A kernel and an initrd are read as a whole, unpacked: should memory not suffice, this process is to go and no guest.
    let _first = FirstToGo::new();
    let mut findings = match KernelImage::open(&next.kernel) {
        Ok(image) => {
            let Content { architecture, release, .. } = &image.content;
            let release = release.as_deref().unwrap_or("of an unknown version");
            let packed = image.compression.map_or_else(String::new, |packed| format!(", {}", packed.name()));
            let found = format!("Linux {release}, {} ({}{packed})", architecture.name(), image.form);
            let mut findings = vec![Finding::ok(CHECK, found)];
            findings.extend(content(&image.content, &running().unwrap_or_default()));
            findings.extend(scratch(image.memory, next.initrd.as_deref()));
            findings
        }
        Err(error) => {
            let why = anyhow::Error::from(error);
            let help = "give the image that the boot loader would load";
            vec![Finding::failure(CHECK, format!("{}: {why:#}", next.kernel.display()), help)]
        }
    };
    findings.push(command_line(next));
    // What cannot be loaded need not be read, which may take more memory than there is.
    let too_large = findings.iter().any(|finding| finding.check == SCRATCH && finding.verdict == Verdict::Failure);
    if let Some(path) = next.initrd.as_ref().filter(|_| !too_large) {
        findings.push(match kernel_image::read_file(path) {
            Ok(bytes) => initrd::check(&bytes),
            Err(error) => Finding::failure(
                "next-initrd",
                format!("cannot read {}: {error}", path.display()),
                "give one that is there",
            ),
        });
    }
    findings
}

/// What the running kernel speaks, read from its own memory.
fn running() -> Option<BTreeSet<String>> {
    let constants = Kcore::open().and_then(|memory| memory.constants());
    constants
        .map(|constants| kernel_image::formats(&constants))
        .inspect_err(|error| tracing::info!(%error, "cannot look into the kernel"))
        .ok()
}

/// The next kernel is loaded into scratch, and boots in it.
fn scratch(kernel: Option<u64>, initrd: Option<&Path>) -> Option<Finding> {
    let areas: Vec<u64> = inspect::scratch_areas().ok()?.iter().map(|area| area.end - area.start).collect();
    let (largest, all) = (areas.iter().copied().max()?, areas.iter().sum::<u64>());
    let initrd = initrd.and_then(|path| fs::metadata(path).ok()).map_or(0, |file| file.len());
    let kernel = kernel.unwrap_or_default();
    let text = [kernel, initrd, all, largest].map(report::bytes);
    let [kernel_text, initrd_text, all_text, largest_text] = &text;
    let found = format!(
        "the next kernel takes {kernel_text}, its initrd {initrd_text}; scratch has {all_text}, its largest area {largest_text}"
    );
    if kernel.max(initrd) <= largest && kernel.saturating_add(initrd) <= all {
        return Some(Finding::ok(SCRATCH, found));
    }
    Some(Finding::failure(SCRATCH, found, "boot this host with a larger kho_scratch=, or give a smaller initrd"))
}

fn content(content: &Content, running: &BTreeSet<String>) -> Vec<Finding> {
    let mut findings = vec![architecture(content.architecture), page_size(content.page_size)];
    findings.extend(FORMATS.map(|(check, format, known)| {
        let here: Vec<&str> = kernel_image::versions(running, format).collect();
        version(content, check, format, if here.is_empty() { vec![known] } else { here })
    }));
    findings.push(config(content));
    findings
}

fn architecture(found: Architecture) -> Finding {
    const CHECK: &str = "next-machine";
    let here = std::env::consts::ARCH;
    match found.name() == here {
        true => Finding::ok(CHECK, format!("it is for {here}, as this host is")),
        false => Finding::failure(
            CHECK,
            format!("it is for {}, and this host is {here}", found.name()),
            "take a kernel for this host's architecture",
        ),
    }
}

fn page_size(found: Option<u64>) -> Finding {
    const CHECK: &str = "next-page-size";
    let here = rustix::param::page_size() as u64;
    match found {
        Some(size) if size == here => Finding::ok(CHECK, format!("its pages have {size} bytes, as here")),
        Some(size) => Finding::failure(
            CHECK,
            format!("its pages have {size} bytes, here they have {here}: it could read nothing of what is handed over"),
            "take a kernel with pages of the same size",
        ),
        None => Finding::warning(CHECK, "its page size is not known", "take care that it is this kernel's"),
    }
}

fn version(content: &Content, check: &'static str, format: &'static str, here: Vec<&str>) -> Finding {
    let found: Vec<&str> = kernel_image::versions(&content.formats, format).collect();
    let wanted = here.join(", ");
    // One that speaks several may have written any of them.
    if here.iter().all(|version| found.contains(version)) {
        return Finding::ok(check, format!("it speaks {wanted}, as this kernel does"));
    }
    let says = match found.as_slice() {
        [] => format!("it does not speak {format} at all, and this kernel speaks {wanted}"),
        others => format!("it speaks {}, this kernel {wanted}", others.join(", ")),
    };
    Finding::failure(check, format!("{says}: all guests would be lost"), format!("take a kernel that speaks {wanted}"))
}

fn config(content: &Content) -> Finding {
    const CHECK: &str = "next-config";
    let Some(config) = &content.config else {
        let help = "what its texts tell was checked; CONFIG_IKCONFIG would let more be known";
        return Finding::warning(CHECK, "it does not carry its configuration", help);
    };
    let missing: Vec<&str> = OPTIONS.into_iter().filter(|option| !config.has(option)).collect();
    match missing.as_slice() {
        [] => Finding::ok(CHECK, format!("it has {}", OPTIONS.join(", "))),
        missing => Finding::failure(
            CHECK,
            format!(
                "it is built without {}",
                missing.iter().map(|option| format!("CONFIG_{option}")).collect::<Vec<_>>().join(", ")
            ),
            "take a kernel that has them",
        ),
    }
}

fn command_line(next: &NextKernelArgs) -> Finding {
    const CHECK: &str = "next-cmdline";
    let line = match (&next.append, next.reuse_cmdline) {
        (Some(line), _) => line.clone(),
        (None, true) => fs::read_to_string("/proc/cmdline").unwrap_or_default(),
        (None, false) => {
            let help = "--reuse-cmdline gives it that of the running kernel, --append one of its own";
            return Finding::failure(CHECK, "it has no command line", help);
        }
    };
    let missing: Vec<&str> = ["kho", "liveupdate"].into_iter().filter(|parameter| !is_on(&line, parameter)).collect();
    match missing.as_slice() {
        [] => Finding::ok(CHECK, "it will look for what is handed over"),
        missing => Finding::failure(
            CHECK,
            format!(
                "it lacks {}=on: what is handed over would not be looked for, and all guests be lost",
                missing.join("=on and ")
            ),
            "add kho=on liveupdate=on to --append",
        ),
    }
}

/// Whether a kernel parameter is switched on; the last mention counts, and none after `--` does.
pub fn is_on(command_line: &str, parameter: &str) -> bool {
    let words = command_line.split_whitespace().take_while(|word| *word != "--");
    let values = words.filter_map(|word| word.split_once('=')).filter(|(name, _)| *name == parameter);
    values.last().is_some_and(|(_, value)| matches!(value, "on" | "1" | "y" | "Y"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn parameter_counts_as_the_kernel_counts_it() {
        for line in ["kho=on", "quiet kho=on x=y", "kho=off kho=on", "kho=1"] {
            assert!(is_on(line, "kho"), "{line}");
        }
        for line in ["", "kho", "kho=off", "kho=on kho=off", "xkho=on", "kho=one", "-- kho=on"] {
            assert!(!is_on(line, "kho"), "{line}");
        }
    }

    fn speaks(formats: &[&str]) -> Content {
        Content {
            architecture: Architecture::X86_64,
            release: None,
            page_size: Some(4096),
            formats: formats.iter().map(ToString::to_string).collect::<BTreeSet<_>>(),
            config: None,
        }
    }

    #[test]
    fn another_version_of_any_format_is_refused() {
        let verdicts = |formats: &[&str]| {
            FORMATS.map(|(check, format, wanted)| version(&speaks(formats), check, format, vec![wanted]).verdict)
        };
        use Verdict::{Failure, Ok};
        assert_eq!(verdicts(&["kho-v4", "luo-v5", "memfd-v2"]), [Ok, Ok, Ok]);
        assert_eq!(verdicts(&["kho-v5", "luo-v5", "memfd-v2", "memfd-v3"]), [Failure, Ok, Ok]);
        assert_eq!(verdicts(&[]), [Failure, Failure, Failure]);
    }

    #[test]
    fn an_unknown_page_size_is_a_warning_and_another_a_failure() {
        assert_eq!(page_size(None).verdict, Verdict::Warning);
        assert_eq!(page_size(Some(12345)).verdict, Verdict::Failure);
        assert_eq!(page_size(Some(rustix::param::page_size() as u64)).verdict, Verdict::Ok);
    }
}
