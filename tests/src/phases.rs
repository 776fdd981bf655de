//! The phases of a live update, as `vmm` names them.

/// The phases in the order they happen; a phase's time is what passed since the one before.
pub const PHASES: &[&str] = &[
    "update-started",
    "image-loaded",
    "prepared",
    "pause-asked",
    "vcpus-stopped",
    "devices-stopped",
    "document-written",
    "preserved",
    "reboot-called",
    "init-reached",
    "index-retrieved",
    "files-retrieved",
    "machine-built",
    "first-instruction",
];
/// From here on the guest does not run.
pub const BLACKOUT_BEGINS: &str = "vcpus-stopped";
