//! PID 1 of the lab's host. It mounts what programs expect, starts what the build machine asks for, reaps every orphan and
//! never ends by itself: whatever goes wrong is said on the port or on the console.
pub mod kexec;
mod mounts;
mod network;
mod port;
mod processes;
pub mod session;
pub mod terminal;

use crate::arch::counter;
use crate::link::{Answer, Ask, Hello, RESTORE, RESTORE_OPTIONS, Request, SHARE, Say, TAPS};
use crate::moment::Moment;
use anyhow::{Context, Result};
use kvm_ioctls::{Kvm, VmFd};
use processes::Processes;
use rustix::time::{ClockId, clock_gettime};
use std::io::{BufRead, BufReader, Write};
use std::sync::{Arc, Mutex};
use std::{fs, thread};

/// The moment PID 1 began, by both clocks: together with a later moment they give the counter's frequency.
#[derive(Clone, Copy)]
struct Beginning {
    counter: u64,
    seconds: f64,
}

impl Beginning {
    fn now() -> Self {
        let time = clock_gettime(ClockId::MonotonicRaw);
        Self { counter: counter(), seconds: time.tv_sec as f64 + time.tv_nsec as f64 / 1e9 }
    }

    fn frequency_hz(self) -> f64 {
        let now = Self::now();
        (now.counter - self.counter) as f64 / (now.seconds - self.seconds)
    }
}

/// Never returns.
pub fn main() -> ! {
    let beginning = Beginning::now();
    std::panic::set_hook(Box::new(|panic| console(&format!("lab-init: {panic}"))));
    if let Err(error) = serve(beginning) {
        console(&format!("lab-init: {error:#}"));
    }
    // An ending PID 1 would take the kernel with it and hide the reason; the build machine ends the emulator.
    loop {
        thread::park();
    }
}

fn console(text: &str) {
    if let Ok(mut console) = fs::OpenOptions::new().write(true).open("/dev/console") {
        // There is nobody left to tell when even this fails.
        let _ = writeln!(console, "{text}");
    }
}

fn serve(beginning: Beginning) -> Result<()> {
    mounts::all()?;
    let command_line = read("/proc/cmdline")?;
    // SAFETY: no other thread exists yet, so nobody reads the environment meanwhile.
    unsafe { std::env::set_var("KHO_VMM_INIT_COUNTER", beginning.counter.to_string()) };
    // SAFETY: as above.
    unsafe { std::env::set_var("PATH", "/bin:/sbin:/usr/bin") };
    let values =
        |name| command_line.split_whitespace().filter_map(move |word| word.strip_prefix(name)?.strip_prefix('='));
    if let Some(taps) = values(TAPS).next_back() {
        network::set_up(taps.split(',').filter(|tap| !tap.is_empty()))?;
    }
    // Before any other VM, be it one that is restored.
    let _vm = hold_vm()?;
    let processes = Processes::new();
    // Before the port is even looked for: every millisecond here is a millisecond in which guests stand still.
    let options = values(RESTORE_OPTIONS).next().unwrap_or_default();
    let restore =
        values(RESTORE).next().map(|output| processes.spawn(&restore_command(options), &[], output)).transpose()?;
    let port = port::open()?;
    let mut reader = BufReader::new(port.try_clone().context("cannot duplicate the port")?);
    let writer = Arc::new(Mutex::new(port));
    say(
        &writer,
        &Say::Hello(Hello {
            release: read("/proc/sys/kernel/osrelease")?,
            init_counter: beginning.counter,
            command_line,
            restore,
        }),
    )?;
    processes.report_exits({
        let writer = writer.clone();
        move |exit| say(&writer, &exit)
    });
    let mut line = String::new();
    loop {
        line.clear();
        if reader.read_line(&mut line).context("cannot read the port")? == 0 {
            anyhow::bail!("the build machine has gone");
        }
        // Sent for the interrupt that it comes with.
        if line.trim().is_empty() {
            continue;
        }
        let Request { id, ask } = serde_json::from_str(&line).with_context(|| format!("not a request: {line}"))?;
        let answer = answer(&processes, &writer, beginning, id, ask)
            .unwrap_or_else(|error| Answer::Failed { reason: format!("{error:#}") });
        say(&writer, &Say::Reply { id, answer })?;
    }
}

/// A VM without vCPUs, held for as long as the host lives.
///
/// With its first VM KVM turns a static key of the scheduler on, and off with its last. QEMU's TCG (10.0.2), with a thread for each
/// of the host's processors, now and then goes on running the old translation of code that another processor has just changed: after
/// some 4,000 such changes, twice, a scheduler no longer told KVM that a vCPU's thread left its processor, and that vCPU was lost.
/// While a VM kept the key as it was, 9,000 starts and ends of others did no harm.
fn hold_vm() -> Result<Option<VmFd>> {
    if thread::available_parallelism()?.get() < 2 {
        return Ok(None);
    }
    let kvm = match Kvm::new() {
        Err(error) if error.errno() == libc::ENOENT => return Ok(None),
        kvm => kvm.context("cannot open /dev/kvm")?,
    };
    Ok(Some(kvm.create_vm().context("cannot make a VM")?))
}

fn restore_command(options: &str) -> Vec<String> {
    let options = options.split(',').filter(|option| !option.is_empty());
    ["vmm", "restore", "--all", "--json"].into_iter().chain(options).map(String::from).collect()
}

fn answer(processes: &Processes, writer: &Mutex<fs::File>, beginning: Beginning, id: u64, ask: Ask) -> Result<Answer> {
    Ok(match ask {
        Ask::Spawn { argv, env, output } => Answer::Started { pid: processes.spawn(&argv, &env, &output)? },
        Ask::Signal { pid, signal } => {
            processes::signal(pid, signal)?;
            Answer::Done
        }
        Ask::Kexec { kernel, initrd, command_line } => {
            kexec::load(&kernel, &initrd, &command_line)?;
            // Said before the call, as nothing can be said after it; the counter is read last so that it times the kexec alone.
            let announce = |counter| say(writer, &Say::Reply { id, answer: Answer::Rebooting { counter } });
            announce(counter())?;
            kexec::commit()?;
            unreachable!("the reboot call returned without an error")
        }
        Ask::Read { path } => Answer::Content {
            content: String::from_utf8_lossy(&fs::read(&path).with_context(|| format!("cannot read {path}"))?)
                .into_owned(),
        },
        Ask::Write { path, content } => {
            fs::write(&path, content).with_context(|| format!("cannot write {path}"))?;
            Answer::Done
        }
        Ask::Counter => Answer::Counter { moment: Moment::now(), frequency_hz: beginning.frequency_hz() },
        Ask::PowerOff => {
            rustix::system::reboot(rustix::system::RebootCommand::PowerOff).context("cannot power off")?;
            Answer::Done
        }
    })
}

fn say(writer: &Mutex<fs::File>, say: &Say) -> Result<()> {
    // A leading newline ends whatever an earlier kernel may have left half said.
    let mut line = String::from("\n");
    line.push_str(&serde_json::to_string(say).context("cannot encode what to say")?);
    line.push('\n');
    let mut port = writer.lock().map_err(|_| anyhow::anyhow!("another thread died while it wrote to the port"))?;
    port.write_all(line.as_bytes()).context("cannot write to the port")
}

fn read(path: &str) -> Result<String> {
    Ok(fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?.trim().to_owned())
}

/// Where a program's output goes.
fn share(name: &str) -> String {
    format!("{SHARE}/{name}")
}
