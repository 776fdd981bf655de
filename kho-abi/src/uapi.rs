//! `/dev/liveupdate` as user space sees it: the numbers and structs of the kernel's `include/uapi/linux/liveupdate.h`.
//!
//! Every request is `_IO(0xBA, number)`, whatever its direction and size; every struct begins with its own size, so
//! that either side may grow it. [`Default`] fills that size in, sets descriptors to -1 and all else to zero.

/// `LIVEUPDATE_IOCTL_TYPE`.
pub const IOCTL_TYPE: u8 = 0xBA;
/// `LIVEUPDATE_SESSION_NAME_LENGTH`: the room for a session's name with its terminating NUL.
pub const SESSION_NAME_LENGTH: usize = 64;

/// `LIVEUPDATE_IOCTL_CREATE_SESSION`, on the device, with [`CreateSession`].
pub const CREATE_SESSION: u32 = request(0x00);
/// `LIVEUPDATE_IOCTL_RETRIEVE_SESSION`, on the device, with [`RetrieveSession`].
pub const RETRIEVE_SESSION: u32 = request(0x01);
/// `LIVEUPDATE_SESSION_PRESERVE_FD`, on a session, with [`PreserveFd`].
pub const PRESERVE_FD: u32 = request(0x40);
/// `LIVEUPDATE_SESSION_RETRIEVE_FD`, on a session, with [`RetrieveFd`].
pub const RETRIEVE_FD: u32 = request(0x41);
/// `LIVEUPDATE_SESSION_FINISH`, on a session, with [`Finish`].
pub const FINISH: u32 = request(0x42);
/// `LIVEUPDATE_SESSION_GET_NAME`, on a session, with [`GetName`]; from kernel 7.2 on.
pub const GET_NAME: u32 = request(0x43);

/// `_IO(LIVEUPDATE_IOCTL_TYPE, number)`.
const fn request(number: u8) -> u32 {
    (IOCTL_TYPE as u32) << 8 | number as u32
}

/// The size of a struct, as its first field wants it.
const fn size<T>() -> u32 {
    size_of::<T>() as u32
}

/// A session's name in the kernel's form, or `None` where it is empty, too long or contains a NUL.
pub fn session_name(name: &str) -> Option<[u8; SESSION_NAME_LENGTH]> {
    if name.is_empty() || name.contains('\0') {
        return None;
    }
    let mut field = [0; SESSION_NAME_LENGTH];
    // One byte stays zero behind the name: the kernel refuses a name without its NUL.
    field[..SESSION_NAME_LENGTH - 1].get_mut(..name.len())?.copy_from_slice(name.as_bytes());
    Some(field)
}

/// `struct liveupdate_ioctl_create_session`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreateSession {
    /// In: the size of this struct.
    pub size: u32,
    /// Out: the new session.
    pub fd: i32,
    /// In: the session's name, see [`session_name`].
    pub name: [u8; SESSION_NAME_LENGTH],
}

/// `struct liveupdate_ioctl_retrieve_session`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetrieveSession {
    /// In: the size of this struct.
    pub size: u32,
    /// Out: the session.
    pub fd: i32,
    /// In: the name under which it was created before the kexec, see [`session_name`].
    pub name: [u8; SESSION_NAME_LENGTH],
}

/// `struct liveupdate_session_preserve_fd`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PreserveFd {
    /// In: the size of this struct.
    pub size: u32,
    /// In: the file to preserve.
    pub fd: i32,
    /// In: the number to retrieve it by, see [`tokens`](crate::tokens).
    pub token: u64,
}

/// `struct liveupdate_session_retrieve_fd`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetrieveFd {
    /// In: the size of this struct.
    pub size: u32,
    /// Out: the file.
    pub fd: i32,
    /// In: the number under which it was preserved.
    pub token: u64,
}

/// `struct liveupdate_session_finish`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finish {
    /// In: the size of this struct.
    pub size: u32,
    /// In: zero.
    pub reserved: u32,
}

/// `struct liveupdate_session_get_name`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GetName {
    /// In: the size of this struct.
    pub size: u32,
    /// In: zero.
    pub reserved: u32,
    /// Out: the session's name, terminated by a NUL.
    pub name: [u8; SESSION_NAME_LENGTH],
}

impl Default for CreateSession {
    fn default() -> Self {
        Self { size: size::<Self>(), fd: -1, name: [0; SESSION_NAME_LENGTH] }
    }
}

impl Default for RetrieveSession {
    fn default() -> Self {
        Self { size: size::<Self>(), fd: -1, name: [0; SESSION_NAME_LENGTH] }
    }
}

impl Default for PreserveFd {
    fn default() -> Self {
        Self { size: size::<Self>(), fd: -1, token: 0 }
    }
}

impl Default for RetrieveFd {
    fn default() -> Self {
        Self { size: size::<Self>(), fd: -1, token: 0 }
    }
}

impl Default for Finish {
    fn default() -> Self {
        Self { size: size::<Self>(), reserved: 0 }
    }
}

impl Default for GetName {
    fn default() -> Self {
        Self { size: size::<Self>(), reserved: 0, name: [0; SESSION_NAME_LENGTH] }
    }
}
