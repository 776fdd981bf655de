//! The releases of Debian that guests run.

/// A release of Debian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// Debian 12, with Linux 6.1: the older stock kernel.
    Bookworm,
    /// Debian 13, with Linux 6.12.
    Trixie,
}

impl Release {
    /// As Debian calls it.
    pub fn codename(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
        }
    }

    /// With which its version begins.
    pub fn number(self) -> &'static str {
        match self {
            Self::Bookworm => "12",
            Self::Trixie => "13",
        }
    }
}

/// All of them, the newest first.
pub fn releases() -> [Release; 2] {
    [Release::Trixie, Release::Bookworm]
}
