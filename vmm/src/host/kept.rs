//! Notes about VMs that could not be restored and whose memory is kept: `NAME.kept` in the run folder.
//!
//! Written by the supervisor that holds the memory, read by the verbs. A note of a process that is gone means nothing.

use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::control::socket::RunDir;

/// A VM that is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptVm {
    /// Its name.
    pub name: String,
    /// Why it could not be restored.
    pub reason: String,
    /// The process that holds its memory.
    pub pid: u32,
    /// How often it was tried.
    pub attempts: u32,
    /// RAM in bytes.
    pub memory: u64,
    /// The live update it did not come out of.
    pub generation: u64,
}

impl KeptVm {
    /// Leaves the note. Whole or not at all: readers come at any time.
    pub fn write(&self, dir: &RunDir) -> io::Result<()> {
        let path = dir.kept(&self.name);
        let draft = path.with_extension("kept-draft");
        fs::write(&draft, serde_json::to_vec(self)?)?;
        fs::rename(draft, path)
    }

    /// Takes the note away.
    pub fn clear(dir: &RunDir, name: &str) {
        if let Err(error) = fs::remove_file(dir.kept(name))
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, vm = name, "cannot delete the note about a kept VM");
        }
    }

    /// The note about one VM, if its memory is still held.
    pub fn read(dir: &RunDir, name: &str) -> Option<Self> {
        let note: Self = serde_json::from_slice(&fs::read(dir.kept(name)).ok()?).ok()?;
        let alive = Path::new("/proc").join(note.pid.to_string()).exists();
        (alive && note.name == name).then_some(note)
    }

    /// All VMs that are kept on this host.
    pub fn all(dir: &RunDir) -> Vec<Self> {
        dir.names("kept").iter().filter_map(|name| Self::read(dir, name)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn note_counts_as_long_as_its_process_lives() {
        let folder = tempfile::tempdir().unwrap();
        let dir = RunDir::at(folder.path());
        let note = KeptVm {
            name: "a".into(),
            reason: "a \"reason\"".into(),
            pid: std::process::id(),
            attempts: 3,
            memory: 1 << 30,
            generation: 2,
        };
        note.write(&dir).unwrap();
        KeptVm { name: "dead".into(), pid: u32::MAX, ..note.clone() }.write(&dir).unwrap();
        assert_eq!(KeptVm::all(&dir), [note]);
        KeptVm::clear(&dir, "a");
        assert_eq!(KeptVm::all(&dir), []);
    }
}
