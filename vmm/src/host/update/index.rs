//! The index on its way to the next kernel: a memfd in a session whose name that kernel's user space knows.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use anyhow::{Context, bail};
use kho_abi::document::header;
use kho_abi::document::index::IndexV2;
use kho_abi::{names, tokens};
use rustix::fs::MemfdFlags;

use crate::handover::luo::{Device, OutgoingSession};

/// Room for the host's marks, the tree and its strings.
const BASE: usize = 32 << 10;
/// Room for one VM; with few RAM ranges it takes a fraction of it.
const PER_VM: usize = 3 << 10;

/// A preserved index, which can be written anew until the reboot.
pub struct IndexFile {
    file: File,
    capacity: usize,
    /// Holds the file's place in the handover.
    _session: OutgoingSession,
}

impl IndexFile {
    /// Creates it, with room for `vms` VMs, and preserves it.
    pub fn preserve(device: &Device, vms: usize) -> anyhow::Result<Self> {
        // Of fixed size: a preserved memfd can no longer grow. The reader skips the zeros behind the content.
        let capacity = vms.saturating_mul(PER_VM).saturating_add(BASE).min(header::CAP);
        let file = rustix::fs::memfd_create("kho-vmm-index", MemfdFlags::CLOEXEC).context("cannot create the index")?;
        let file = File::from(file);
        file.set_len(capacity as u64).context("cannot size the index")?;
        let session = device.create_session(names::INDEX_SESSION)?;
        session.preserve(tokens::INDEX, file.as_fd())?;
        Ok(Self { file, capacity, _session: session })
    }

    /// Replaces its content.
    pub fn write(&self, index: &IndexV2) -> anyhow::Result<()> {
        let mut bytes = index.to_bytes().context("cannot encode the index")?;
        if bytes.len() > self.capacity {
            bail!("the index of {} bytes exceeds its {}", bytes.len(), self.capacity);
        }
        // To the end, so that nothing is left of a longer one.
        bytes.resize(self.capacity, 0);
        self.file.write_all_at(&bytes, 0).context("cannot write the index")
    }
}
