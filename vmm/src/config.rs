//! What an operator asks for: the values behind `vmm run`, checked before anything is created.

pub mod block;
pub mod device;
pub mod net;
pub mod vsock;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use self::device::{DEVICES_MAX, DeviceConfig};

/// RAM is handed to the guest and to the next kernel in pieces of this size, so it must be a multiple of it.
pub const MEMORY_GRANULE: u64 = 2 << 20;

/// The smallest guest: room for a small kernel and for what it is told at boot.
pub const MEMORY_MINIMUM: u64 = 8 << 20;

/// The largest guest: one memfd of 4 KiB folios stays under 1 TiB (a limit of the kernel's memfd handover).
pub const MEMORY_MAXIMUM: u64 = (1 << 40) - MEMORY_GRANULE;

/// The most vCPUs of a guest.
pub const CPUS_MAXIMUM: u32 = 64;

/// A VM to be started from nothing.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// Name, unique on the host.
    pub name: String,
    /// Kernel image of a format that the architecture boots.
    pub kernel: PathBuf,
    /// Initial RAM file system.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line, handed over as it is.
    pub append: String,
    /// Number of vCPUs.
    pub cpus: u32,
    /// RAM in bytes.
    pub memory: u64,
    /// Where the first serial port leads.
    pub serial: SerialConfig,
    /// The virtio devices, by slot.
    pub devices: Vec<DeviceConfig>,
}

/// Where a serial port leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialConfig {
    /// The process's standard input and output.
    Stdio,
    /// Output is appended to a file; there is no input.
    File(PathBuf),
    /// A UNIX stream socket to which one client at a time can connect: the newest. What the guest says while there is none is kept
    /// for the next, up to a limit.
    Socket(PathBuf),
    /// Nowhere.
    Off,
}

/// A serial option that is none.
#[derive(Debug, thiserror::Error)]
#[error("'{0}' is no serial port: expected stdio, file=PATH, socket=PATH or off")]
pub struct SerialConfigError(String);

impl FromStr for SerialConfig {
    type Err = SerialConfigError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('=') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "off" => Ok(Self::Off),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("socket", path)) if !path.is_empty() => Ok(Self::Socket(path.into())),
            _ => Err(SerialConfigError(text.to_owned())),
        }
    }
}

impl fmt::Display for SerialConfig {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdio => write!(out, "stdio"),
            Self::File(path) => write!(out, "file={}", path.display()),
            Self::Socket(path) => write!(out, "socket={}", path.display()),
            Self::Off => write!(out, "off"),
        }
    }
}

/// A machine's shape: all that must be equal before and after a live update, and nothing of how it was booted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineConfig {
    /// Name of the VM.
    pub name: String,
    /// Number of vCPUs.
    pub cpus: u32,
    /// RAM in bytes.
    pub memory: u64,
    /// Where the first serial port leads.
    pub serial: SerialConfig,
    /// The virtio devices, by slot.
    pub devices: Vec<DeviceConfig>,
}

/// A machine's shape that cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Too many or too few vCPUs.
    #[error("{0} vCPUs asked for: a guest can have from 1 to {CPUS_MAXIMUM}")]
    Cpus(u32),
    /// RAM of an odd size.
    #[error("memory of {0} bytes is not a multiple of 2 MiB: use a size such as 512M or 2G")]
    MemoryGranule(u64),
    /// RAM too small or too large.
    #[error("memory of {0} bytes is outside of what a guest can have: from 8 MiB to just under 1 TiB")]
    MemorySize(u64),
    /// More devices than there are places for.
    #[error("{0} devices asked for: a guest has places for {DEVICES_MAX}")]
    Devices(usize),
    /// More balloons than one.
    #[error("{0} balloons asked for: a guest has one")]
    Balloons(usize),
}

