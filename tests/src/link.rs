//! What the build machine and the lab's PID 1 say to each other, one JSON value per line over a virtio-serial port.
use crate::moment::Moment;
use serde::{Deserialize, Serialize};

/// The port's name, as both ends know it.
pub const PORT: &str = "kho-vmm.lab";
/// The 9p tag of the folder both ends share.
pub const SHARE_TAG: &str = "share";
/// Where the host mounts that folder.
pub const SHARE: &str = "/share";
/// On the kernel's command line: PID 1 starts `vmm restore --all --json` before it does anything else.
/// The value is the folder in the share that receives its output.
pub const RESTORE: &str = "kho_vmm.restore";
/// On the kernel's command line: PID 1 sets up the host's network before that, with taps of these names, separated by commas. Of
/// several words the last one counts.
pub const TAPS: &str = "kho_vmm.taps";
/// On the kernel's command line: further options of that `vmm restore`, separated by commas.
pub const RESTORE_OPTIONS: &str = "kho_vmm.restore_options";

/// Asked by the build machine. Each is answered by one `Say::Reply` with the same number.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the asker.
    pub id: u64,
    /// What is asked.
    #[serde(flatten)]
    pub ask: Ask,
}

/// What the build machine can ask for.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case")]
pub enum Ask {
    /// Start a program.
    Spawn {
        /// The program and its arguments.
        argv: Vec<String>,
        /// Added to PID 1's environment.
        env: Vec<(String, String)>,
        /// Standard output and standard error go to this file name in the share, with `.out` and `.err` added.
        output: String,
    },
    /// Send a signal to a program started before (or to any process of the host).
    Signal {
        /// Process id.
        pid: i32,
        /// Signal number.
        signal: i32,
    },
    /// Replace the kernel by another, without any handover of VMs.
    Kexec {
        /// Kernel image, a path in the host.
        kernel: String,
        /// Its initramfs.
        initrd: String,
        /// Its command line.
        command_line: String,
    },
    /// Read a small text file of the host.
    Read {
        /// Its path.
        path: String,
    },
    /// Write a small text file of the host.
    Write {
        /// Its path.
        path: String,
        /// Its new content.
        content: String,
    },
    /// The raw counter and the clocks, and the counter's frequency as measured since PID 1 began.
    Counter,
    /// End the host.
    PowerOff,
}

/// Said by PID 1.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "kebab-case")]
pub enum Say {
    /// First words after each boot.
    Hello(Hello),
    /// The answer to a request.
    Reply {
        /// The request's number.
        id: u64,
        /// What came of it.
        #[serde(flatten)]
        answer: Answer,
    },
    /// A program started by PID 1 has ended.
    Exit {
        /// Process id.
        pid: i32,
        /// Its exit status, when it ended by itself.
        code: Option<i32>,
        /// The signal that ended it.
        signal: Option<i32>,
    },
}

/// Who speaks, since when.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// The kernel's release.
    pub release: String,
    /// The raw counter when PID 1 began.
    pub init_counter: u64,
    /// The kernel's command line.
    pub command_line: String,
    /// Process id of the `vmm restore` that PID 1 started by itself.
    pub restore: Option<i32>,
}

/// The answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// Done, nothing to tell.
    Done,
    /// The program runs.
    Started {
        /// Process id.
        pid: i32,
    },
    /// The file's content.
    Content {
        /// As text; what is not UTF-8 is replaced.
        content: String,
    },
    /// The counter.
    Counter {
        /// The counter and the clocks.
        moment: Moment,
        /// Ticks of the counter per second.
        frequency_hz: f64,
    },
    /// The image is loaded; this line is the old kernel's last.
    Rebooting {
        /// Raw counter just before the reboot call.
        counter: u64,
    },
    /// It did not work.
    Failed {
        /// Why.
        reason: String,
    },
}
