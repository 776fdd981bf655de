//! Who has run: a few numbers about each VM that outlive the process that restores it.
//!
//! A guest that has run has changed its memory, so its VM must never be started from that again. Whoever restores may die at any
//! instant, between a VM's first instruction and having heard of it, too; so a VM notes it here, before it runs, and whoever comes
//! after looks here first. It is a file in memory: what one process has written all others see at once.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};

/// A VM's numbers.
const RECORD: u64 = 16;
const RAN: u64 = 0;
const ATTEMPTS: u64 = 4;
const PROCESS: u64 = 8;
const GIVEN_UP: u64 = 12;

/// The numbers of all VMs of a live update.
#[derive(Clone, Debug)]
pub struct Ledger {
    file: Arc<File>,
    /// How many VMs there are.
    count: u64,
}

impl Ledger {
    /// One for so many VMs. What may lack memory is done here: to write to it later takes none.
    pub fn new(count: usize) -> io::Result<Self> {
        let file = File::from(memfd_create("kho-vmm-ledger", MemfdFlags::CLOEXEC)?);
        let count = count as u64;
        file.write_all_at(&vec![0; usize::try_from(count * RECORD).map_err(io::Error::other)?], 0)?;
        Ok(Self { file: Arc::new(file), count })
    }

    /// The numbers of one VM.
    pub fn record(&self, number: usize) -> Record {
        Record { file: Arc::clone(&self.file), start: number as u64 * RECORD }
    }

    /// Leaves the last word to whoever comes after.
    pub fn set_last_word(&self, text: &str) -> io::Result<()> {
        self.file.write_all_at(text.as_bytes(), self.count * RECORD)
    }

    /// The last word, where one was left.
    pub fn last_word(&self) -> io::Result<Option<String>> {
        let start = self.count * RECORD;
        let length = self.file.metadata()?.len().saturating_sub(start);
        let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
        self.file.read_exact_at(&mut bytes, start)?;
        Ok((!bytes.is_empty()).then(|| String::from_utf8_lossy(&bytes).into_owned()))
    }
}

/// The numbers of one VM.
#[derive(Clone, Debug)]
pub struct Record {
    file: Arc<File>,
    start: u64,
}

impl Record {
    /// One that arrived from another process, with where it begins.
    pub fn adopt(file: OwnedFd, start: u64) -> Self {
        Self { file: Arc::new(File::from(file)), start }
    }

    /// What to send to another process.
    pub fn parts(&self) -> (BorrowedFd<'_>, u64) {
        (self.file.as_fd(), self.start)
    }

    /// From here on the VM may never be started from this memory again.
    pub fn set_ran(&self) -> io::Result<()> {
        self.set(RAN, 1)
    }

    /// Whether its guest has run.
    pub fn has_run(&self) -> io::Result<bool> {
        Ok(self.get(RAN)? != 0)
    }

    /// Notes which attempt is being made, from 1, before it is.
    pub fn set_attempts(&self, attempts: u32) -> io::Result<()> {
        self.set(ATTEMPTS, attempts)
    }

    /// How many attempts were made.
    pub fn attempts(&self) -> io::Result<u32> {
        self.get(ATTEMPTS)
    }

    /// Notes the process that is to be the VM.
    pub fn set_process(&self, pid: u32) -> io::Result<()> {
        self.set(PROCESS, pid)
    }

    /// The process that is to be the VM, or was; 0 where there was none yet.
    pub fn process(&self) -> io::Result<u32> {
        self.get(PROCESS)
    }

    /// From here on it is nobody's any more: its operator has given it up.
    pub fn set_given_up(&self) -> io::Result<()> {
        self.set(GIVEN_UP, 1)
    }

    /// Whether it was given up.
    pub fn is_given_up(&self) -> io::Result<bool> {
        Ok(self.get(GIVEN_UP)? != 0)
    }

    fn set(&self, field: u64, value: u32) -> io::Result<()> {
        self.file.write_all_at(&value.to_ne_bytes(), self.start + field)
    }

    fn get(&self, field: u64) -> io::Result<u32> {
        let mut value = [0; 4];
        self.file.read_exact_at(&mut value, self.start + field)?;
        Ok(u32::from_ne_bytes(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_vm_has_numbers_of_its_own_that_others_see() {
        let ledger = Ledger::new(3).unwrap();
        let record = ledger.record(1);
        let (file, start) = record.parts();
        let theirs = Record::adopt(file.try_clone_to_owned().unwrap(), start);
        theirs.set_ran().unwrap();
        theirs.set_attempts(2).unwrap();
        theirs.set_process(77).unwrap();
        ledger.record(2).set_given_up().unwrap();
        let seen = |number| {
            let record = ledger.record(number);
            let is = (record.has_run().unwrap(), record.is_given_up().unwrap());
            (is, record.attempts().unwrap(), record.process().unwrap())
        };
        let expected = [((false, false), 0, 0), ((true, false), 2, 77), ((false, true), 0, 0)];
        assert_eq!([seen(0), seen(1), seen(2)], expected);
    }

    #[test]
    fn last_word_is_what_was_said() {
        let ledger = Ledger::new(2).unwrap();
        assert_eq!(ledger.last_word().unwrap(), None);
        ledger.set_last_word("{\"all\": \"well\"}").unwrap();
        assert_eq!(ledger.last_word().unwrap().as_deref(), Some("{\"all\": \"well\"}"));
        assert!(!ledger.record(1).has_run().unwrap());
    }
}
