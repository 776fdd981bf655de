//! The host's end of a network device: a tap.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::net::{AddressFamily, SocketType, netdevice};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::ioctl_iow_nr;

use super::HEADER;
use crate::device::virtio::VirtioError;

// include/uapi/linux/if_tun.h
const TUN: libc::c_uint = b'T' as libc::c_uint;
ioctl_iow_nr!(TUNSETIFF, TUN, 202, libc::c_int);
ioctl_iow_nr!(TUNSETOFFLOAD, TUN, 208, libc::c_uint);
ioctl_iow_nr!(TUNSETVNETHDRSZ, TUN, 216, libc::c_int);

/// Whether an interface was not brought up. Where it cannot be told, it is taken for up.
fn is_down(name: &str) -> bool {
    let flags = std::fs::read_to_string(format!("/sys/class/net/{name}/flags")).unwrap_or_default();
    let flags = flags.trim().strip_prefix("0x").and_then(|digits| libc::c_int::from_str_radix(digits, 16).ok());
    flags.is_some_and(|flags| flags & libc::IFF_UP == 0)
}

/// A tap. Nobody else can have it open.
#[derive(Debug)]
pub struct Tap {
    file: File,
    /// In the operator's words.
    pub name: String,
}

impl Tap {
    /// Opens one that exists.
    pub fn open(name: &str) -> Result<Self, VirtioError> {
        let device = super::called(name);
        let failed = |operation: &str| {
            let (device, operation) = (device.clone(), operation.to_owned());
            move |source: io::Error| VirtioError::System { device, operation, source }
        };
        let unfit = |reason: String| VirtioError::Unfit { device: device.clone(), reason };

        // Asked for a name that it does not know, the kernel would make a tap that leads nowhere and is gone with us.
        let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::DGRAM, None)
            .map_err(|error| failed("look for the tap")(error.into()))?;
        if netdevice::name_to_index(&socket, name).is_err() {
            return Err(unfit(format!(
                "there is no such tap on this host; make it with 'ip tuntap add dev {name} mode tap', then \
                 'ip link set {name} up', and plug it into a bridge with 'ip link set {name} master BRIDGE'"
            )));
        }
        if is_down(name) {
            // It may be brought up at any time.
            tracing::warn!(
                tap = name,
                "the tap is down, so that nothing passes it: bring it up with 'ip link set {name} up'"
            );
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(failed("open /dev/net/tun"))?;

        // SAFETY: all zeroes is an `ifreq`: it has numbers, bytes and pointers that are not followed.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        // SAFETY: the kernel reads and writes one `ifreq`.
        if unsafe { ioctl_with_mut_ref(&file, TUNSETIFF(), &mut request) } < 0 {
            let error = io::Error::last_os_error();
            return Err(match error.raw_os_error() {
                Some(libc::EBUSY) => {
                    unfit("somebody else uses this tap, perhaps another VM; give each its own".to_owned())
                }
                Some(libc::EINVAL) => unfit(
                    "this is no tap, or one of several queues; make one with 'ip tuntap add dev NAME mode tap'"
                        .to_owned(),
                ),
                _ => failed("take hold of the tap (it needs its owner, or CAP_NET_ADMIN)")(error),
            });
        }
        let size = HEADER as libc::c_int;
        // SAFETY: the kernel reads one integer.
        if unsafe { ioctl_with_ref(&file, TUNSETVNETHDRSZ(), &size) } < 0 {
            return Err(failed("have frames with headers as virtio wants them")(io::Error::last_os_error()));
        }
        Ok(Self { file, name: name.to_owned() })
    }

    /// Says what frames that are read from it may still lack.
    pub fn set_offloads(&self, offloads: libc::c_uint) -> io::Result<()> {
        // SAFETY: the argument is a number, and no address.
        match unsafe { ioctl_with_val(&self.file, TUNSETOFFLOAD(), offloads.into()) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// A frame with its header, if there is one.
    pub fn read(&self, frame: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(frame)
    }

    /// Sends a frame with its header.
    pub fn write(&self, frame: &[u8]) -> io::Result<()> {
        (&self.file).write(frame).map(drop)
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

#[cfg(test)]
impl Tap {
    /// Something that keeps frames apart as a tap does.
    pub fn mock() -> (Self, std::os::unix::net::UnixDatagram) {
        let (ours, theirs) = std::os::unix::net::UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let file = File::from(std::os::fd::OwnedFd::from(ours));
        (Self { file, name: "mock".to_owned() }, theirs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tap_that_does_not_exist_is_refused_with_how_to_make_it() {
        let error = Tap::open("khonone0").unwrap_err().to_string();
        assert!(error.contains("tap=khonone0") && error.contains("ip tuntap add dev khonone0 mode tap"), "{error}");
    }

    #[test]
    fn interface_that_is_no_tap_is_refused() {
        // Where /dev/net/tun can be opened.
        let error = Tap::open("lo").unwrap_err();
        assert!(!error.to_string().contains("there is no such tap"), "{error}");
    }
}
