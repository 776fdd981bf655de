//! `cargo xtask test`: everything that must hold, the fastest first; the test runner's summary comes last.
use crate::architecture::Architecture;
use crate::cargo::{Target, cargo};
use crate::debian::{self, Release};
use crate::fuzz;
use crate::outcomes::Outcomes;
use crate::products::{self, BUILT, ORACLE, Products};
use crate::setup::{self, tools};
use crate::{paths, run};
use anyhow::{Context, Result};
use std::process::Command;
use std::time::{Duration, Instant};

/// Tells the tests of a full run to take their larger numbers.
const FULL: &str = "KHO_VMM_FULL";

/// Whether this is a test of a full run.
pub fn is_full() -> bool {
    std::env::var_os(FULL).is_some()
}

/// The steps that were taken, with their times.
#[derive(Default)]
struct Steps {
    taken: Vec<(String, Duration)>,
}

impl Steps {
    fn take<T>(&mut self, name: impl Into<String>, step: impl FnOnce() -> Result<T>) -> Result<T> {
        let name = name.into();
        println!("== {name}");
        let start = Instant::now();
        let value = step().with_context(|| format!("step '{name}' failed"))?;
        self.taken.push((name, start.elapsed()));
        Ok(value)
    }

    fn show(&self) {
        println!("== times");
        for (name, time) in &self.taken {
            println!("{:>8.1} s  {name}", time.as_secs_f64());
        }
    }
}

/// Sets up the machine and checks everything, end to end for the given architectures; also what takes long, if the run is to be full.
pub fn all(architectures: &[Architecture], full: bool) -> Result<()> {
    let foreign: Vec<_> = architectures.iter().copied().filter(|architecture| !architecture.is_native()).collect();
    let mut steps = Steps::default();
    steps.take("set-up", || {
        architectures.iter().try_for_each(|&architecture| setup::run(architecture))?;
        tools::ensure_components()
    })?;
    steps.take("format", || {
        run::loudly(cargo().args(["fmt", "--all", "--check"]))?;
        run::loudly(cargo().args(["fmt", "--check", "--manifest-path"]).arg(fuzz::manifest()))
    })?;
    steps.take("lints", || {
        lints(architectures, &foreign)?;
        fuzz::lints()
    })?;
    steps.take("licences, sources, versions", deny)?;
    steps.take("documentation", || {
        document(cargo().arg("doc"))?;
        foreign.iter().try_for_each(|&architecture| document(&mut Target::Linux(architecture).cargo(&["doc"])?))
    })?;
    let mut outcomes = Outcomes::default();
    let runner = steps.take("test runner", || Ok(tools::ensure("nextest").is_ok()))?;
    for &architecture in architectures {
        let name = architecture.name();
        steps.take(format!("programs for the lab, {name}"), || programs(architecture))?;
        steps.take(format!("images of Debian, {name}"), || images(architecture, full))?;
    }
    for &architecture in &foreign {
        let emulator = architecture.user_emulator().0;
        steps.take(format!("unit and property tests under {emulator}"), || {
            foreign_tests(architecture, runner)?;
            if runner { outcomes.take(architecture) } else { Ok(()) }
        })?;
    }
    steps.take("tests, built", || run::loudly(cargo().args(["test", "--quiet", "--workspace", "--no-run"])))?;
    steps.take("examples in the documentation", || {
        run::loudly(cargo().args(["test", "--quiet", "--workspace", "--doc"]))
    })?;
    if full {
        steps.take(format!("fuzz targets, {} s each", fuzz::SECONDS), || fuzz::all(&[], fuzz::SECONDS))?;
    }
    steps.show();
    println!("== tests");
    let outcome = tests(architectures, full, runner, &["--workspace"], &[]);
    if runner {
        match tell_outcomes(outcomes, architectures, full) {
            // What is wrong with the tests says more.
            Err(error) if outcome.is_err() => eprintln!("what has become of them cannot be told: {error:#}"),
            told => told?,
        }
    }
    outcome
}

/// Writes the table of what must survive.
fn tell_outcomes(mut outcomes: Outcomes, architectures: &[Architecture], complete: bool) -> Result<()> {
    outcomes.take(Architecture::native()?)?;
    let path = outcomes.write(architectures, complete)?;
    println!("what must survive, and what has become of it: {}", path.display());
    Ok(())
}

