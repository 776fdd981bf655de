//! What an operator asks for when he gives a VM sockets to its host.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use kho_abi::document::virtio::VsockV1;

/// A UNIX socket's path has so many bytes at most: `sun_path` without its NUL.
const SOCKET_PATH_MAX: usize = 107;

/// `_` and the longest port's number.
const SUFFIX_MAX: usize = 11;

/// A vsock device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockConfig {
    /// The guest's number.
    pub cid: u32,
    /// The UNIX socket at which programs of the host ask for connections to the guest. The guest's own go to sockets with a port
    /// behind this path.
    pub socket: PathBuf,
}

impl VsockConfig {
    /// The UNIX socket that a port of the host stands for.
    pub fn socket_of(&self, port: u32) -> PathBuf {
        let mut path = self.socket.clone().into_os_string();
        path.push(format!("_{port}"));
        path.into()
    }
}

/// A vsock option that is none.
#[derive(Debug, thiserror::Error)]
#[error("'{text}' is no vsock: {reason}; expected cid=N,socket=PATH")]
pub struct VsockConfigError {
    text: String,
    reason: &'static str,
}

impl FromStr for VsockConfig {
    type Err = VsockConfigError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refuse = |reason| VsockConfigError { text: text.to_owned(), reason };
        let (mut cid, mut socket) = (None, None);
        for word in text.split(',') {
            match word.split_once('=') {
                Some(("cid", number)) if cid.is_none() => {
                    let valid = number
                        .parse()
                        .ok()
                        .filter(|cid| (VsockV1::CID_MIN..=VsockV1::CID_MAX).contains(cid) && !number.starts_with('+'));
                    cid = Some(valid.ok_or_else(|| refuse("a cid is a number from 3 to 4294967294"))?);
                }
                Some(("socket", path)) if socket.is_none() => {
                    // The process that goes on with the VM under the next kernel is started elsewhere.
                    if !path.starts_with('/') || path.ends_with('/') || path.contains('\0') {
                        return Err(refuse("the socket's path is to be given in full, from the root on"));
                    }
                    if path.len() > SOCKET_PATH_MAX - SUFFIX_MAX {
                        return Err(refuse("the socket's path has more than 96 bytes, too many for one with a port"));
                    }
                    socket = Some(path.into());
                }
                _ => return Err(refuse("it has a word that is unknown or there twice (a path cannot have a comma)")),
            }
        }
        let cid = cid.ok_or_else(|| refuse("there is no cid"))?;
        Ok(Self { cid, socket: socket.ok_or_else(|| refuse("there is no socket"))? })
    }
}

impl fmt::Display for VsockConfig {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cid, socket } = self;
        write!(out, "cid={cid},socket={}", socket.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vsock_option_round_trips() {
        let long = format!("cid=4294967294,socket=/{}", "x".repeat(95));
        for text in ["cid=3,socket=/run/vsock", "cid=52,socket=/a=b c", long.as_str()] {
            assert_eq!(text.parse::<VsockConfig>().unwrap().to_string(), text);
        }
        let any_order: VsockConfig = "socket=/s,cid=9".parse().unwrap();
        assert_eq!(any_order.to_string(), "cid=9,socket=/s");
        assert_eq!(any_order.socket_of(u32::MAX).to_str(), Some("/s_4294967295"));
    }

    #[test]
    fn vsock_option_with_unknown_repeated_or_impossible_words_is_refused() {
        for text in [
            "",
            "cid=3",
            "socket=/s",
            "cid=3,socket=",
            "cid=3,socket=s",
            "cid=3,socket=/s/",
            "cid=3,socket=/s\0",
            "cid=3,cid=3,socket=/s",
            "cid=3,socket=/s,socket=/s",
            "cid=3,socket=/s,",
            "cid=3,socket=/s,b",
            "cid=,socket=/s",
            "cid=2,socket=/s",
            "cid=+3,socket=/s",
            "cid=-3,socket=/s",
            "cid=4294967295,socket=/s",
            "cid=4294967296,socket=/s",
        ] {
            assert!(text.parse::<VsockConfig>().is_err(), "{text}");
        }
        assert!(format!("cid=3,socket=/{}", "x".repeat(96)).parse::<VsockConfig>().is_err());
    }
}
