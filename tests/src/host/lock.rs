//! One lab host at a time on a machine: two would share its processors, and every deadline would mean something else.
use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use std::fs::File;

/// Held while a host runs. The kernel releases it with the process, however that ends.
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Waits for its turn.
    pub fn take() -> Result<Self> {
        let path = std::env::temp_dir().join("kho-vmm-lab.lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        flock(&file, FlockOperation::LockExclusive).with_context(|| format!("cannot lock {}", path.display()))?;
        Ok(Self { _file: file })
    }
}
