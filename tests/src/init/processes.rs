//! Programs that PID 1 starts, and the reaping of everything that is orphaned to it.
use super::{console, share};
use crate::link::Say;
use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process, wait};
use std::collections::HashSet;
use std::fs::File;
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

/// The programs that were started and have not been reported as ended.
pub struct Processes {
    started: Arc<(Mutex<HashSet<i32>>, Condvar)>,
}

impl Processes {
    pub fn new() -> Self {
        Self { started: Arc::default() }
    }

    /// Starts a program with its output going to the share, and returns its process id.
    pub fn spawn(&self, argv: &[String], env: &[(String, String)], output: &str) -> Result<i32> {
        let (program, arguments) = argv.split_first().context("no program is named")?;
        let file = |stream| {
            let path = share(&format!("{output}.{stream}"));
            File::create(&path).with_context(|| format!("cannot create {path}"))
        };
        let mut command = Command::new(program);
        command.args(arguments).envs(env.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(file("out")?).stderr(file("err")?);
        let (started, changed) = &*self.started;
        // Locked until the id is in the set: a program that ends at once must not be reaped as a stranger's orphan.
        let mut started = started.lock().map_err(|_| anyhow::anyhow!("the reaper died"))?;
        let child = command.spawn().with_context(|| format!("cannot start {program}"))?;
        let pid = child.id().cast_signed();
        started.insert(pid);
        changed.notify_all();
        Ok(pid)
    }

    /// From now on reaps whatever ends, and hands the ends of started programs to `report`.
    pub fn report_exits(&self, report: impl Fn(Say) -> Result<()> + Send + 'static) {
        let started = self.started.clone();
        thread::spawn(move || {
            loop {
                match wait(WaitOptions::empty()) {
                    Ok(Some((pid, status))) => {
                        let pid = pid.as_raw_nonzero().get();
                        let known = started.0.lock().is_ok_and(|mut started| started.remove(&pid));
                        if known && let Err(error) = report(exit(pid, status)) {
                            console(&format!("lab-init: {error:#}"));
                        }
                    }
                    // No child at all: nothing can be orphaned to PID 1 before it has started another program.
                    Err(rustix::io::Errno::CHILD) => {
                        let Ok(guard) = started.0.lock() else { return };
                        let _unused = started.1.wait_while(guard, |started| started.is_empty());
                    }
                    Ok(None) | Err(_) => {}
                }
            }
        });
    }
}

fn exit(pid: i32, status: WaitStatus) -> Say {
    Say::Exit { pid, code: status.exit_status(), signal: status.terminating_signal() }
}

/// Sends a signal.
pub fn signal(pid: i32, number: i32) -> Result<()> {
    let target = Pid::from_raw(pid).context("zero is no process")?;
    let signal = Signal::from_named_raw(number).with_context(|| format!("{number} is no signal"))?;
    kill_process(target, signal).with_context(|| format!("cannot signal process {pid}"))
}
