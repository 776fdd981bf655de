//! A TCP stream between a guest and a peer outside the guest's host: it has to arrive whole, both ways, over one connection.
use super::pattern::{difference, fill};
use super::report::Report;
use anyhow::{Context, Result, bail, ensure};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{panic, thread};

/// What is sent at once: several frames' worth, which a network card may be left to cut up.
const CHUNK: usize = 8 << 10;
/// What may be on its way.
const WINDOW: u64 = 8 * CHUNK as u64;
/// Tells this stream from other bytes.
const SEED: u64 = 0x57e0;
/// How long to try to reach the peer: a guest's network takes a moment to come up.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long nothing may come back. Longer than any live update; TCP itself tries for about a quarter of an hour.
const SILENCE: Duration = Duration::from_secs(600);

/// Sends for ever, at most so many bytes in a second, and checks what the peer sends back.
pub fn run(peer: SocketAddr, per_second: u64, report: &mut Report<impl Write>) -> Result<()> {
    ensure!(per_second > 0, "a stream of no bytes is none");
    let stream = connect(peer)?;
    report.start(format_args!("peer={peer}"))?;
    exchange(&stream, per_second, u64::MAX, report).with_context(|| format!("the stream to {peer} is broken"))
}

fn connect(peer: SocketAddr) -> Result<TcpStream> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match TcpStream::connect_timeout(&peer, PATIENCE) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() > deadline => {
                return Err(error).with_context(|| format!("cannot reach {peer}"));
            }
            // There is no event to wait for: the network may be down on any of several machines.
            Err(_) => thread::sleep(Duration::from_secs(1)),
        }
    }
}

/// Sends `limit` bytes and takes as many back.
fn exchange(stream: &TcpStream, per_second: u64, limit: u64, report: &mut Report<impl Write>) -> Result<()> {
    stream.set_nodelay(true).context("cannot set up the connection")?;
    stream.set_read_timeout(Some(SILENCE)).context("cannot set up the connection")?;
    let (mut writer, mut reader) = (stream, stream);
    let (mut sent, mut received) = (0, 0);
    let mut chunk = [0; CHUNK];
    while received < limit {
        let begun = Instant::now();
        while sent < limit && sent - received < WINDOW {
            fill(SEED, sent, &mut chunk);
            writer.write_all(&chunk).with_context(|| format!("cannot send after {sent} bytes"))?;
            sent += CHUNK as u64;
        }
        reader.read_exact(&mut chunk).with_context(|| format!("nothing came back after {received} bytes"))?;
        if let Some(at) = difference(SEED, received, &chunk) {
            report.damage("stream", format_args!("offset={}", received + at as u64))?;
        }
        received += CHUNK as u64;
        report.progress(format_args!("received={received}"))?;
        let share = Duration::from_secs(CHUNK as u64) / u32::try_from(per_second).unwrap_or(u32::MAX);
        let rest = share.saturating_sub(begun.elapsed());
        report.rests(rest);
        thread::sleep(rest);
    }
    Ok(())
}

/// The other end, for ever: checks every stream that comes in, and sends it back.
pub fn serve(listener: TcpListener) -> Result<()> {
    loop {
        let (stream, from) = listener.accept().context("cannot take in a connection")?;
        thread::spawn(move || match answer(&stream, &AtomicU64::new(0)) {
            Ok(received) => println!("a stream of {received} bytes from {from} has ended"),
            Err(error) => println!("DAMAGE peer from={from} error={:?}", format!("{error:#}")),
        });
    }
}

/// The other end of one stream, until the sender has no more. Gives the number of bytes, and counts them as they arrive.
pub fn answer(mut stream: &TcpStream, count: &AtomicU64) -> Result<u64> {
    stream.set_nodelay(true).context("cannot set up the connection")?;
    let mut received = 0;
    let mut chunk = [0; CHUNK];
    loop {
        match stream.read_exact(&mut chunk) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(received),
            Err(error) => return Err(error).with_context(|| format!("broken after {received} bytes")),
        }
        if let Some(at) = difference(SEED, received, &chunk) {
            bail!("byte {} is not what was sent", received + at as u64);
        }
        received += CHUNK as u64;
        count.store(received, Ordering::Relaxed);
        stream.write_all(&chunk).with_context(|| format!("cannot send back after {received} bytes"))?;
    }
}

/// A peer for one stream, in this process.
#[derive(Debug)]
pub struct Peer {
    /// Where it listens.
    pub address: SocketAddr,
    received: Arc<AtomicU64>,
    thread: thread::JoinHandle<Result<u64>>,
}

impl Peer {
    /// Listens at a free port of an address.
    pub fn start(address: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(address).with_context(|| format!("cannot listen at {address}"))?;
        let address = listener.local_addr().context("cannot tell the port")?;
        let received = Arc::<AtomicU64>::default();
        let count = received.clone();
        let thread = thread::spawn(move || {
            let (stream, _) = listener.accept().context("cannot take in a connection")?;
            // One stream is all that there is to be: another connection is refused.
            drop(listener);
            answer(&stream, &count)
        });
        Ok(Self { address, received, thread })
    }

    /// How many bytes have arrived so far, all as they were sent.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Whether the stream has come to an end, good or bad.
    pub fn has_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits for the stream's end and gives the number of its bytes.
    pub fn finish(self) -> Result<u64> {
        self.thread.join().unwrap_or_else(|panic| panic::resume_unwind(panic))
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::ALWAYS;
    use super::*;

    const LOCAL: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

    #[test]
    fn a_stream_arrives_whole_both_ways() {
        let peer = Peer::start(LOCAL).expect("a peer");
        let mut said = Vec::new();
        let stream = connect(peer.address).expect("a connection");
        let limit = 4 * WINDOW;
        exchange(&stream, 1 << 30, limit, &mut Report::new("stream", ALWAYS, &mut said)).expect("an exchange");
        drop(stream);
        assert_eq!(peer.finish().expect("a whole stream"), limit);
        let said = String::from_utf8(said).expect("text");
        assert!(said.ends_with(&format!("of=stream received={limit}\n")), "{said}");
        assert!(!said.contains("DAMAGE"), "{said}");
    }

    #[test]
    fn a_byte_that_changed_on_its_way_is_noticed_at_the_other_end() {
        let peer = Peer::start(LOCAL).expect("a peer");
        let mut stream = connect(peer.address).expect("a connection");
        let mut chunk = [0; CHUNK];
        fill(SEED, 0, &mut chunk);
        chunk[7] ^= 1;
        stream.write_all(&chunk).expect("a chunk");
        let error = peer.finish().expect_err("damage");
        assert_eq!(error.to_string(), "byte 7 is not what was sent");
    }
}
