//! What differs between the architectures, as a table: adding one means filling in its row.
use anyhow::{Result, anyhow, bail};
use clap::ValueEnum;

/// Names the accelerator that the end-to-end tests use, instead of the best.
pub const ACCELERATOR: &str = "KHO_VMM_LAB_ACCEL";

/// An architecture the lab can build for and emulate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Architecture {
    /// AMD64, with SVM emulated by QEMU.
    #[value(name = "x86_64")]
    X86_64,
    /// ARMv8 and later, with EL2 and a GICv3 emulated by QEMU.
    #[value(name = "aarch64")]
    Aarch64,
}

impl Architecture {
    /// Every architecture there is a row for.
    pub const ALL: &[Self] = &[Self::X86_64, Self::Aarch64];

    /// The architecture of this machine.
    pub fn native() -> Result<Self> {
        match Self::ALL.iter().find(|architecture| architecture.is_native()) {
            Some(&architecture) => Ok(architecture),
            None => bail!("the lab does not know this machine's architecture, {}", std::env::consts::ARCH),
        }
    }

    /// Whether this machine runs its programs by itself.
    pub fn is_native(self) -> bool {
        self.name() == std::env::consts::ARCH
    }

    /// As `uname -m` says it.
    pub fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// As Debian says it.
    pub fn debian(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::Aarch64 => "arm64",
        }
    }

    /// Rust target of programs that run in the lab's host.
    pub fn linux_target(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-unknown-linux-gnu",
            Self::Aarch64 => "aarch64-unknown-linux-gnu",
        }
    }

    /// Rust target of the oracle guest.
    pub fn bare_metal_target(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-unknown-none",
            // A kernel that looks after the registers for SIMD itself must not be compiled to use them.
            Self::Aarch64 => "aarch64-unknown-none-softfloat",
        }
    }

    /// What builds its programs on another machine: the C compiler, then the library; with the Debian packages that bring them.
    pub fn cross_tools(self) -> [(&'static str, &'static str); 2] {
        match self {
            Self::X86_64 => [
                ("x86_64-linux-gnu-gcc", "gcc-x86-64-linux-gnu"),
                ("/usr/x86_64-linux-gnu/lib/libc.a", "libc6-dev-amd64-cross"),
            ],
            Self::Aarch64 => [
                ("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu"),
                ("/usr/aarch64-linux-gnu/lib/libc.a", "libc6-dev-arm64-cross"),
            ],
        }
    }

    /// What runs its programs on another machine, and the Debian package that brings it.
    pub fn user_emulator(self) -> (&'static str, &'static str) {
        match self {
            Self::X86_64 => ("qemu-x86_64", "qemu-user"),
            Self::Aarch64 => ("qemu-aarch64", "qemu-user"),
        }
    }

    /// The emulator and the Debian package that brings it.
    pub fn qemu(self) -> (&'static str, &'static str) {
        match self {
            Self::X86_64 => ("qemu-system-x86_64", "qemu-system-x86"),
            Self::Aarch64 => ("qemu-system-aarch64", "qemu-system-arm"),
        }
    }

    /// QEMU's arguments for the machine and its processor under the given accelerator.
    ///
    /// The aarch64 host has no ITS of its own: after a kexec it would go on writing into the tables of the last kernel, which
    /// only firmware (by EFI's memory reservations) can keep the next one from using, and the lab has none. Guests have one all
    /// the same, as KVM's needs no other.
    pub fn machine(self, accelerator: Accelerator) -> &'static [&'static str] {
        match (self, accelerator) {
            (Self::X86_64, Accelerator::Tcg) => &["-accel", "tcg", "-cpu", "max"],
            (Self::X86_64, Accelerator::Kvm) => &["-accel", "kvm", "-cpu", "host"],
            (Self::Aarch64, Accelerator::Tcg) => {
                &["-accel", "tcg", "-machine", "virt,virtualization=on,gic-version=3,its=off", "-cpu", "max"]
            }
            (Self::Aarch64, Accelerator::Kvm) => {
                &["-accel", "kvm", "-machine", "virt,virtualization=on,gic-version=3,its=off", "-cpu", "host"]
            }
        }
    }

    /// The host's processors.
    ///
    /// One on emulated x86_64: with two, about one start of a guest in 300 ends in a triple fault, of the guest or of the whole
    /// host, as QEMU (10.0.2 and 10.0.13) then fetches the host's next instruction behind a VMEXIT through the wrong page tables.
    /// With one it was not seen in 800 starts.
    pub fn host_cpus(self, accelerator: Accelerator) -> u32 {
        match (self, accelerator) {
            (Self::X86_64, Accelerator::Tcg) => 1,
            (Self::X86_64, Accelerator::Kvm) | (Self::Aarch64, _) => 2,
        }
    }

    /// The host's console, as its kernel calls it.
    pub fn console(self) -> &'static str {
        match self {
            Self::X86_64 => "ttyS0",
            Self::Aarch64 => "ttyAMA0",
        }
    }

    /// What the host's kernel must be told besides. `counter_khz` is the frequency of this machine's counter.
    pub fn host_parameters(self, accelerator: Accelerator, counter_khz: u64) -> String {
        match (self, accelerator) {
            // The emulated TSC is the build machine's own and good, but the timers that the kernel would measure it against, and
            // compare it with later, stand still whenever the emulator waits for a processor. So the kernel is told the frequency,
            // as a real machine's processor tells it. A TSC that is taken for unstable makes KVM adjust those of guests.
            (Self::X86_64, Accelerator::Tcg) => format!("tsc=reliable tsc_early_khz={counter_khz}"),
            (Self::X86_64, Accelerator::Kvm) => "tsc=reliable".to_owned(),
            // QEMU (10.0.2 and 10.0.13) does not subtract CNTPOFF_EL2 from a guest's physical counter where it emulates no EL3, and
            // the kernel's KVM relies on it. A guest whose physical timer comes then does nothing but exit, until the host's counter
            // has gone as far again as it had when the guest was made. Without FEAT_ECV KVM emulates that timer, and is right.
            (Self::Aarch64, Accelerator::Tcg) => "id_aa64mmfr0.ecv=0".to_owned(),
            (Self::Aarch64, Accelerator::Kvm) => String::new(),
        }
    }

    /// What a Linux guest must be told: its console, not to reserve memory for a handover of its own, and to bear pauses that an
    /// emulated host on a busy machine takes: on aarch64 nobody can tell it of them, and its RCU would complain after 21 s.
    pub fn guest_command_line(self) -> &'static str {
        match self {
            Self::X86_64 | Self::Aarch64 => "console=ttyS0 quiet panic=-1 kho=off rcupdate.rcu_cpu_stall_timeout=120",
        }
    }

    /// KVM modules whose `nested` parameter tells whether KVM guests may run KVM guests.
    pub fn nested_parameters(self) -> &'static [&'static str] {
        match self {
            Self::X86_64 => &["/sys/module/kvm_intel/parameters/nested", "/sys/module/kvm_amd/parameters/nested"],
            // `kvm-arm.mode=nested` can be asked for at boot, but no parameter tells whether it was granted.
            Self::Aarch64 => &[],
        }
    }
}

/// What runs the lab's host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Accelerator {
    /// QEMU's software emulation: works everywhere, slowly.
    Tcg,
    /// KVM with nested virtualization.
    Kvm,
}

impl Accelerator {
    /// The one that the environment asks for, else the best.
    pub fn selected(architecture: Architecture) -> Result<Self> {
        let Some(value) = std::env::var_os(ACCELERATOR) else { return Ok(Self::detect(architecture)) };
        let value = value.to_string_lossy();
        Self::from_str(&value, false).map_err(|_| anyhow!("'{value}' is not a value of {ACCELERATOR}"))
    }

    /// As QEMU calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcg => "tcg",
            Self::Kvm => "kvm",
        }
    }

    /// KVM where this machine offers nested virtualization of `architecture`, else software emulation.
    pub fn detect(architecture: Architecture) -> Self {
        let usable = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
        let nested = architecture
            .nested_parameters()
            .iter()
            .filter_map(|path| std::fs::read_to_string(path).ok())
            .any(|value| matches!(value.trim(), "Y" | "1"));
        if architecture.is_native() && usable && nested { Self::Kvm } else { Self::Tcg }
    }
}
