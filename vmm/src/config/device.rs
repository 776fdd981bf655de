//! Which virtio devices a machine has, in words: `KIND`, or `KIND:` and the words of the kind's own option.

use std::fmt;
use std::str::FromStr;

use super::block::{BlockConfig, BlockConfigError};
use super::net::{NetConfig, NetConfigError};
use super::vsock::{VsockConfig, VsockConfigError};

/// So many devices have a place in the guest's address space and an interrupt.
pub const DEVICES_MAX: usize = 16;

/// A virtio device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceConfig {
    /// An entropy source.
    Rng,
    /// A disk.
    Block(BlockConfig),
    /// A network.
    Net(NetConfig),
    /// A balloon.
    Balloon,
    /// Sockets between the guest and its host.
    Vsock(VsockConfig),
}

/// A device that is none.
#[derive(Debug, thiserror::Error)]
pub enum DeviceConfigError {
    /// This version does not know its kind.
    #[error("'{0}' is no device that this version knows")]
    Kind(String),
    /// A disk that is none.
    #[error("a device cannot be understood")]
    Block(#[from] BlockConfigError),
    /// A network that is none.
    #[error("a device cannot be understood")]
    Net(#[from] NetConfigError),
    /// A vsock device that is none.
    #[error("a device cannot be understood")]
    Vsock(#[from] VsockConfigError),
}

impl FromStr for DeviceConfig {
    type Err = DeviceConfigError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            None if text == "rng" => Ok(Self::Rng),
            None if text == "balloon" => Ok(Self::Balloon),
            Some(("block", words)) => Ok(Self::Block(words.parse()?)),
            Some(("net", words)) => Ok(Self::Net(words.parse()?)),
            Some(("vsock", words)) => Ok(Self::Vsock(words.parse()?)),
            _ => Err(DeviceConfigError::Kind(text.to_owned())),
        }
    }
}

impl fmt::Display for DeviceConfig {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rng => write!(out, "rng"),
            Self::Block(config) => write!(out, "block:{config}"),
            Self::Net(config) => write!(out, "net:{config}"),
            Self::Balloon => write!(out, "balloon"),
            Self::Vsock(config) => write!(out, "vsock:{config}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_round_trips_and_an_unknown_one_is_refused() {
        for text in
            ["rng", "block:/a:b.img,readonly", "net:tap=a,mac=02:00:00:00:00:01", "balloon", "vsock:cid=3,socket=/a:b"]
        {
            assert_eq!(text.parse::<DeviceConfig>().unwrap().to_string(), text);
        }
        for text in ["", "rng:", "block", "block:", "net", "net:", "vsock", "vsock:", "gpu:/a", "Rng", "balloon:"] {
            assert!(text.parse::<DeviceConfig>().is_err(), "{text}");
        }
    }
}
