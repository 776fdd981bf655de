//! `cargo xtask fuzz`: libFuzzer against all that decodes what others have written, with a stable toolchain.
use crate::architecture::Architecture;
use crate::cargo::cargo;
use crate::{paths, run, setup};
use anyhow::{Context, Result, bail, ensure};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// How long each target runs in a full test.
pub const SECONDS: u32 = 60;

/// With which a program tells libFuzzer where an input leads, as `cargo fuzz` has them.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
     -Cllvm-args=-sanitizer-coverage-trace-compares";

/// What one input may have and take: bytes, memory, seconds.
const BOUNDS: [&str; 3] = ["-max_len=65536", "-rss_limit_mb=2048", "-timeout=10"];

/// The package with the targets, which is a workspace of its own.
pub fn manifest() -> PathBuf {
    package().join("Cargo.toml")
}

fn package() -> PathBuf {
    paths::workspace().join("tests/fuzz")
}

/// Where all of it goes that a run leaves.
fn folder() -> PathBuf {
    paths::target().join("fuzz")
}

/// Fuzzes the targets of these names, or all, one after the other. What leads somewhere new is kept for the next run, which also
/// begins with what a target has failed at.
pub fn all(chosen: &[String], seconds: u32) -> Result<()> {
    let known = targets()?;
    if let Some(unknown) = chosen.iter().find(|name| !known.contains(name)) {
        bail!("there is no fuzz target '{unknown}'; there are {}", known.join(", "));
    }
    setup::for_fuzzing()?;
    run::loudly(build("build")?.args(["--quiet", "--bins"]))?;
    let mut failed = 0;
    for name in if chosen.is_empty() { &known } else { chosen } {
        match one(name, seconds) {
            Ok(summary) => println!("{name}: {summary}"),
            Err(error) => {
                eprintln!("{name}: FAILED: {error:#}");
                failed += 1;
            }
        }
    }
    ensure!(failed == 0, "{failed} fuzz targets failed");
    Ok(())
}

/// Lints the targets.
pub fn lints() -> Result<()> {
    setup::for_fuzzing()?;
    run::loudly(build("clippy")?.args(["--quiet", "--", "-D", "warnings"]))
}

/// The names of all targets.
fn targets() -> Result<Vec<String>> {
    let folder = package().join("targets");
    let files = fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let name = |file: fs::DirEntry| file.path().file_stem().map(|name| name.to_string_lossy().into_owned());
    let mut names: Vec<String> = files.filter_map(|file| file.ok().and_then(name)).collect();
    names.sort();
    Ok(names)
}

/// `cargo` for the targets. Flags reach build scripts as well, unless a target is named.
fn build(subcommand: &str) -> Result<Command> {
    let mut command = cargo();
    command.args([subcommand, "--locked", "--release", "--target", Architecture::native()?.linux_target()]);
    command.arg("--manifest-path").arg(manifest());
    command.env("RUSTFLAGS", FLAGS).env_remove("CARGO_ENCODED_RUSTFLAGS").env("CARGO_TARGET_DIR", folder());
    Ok(command)
}

/// Fuzzes one target, and returns what libFuzzer says of the run.
fn one(name: &str, seconds: u32) -> Result<String> {
    let program = folder().join(Architecture::native()?.linux_target()).join("release").join(name);
    let log = folder().join(format!("{name}.log"));
    // New inputs go to the first of the folders.
    let [corpus, failures] = ["corpus", "failures"].map(|kind| folder().join(kind).join(name));
    for folder in [&corpus, &failures] {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    }
    let seeds = match name {
        "document" => paths::workspace().join("tests/golden"),
        _ => package().join("seeds").join(name),
    };
    let output = File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
    let mut command = Command::new(&program);
    command.args(BOUNDS).arg(format!("-max_total_time={seconds}"));
    command.arg(format!("-artifact_prefix={}/", failures.display()));
    command.args([&corpus, &failures]).args(Some(seeds).filter(|seeds| seeds.is_dir()));
    command.stdout(output.try_clone()?).stderr(output);
    let status = command.status().with_context(|| format!("cannot start {}", program.display()))?;
    let said = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    if !status.success() {
        bail!("{}", failure(&said, &program, &log));
    }
    summary(&said).with_context(|| format!("it did not come to an end: {}", log.display()))
}

/// `cov: 1234 ft: 5678 corp: 90/12Kb …`, from the last line that counts runs.
fn summary(said: &str) -> Option<String> {
    let (runs, found) = said.lines().rev().find_map(|line| line.strip_prefix('#')?.split_once("DONE"))?;
    Some(format!("{} runs, {}", runs.trim(), found.trim()))
}

/// What has gone wrong, and how to see it again.
fn failure(said: &str, program: &Path, log: &Path) -> String {
    let wrong = |line: &&str| line.contains("panicked at") || line.contains("ERROR: libFuzzer");
    let mut lines = said.lines().skip_while(|line| !wrong(line));
    let reason: Vec<&str> = lines.by_ref().take(2).collect();
    let input = lines.find_map(|line| line.split_once("Test unit written to ")).map_or("", |(_, file)| file);
    let (reason, program) = (reason.join(" "), program.display());
    format!("{reason}\n  to see it again: {program} {input}\n  all that was said: {}", log.display())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_end_of_a_run_is_told() {
        let said = "#2\tINITED cov: 3 ft: 3 corp: 1/1b\n#99\tDONE   cov: 7 ft: 8 corp: 2/9b exec/s: 3\nDone 99 runs";
        assert_eq!(summary(said).unwrap(), "99 runs, cov: 7 ft: 8 corp: 2/9b exec/s: 3");
        assert_eq!(summary("INFO: Seed: 1"), None);
    }

    #[test]
    fn a_failure_names_the_input_that_repeats_it() {
        let said = "#9\tNEW\nthread '<unnamed>' panicked at a.rs:1:2:\nno\n==1== ERROR: libFuzzer: deadly signal\n\
             artifact_prefix='/f/'; Test unit written to /f/crash-1\n";
        let told = failure(said, Path::new("/p"), Path::new("/l"));
        assert!(told.contains("a.rs:1:2: no") && told.contains("/p /f/crash-1"), "{told}");
    }

    /// Name and version of each package in a lock file.
    fn packages(lock: &Path) -> BTreeSet<(String, String)> {
        let text = fs::read_to_string(lock).unwrap();
        let value = |line: Option<&str>| line.unwrap().split('"').nth(1).unwrap().to_owned();
        let package = |text: &str| {
            let mut lines = text.lines().skip(1);
            (value(lines.next()), value(lines.next()))
        };
        text.split("\n\n").filter(|text| text.starts_with("[[package]]")).map(package).collect()
    }

    #[test]
    fn what_is_fuzzed_is_what_is_built() {
        let built = packages(&paths::workspace().join("Cargo.lock"));
        let names: BTreeSet<&String> = built.iter().map(|(name, _)| name).collect();
        let fuzzed = packages(&package().join("Cargo.lock"));
        let others: Vec<_> =
            fuzzed.iter().filter(|(name, _)| names.contains(name)).filter(|it| !built.contains(it)).collect();
        assert!(others.is_empty(), "`cargo update --manifest-path {}`: {others:?}", manifest().display());
    }
}
