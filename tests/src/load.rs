//! What runs inside a Linux guest while its host is replaced, and notices when something was lost: one program, `lab-load`, with a
//! subcommand for each kind of load. What they print is in the protocol of the serial port, so that the lab can follow it:
//!
//! ```text
//! LOAD start of=ticks hz=100
//! LOAD line n=1 of=ticks ticks=100        from time to time, `n` without a gap for each kind of load
//! LOAD pause n=1 of=ticks ms=5210         it made no progress for that long
//! DAMAGE ticks of=ticks …                 something was lost
//! ```
pub mod attach;
pub mod clocks;
pub mod pattern;
pub mod reader;
pub mod records;
pub mod report;
pub mod stream;
pub mod ticks;
pub mod together;
pub mod unflushed;
pub mod vsock;
pub mod work;

use anyhow::Result;
use clap::{ArgGroup, Args, Parser, Subcommand};
use report::{Pace, Report};
use std::io::stdout;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// A load for a guest that goes through a live update.
#[derive(Debug, Parser)]
#[command(name = "lab-load")]
struct Arguments {
    #[command(flatten)]
    rhythm: Rhythm,
    #[command(subcommand)]
    kind: Kind,
}

/// How often a load speaks.
#[derive(Args, Clone, Copy, Debug)]
struct Rhythm {
    /// Milliseconds from one sign of life to the next
    #[arg(long, default_value_t = 1000, global = true, value_name = "MS")]
    every: u64,
    /// No progress for so many milliseconds is a pause
    #[arg(long, default_value_t = 1000, global = true, value_name = "MS")]
    pause: u64,
}

/// The kinds of load.
#[derive(Clone, Debug, Subcommand)]
enum Kind {
    /// Append numbered records, flush each, and only then tell its number
    Records {
        /// Where they go
        #[arg(long)]
        file: PathBuf,
    },
    /// Check a file of records
    CheckRecords {
        /// Where they are
        #[arg(long)]
        file: PathBuf,
        /// The last number that was told
        #[arg(long)]
        told: u64,
    },
    /// Write and never flush, and read back past the guest's page cache
    Unflushed {
        /// A block device, or a file
        #[arg(long)]
        target: PathBuf,
        /// How much of it to write to, in MiB
        #[arg(long, default_value_t = 16)]
        mib: u64,
    },
    /// Read a file with direct I/O and check it
    Reader {
        /// The file, which is made if there is none
        #[arg(long)]
        file: PathBuf,
        /// Its size, in MiB
        #[arg(long, default_value_t = 16)]
        mib: u64,
    },
    /// Tell the clocks and the raw counter
    Clocks,
    /// Count the expirations of a timerfd
    Ticks {
        /// Expirations per second
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=1000))]
        hz: u64,
    },
    /// Calculate and move memory about, and check both
    Work {
        /// Threads
        #[arg(long, default_value_t = 2)]
        threads: u64,
        /// Memory of each, in MiB
        #[arg(long, default_value_t = 8)]
        mib: u64,
    },
    /// Send a stream to a peer and check what comes back
    Stream {
        /// Where `peer` listens
        #[arg(long)]
        peer: SocketAddr,
        /// At most so much in a second
        #[arg(long, default_value_t = 64, value_name = "KIB")]
        kib_per_second: u64,
    },
    /// The other end of `stream`
    Peer {
        /// Where to listen
        #[arg(long)]
        listen: SocketAddr,
    },
    /// Talk to an echo over vsock, and connect again when the connection is gone
    Vsock {
        /// Whom to talk to
        #[arg(long, default_value_t = vsock::HOST)]
        cid: u32,
        /// The port
        #[arg(long)]
        port: u32,
    },
    /// An echo for the host's `reach` to connect to
    Answer {
        /// The port
        #[arg(long)]
        port: u32,
    },
    /// On the host: connect to the guest's `answer`
    Reach {
        /// The UNIX socket of the guest's vsock
        #[arg(long)]
        socket: PathBuf,
        /// The guest's port
        #[arg(long)]
        port: u32,
        /// How much to send and get back
        #[arg(long, default_value_t = 1)]
        kib: u64,
        /// Then stay connected
        #[arg(long)]
        stay: bool,
    },
    /// The host's end of `vsock`
    Echo {
        /// The UNIX socket to listen on
        #[arg(long)]
        socket: PathBuf,
    },
    /// Attach to a guest's serial port, on its host
    #[command(group(ArgGroup::new("manner").args(["lines", "until", "say", "still"]).required(true)))]
    Attach {
        /// The UNIX socket
        #[arg(long)]
        socket: PathBuf,
        /// Tell what is heard until so many lines are whole
        #[arg(long)]
        lines: Option<u64>,
        /// Tell what is heard until a line with this in it is whole
        #[arg(long)]
        until: Option<String>,
        /// Say a line
        #[arg(long)]
        say: Option<String>,
        /// Neither read nor go away
        #[arg(long)]
        still: bool,
    },
    /// Several loads, each a process of its own
    Together {
        /// A load with its options, separated by commas; without any, the values of `lab.load=` on the kernel's command line
        loads: Vec<String>,
    },
}

/// Runs what the command line asks for.
pub fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // On the serial port an error that stops a load is damage, and is read as such.
            println!("DAMAGE load error={:?}", format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(Arguments { rhythm, kind }: Arguments) -> Result<()> {
    let pace = Pace { every: Duration::from_millis(rhythm.every), pause: Duration::from_millis(rhythm.pause) };
    let report = |of: &'static str| Report::new(of, pace, stdout());
    match kind {
        Kind::Records { file } => records::write(&file, &mut report("records")),
        Kind::CheckRecords { file, told } => {
            let found = records::check_file(&file, told)?;
            println!("records={} incomplete={}", found.whole, found.incomplete);
            Ok(())
        }
        Kind::Unflushed { target, mib } => unflushed::run(&target, mib << 20, &mut report("unflushed")),
        Kind::Reader { file, mib } => reader::run(&file, mib << 20, &mut report("reader")),
        Kind::Clocks => clocks::run(&mut report("clocks")),
        Kind::Ticks { hz } => ticks::run(hz, &mut report("ticks")),
        Kind::Work { threads, mib } => work::run(threads, mib << 20, &mut report("work")),
        Kind::Stream { peer, kib_per_second } => stream::run(peer, kib_per_second << 10, &mut report("stream")),
        Kind::Peer { listen } => stream::serve(TcpListener::bind(listen)?),
        Kind::Vsock { cid, port } => vsock::run(cid, port, &mut report("vsock")),
        Kind::Answer { port } => vsock::answer(port, &mut report("answer")),
        Kind::Reach { socket, port, kib, stay } => vsock::reach(&socket, port, kib, stay),
        Kind::Echo { socket } => vsock::echo(&socket),
        Kind::Attach { socket, lines, until, say, still: _ } => {
            let manner = lines.map(attach::Manner::Lines).or(until.map(attach::Manner::Until));
            let manner = manner.or(say.map(attach::Manner::Say)).unwrap_or(attach::Manner::Still);
            attach::run(&socket, &manner)
        }
        Kind::Together { loads } => together::run(&loads),
    }
}