impl MachineConfig {
    /// Checks what can be checked without creating anything.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !(1..=CPUS_MAXIMUM).contains(&self.cpus) {
            return Err(ConfigError::Cpus(self.cpus));
        }
        if !self.memory.is_multiple_of(MEMORY_GRANULE) {
            return Err(ConfigError::MemoryGranule(self.memory));
        }
        if !(MEMORY_MINIMUM..=MEMORY_MAXIMUM).contains(&self.memory) {
            return Err(ConfigError::MemorySize(self.memory));
        }
        if self.devices.len() > DEVICES_MAX {
            return Err(ConfigError::Devices(self.devices.len()));
        }
        let balloons = self.devices.iter().filter(|device| **device == DeviceConfig::Balloon).count();
        if balloons > 1 {
            return Err(ConfigError::Balloons(balloons));
        }
        Ok(())
    }
}

impl From<&VmConfig> for MachineConfig {
    fn from(config: &VmConfig) -> Self {
        let VmConfig { name, kernel: _, initrd: _, append: _, cpus, memory, serial, devices } = config;
        Self {
            name: name.clone(),
            cpus: *cpus,
            memory: *memory,
            serial: serial.clone(),
            devices: settled(name, devices),
        }
    }
}

/// The devices, and nothing left open: what is chosen for the operator is chosen when the VM is first started.
fn settled(name: &str, devices: &[DeviceConfig]) -> Vec<DeviceConfig> {
    // Networks are counted by themselves: another disk must not change their addresses.
    let mut networks = 0..;
    let settled = devices.iter().map(|device| match device {
        DeviceConfig::Net(net) => DeviceConfig::Net(net.with_address(name, networks.next().unwrap_or_default())),
        other => other.clone(),
    });
    settled.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serial_option_round_trips_and_refuses_others() {
        for text in ["stdio", "file=/a b", "socket=/run/x=y", "off"] {
            assert_eq!(text.parse::<SerialConfig>().unwrap().to_string(), text);
        }
        for text in ["", "file", "file=", "socket=", "pty", "off=1"] {
            assert!(text.parse::<SerialConfig>().is_err(), "{text}");
        }
    }

    #[test]
    fn networks_without_an_address_get_one_that_other_devices_do_not_change() {
        let devices = |words: &[&str]| {
            let devices = words.iter().map(|words| words.parse().unwrap()).collect::<Vec<_>>();
            settled("web", &devices).iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        let alone = devices(&["net:tap=a", "net:tap=b,mac=02:00:00:00:00:01", "net:tap=c"]);
        assert_eq!(alone[1], "net:tap=b,mac=02:00:00:00:00:01");
        assert_eq!(alone[0], format!("net:tap=a,mac={}", net::MacAddress::derived("web", 0)));
        assert_eq!(alone[2], format!("net:tap=c,mac={}", net::MacAddress::derived("web", 2)));
        let among = devices(&["rng", "net:tap=a", "net:tap=b,mac=02:00:00:00:00:01", "block:/x", "net:tap=c"]);
        assert_eq!([&among[1], &among[2], &among[4]], [&alone[0], &alone[1], &alone[2]]);
    }

    #[test]
    fn machine_of_impossible_shape_is_refused() {
        let good = MachineConfig {
            name: "a".into(),
            cpus: 1,
            memory: 64 << 20,
            serial: SerialConfig::Off,
            devices: vec![DeviceConfig::Rng; DEVICES_MAX],
        };
        assert!(good.validate().is_ok());
        assert!(MachineConfig { cpus: CPUS_MAXIMUM, ..good.clone() }.validate().is_ok());
        for cpus in [0, CPUS_MAXIMUM + 1, u32::MAX] {
            let refused = MachineConfig { cpus, ..good.clone() }.validate();
            assert!(matches!(refused, Err(ConfigError::Cpus(found)) if found == cpus), "{cpus}");
        }
        for memory in [0, 4096, (64 << 20) + 4096, 1 << 40, !(MEMORY_GRANULE - 1)] {
            assert!(MachineConfig { memory, ..good.clone() }.validate().is_err(), "{memory}");
        }
        let devices = vec![DeviceConfig::Rng; DEVICES_MAX + 1];
        assert!(matches!(MachineConfig { devices, ..good.clone() }.validate(), Err(ConfigError::Devices(_))));
        let devices = vec![DeviceConfig::Balloon; 2];
        assert!(matches!(MachineConfig { devices, ..good }.validate(), Err(ConfigError::Balloons(2))));
    }
}
