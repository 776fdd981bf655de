//! `vmm`: starts, updates, restores and shows virtual machines.

mod arch;
mod bus;
mod cli;
mod clock;
mod config;
mod control;
mod device;
mod elf;
mod fault;
mod handover;
mod host;
mod kernel_image;
mod machine;
mod memory;
mod persist;
mod registers;
mod vcpu;
mod vm;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use tracing::level_filters::LevelFilter;

use crate::cli::{Cli, Command, LogArgs, LogFormat, LogLevel, status};
use crate::control::client::ClientError;
use crate::control::keeper::KeeperClientError;
use crate::control::socket::{RunDir, SocketError};
use crate::handover::luo::LuoError;
use crate::host::kexec::KexecError;
use crate::host::restore::SupervisorError;
use crate::host::update::check::CheckError;

fn main() -> ExitCode {
    // First of all: a restore dates the end of the kernel's boot with it, where init has not noted that itself.
    let started = arch::counter();
    let cli = Cli::parse();
    log(cli.log);
    // A VM or a supervisor is started through /proc/self/exe, and would be called "exe".
    if let Err(error) = rustix::thread::set_name(c"vmm") {
        tracing::debug!(%error, "cannot set the name of the process");
    }
    match run(cli.command, cli.log, started) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            explain(&error);
            ExitCode::from(status::FAILED)
        }
    }
}

fn run(command: Command, log: LogArgs, started: u64) -> anyhow::Result<u8> {
    fault::check_syntax()?;
    let dir = RunDir::from_environment();
    match command {
        Command::Run(arguments) => host::run::run(&dir, *arguments),
        Command::Update(arguments) => host::update::update(&dir, &arguments, started),
        Command::Restore(arguments) => host::restore::restore(&dir, &arguments, log, started),
        Command::List(arguments) => host::verbs::list(&dir, arguments.json),
        Command::Status(arguments) => host::verbs::status(&dir, &arguments.name, arguments.json),
        Command::Check(arguments) => host::check::check(&dir, &arguments),
        Command::Inspect(arguments) => host::inspect::inspect(&arguments),
        Command::Pause(arguments) => host::verbs::pause(&dir, &arguments.name),
        Command::Resume(arguments) => host::verbs::resume(&dir, &arguments.name),
        Command::Stop(arguments) => host::verbs::stop(&dir, &arguments.name),
        Command::Rescue(arguments) => host::rescue::rescue(&dir, &arguments),
        Command::Discard(arguments) => host::verbs::discard(&dir, &arguments.name),
        Command::Faults => {
            host::report::print_json(&fault::to_json());
            Ok(status::DONE)
        }
        Command::Balloon(arguments) => host::verbs::balloon(&dir, &arguments.name, arguments.size),
    }
}

/// Tells what failed and why, once, and what can be done about it.
fn explain(error: &anyhow::Error) {
    // Not eprintln, which panics when nobody listens any more.
    let mut stderr = std::io::stderr().lock();
    let told = writeln!(stderr, "vmm: {error:#}").and_then(|()| match help(error) {
        Some(help) => writeln!(stderr, "help: {help}"),
        None => Ok(()),
    });
    if let Err(error) = told {
        tracing::debug!(%error, "nobody reads the standard error stream");
    }
}

/// What can be done about an error, as the module that found it knows.
pub fn help(error: &anyhow::Error) -> Option<String> {
    error.chain().find_map(|cause| {
        None.or_else(|| cause.downcast_ref::<CheckError>()?.help())
            .or_else(|| cause.downcast_ref::<SocketError>()?.help())
            .or_else(|| cause.downcast_ref::<ClientError>()?.help())
            .or_else(|| cause.downcast_ref::<KeeperClientError>()?.help())
            .or_else(|| cause.downcast_ref::<LuoError>()?.help())
            .or_else(|| cause.downcast_ref::<KexecError>()?.help())
            .or_else(|| cause.downcast_ref::<SupervisorError>()?.help())
    })
}

fn log(arguments: LogArgs) {
    let level = match arguments.level {
        LogLevel::Off => LevelFilter::OFF,
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    let builder = tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).with_target(false);
    match arguments.format {
        LogFormat::Text => builder.with_ansi(false).init(),
        LogFormat::Json => builder.json().init(),
    }
}