/// Sets up the machine and runs the end-to-end tests whose names contain one of the filters.
pub fn end_to_end(architectures: &[Architecture], full: bool, filters: &[String]) -> Result<()> {
    for &architecture in architectures {
        setup::run(architecture)?;
        programs(architecture)?;
        images(architecture, full)?;
    }
    tests(architectures, full, tools::has("nextest"), &["--package", "tests", "--test", "e2e"], filters)
}

/// Everything that the end-to-end tests need.
fn programs(architecture: Architecture) -> Result<()> {
    Products::build(architecture)?;
    products::unit_tests(architecture)?;
    Ok(())
}

/// The images that the tests of this run boot.
fn images(architecture: Architecture, full: bool) -> Result<()> {
    let quick = |release| (architecture, release) == (Architecture::X86_64, Release::Trixie);
    for release in debian::releases().into_iter().filter(|&release| full || quick(release)) {
        setup::for_images(architecture)?;
        debian::image(architecture, release)?;
    }
    Ok(())
}

fn lints(architectures: &[Architecture], foreign: &[Architecture]) -> Result<()> {
    let deny = ["--", "-D", "warnings"];
    let clippy = ["clippy", "--quiet"];
    let everything = ["--workspace", "--all-targets"];
    run::loudly(cargo().args(clippy).args(everything).args(deny))?;
    for &architecture in foreign {
        run::loudly(Target::Linux(architecture).cargo(&clippy)?.args(everything).args(deny))?;
    }
    for &architecture in architectures {
        run::loudly(Target::BareMetal(architecture).cargo(&clippy)?.args(ORACLE).args(deny))?;
    }
    Ok(())
}

fn document(command: &mut Command) -> Result<()> {
    run::loudly(command.args(["--quiet", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-Dwarnings"))
}

fn deny() -> Result<()> {
    tools::ensure("deny")?;
    let what = ["bans", "licenses", "sources"];
    run::loudly(cargo().args(["deny", "--log-level", "warn", "check"]).args(what))?;
    let mut fuzzed = cargo();
    fuzzed.args(["deny", "--log-level", "warn", "--manifest-path"]).arg(fuzz::manifest());
    run::loudly(fuzzed.arg("--config").arg(paths::workspace().join("deny.toml")).arg("check").args(what))?;
    match run::quietly(cargo().args(["deny", "--log-level", "warn", "fetch", "db"])) {
        Ok(_) => {
            println!("checking advisories too");
            run::loudly(cargo().args(["deny", "--log-level", "warn", "check", "--disable-fetch", "advisories"]))
        }
        Err(_) => {
            println!("NOT checking advisories: their database cannot be fetched from here");
            Ok(())
        }
    }
}

/// The name of the option that selects the profile differs between the two.
fn runner(nextest: bool) -> (&'static [&'static str], &'static str) {
    if nextest {
        (&["nextest", "run", "--no-fail-fast"], "--cargo-profile")
    } else {
        println!("cargo-nextest is missing and cannot be installed, so `cargo test` runs the tests");
        (&["test", "--no-fail-fast"], "--profile")
    }
}

/// What needs no KVM, as programs of an architecture that is not this machine's.
fn foreign_tests(architecture: Architecture, nextest: bool) -> Result<()> {
    let (subcommand, profile) = runner(nextest);
    run::loudly(products::unit_testing(architecture, subcommand)?.args([profile, "lab"]))
}

fn tests(
    architectures: &[Architecture],
    full: bool,
    nextest: bool,
    selection: &[&str],
    filters: &[String],
) -> Result<()> {
    let mut command = cargo();
    command.args(runner(nextest).0).args(selection).arg("--").args(filters);
    // Each end-to-end test exists once per architecture, in a module of that name.
    for other in Architecture::ALL.iter().filter(|architecture| !architectures.contains(architecture)) {
        command.args(["--skip", &format!("::{}::", other.name())]);
    }
    if full {
        command.env(FULL, "yes");
    } else {
        command.args(["--skip", "::full::"]);
        println!("the tests in modules called `full` are left out: they take long, and run with `--full`");
        if architectures.len() > 1 {
            command.args(["--skip", "::second::"]);
            println!("the tests in modules called `second` are left out: they run on the other architecture");
        }
    }
    // An error says where it came from by itself; thirty frames of the runner would hide it.
    run::loudly(command.env(BUILT, "yes").env("RUST_LIB_BACKTRACE", "0"))
}
