//! A machine as a document, and a document in a memfd: the bytes that travel beside guest RAM.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use kho_abi::document::device::SERIAL_BACKLOG_MAX;
use kho_abi::document::header;
use kho_abi::document::machine::{ConfigV2, MachineV3};
use kho_abi::document::{DocumentError, EncodeError};

use crate::config::device::DeviceConfigError;
use crate::config::{MEMORY_GRANULE, MachineConfig, SerialConfigError};
use crate::memory::{self, MemoryError};

/// What can go wrong with a document.
#[derive(Debug, thiserror::Error)]
pub enum PersistError {
    /// It cannot be written as a tree.
    #[error("document: cannot be encoded")]
    Encode(#[from] EncodeError),
    /// It is damaged, foreign or impossible.
    #[error("document: refused")]
    Decode(#[from] DocumentError),
    /// It holds a serial port that no operator can have asked for.
    #[error("document: refused")]
    Serial(#[from] SerialConfigError),
    /// It holds a device that no operator can have asked for.
    #[error("document: refused")]
    Device(#[from] DeviceConfigError),
    /// It is larger than what was set aside for it.
    #[error("document: {document} bytes do not fit into the {capacity} set aside")]
    TooLarge {
        /// Bytes of the document.
        document: usize,
        /// Bytes of the memfd.
        capacity: usize,
    },
    /// Its memfd could not be made.
    #[error("document: no memory for it")]
    Memory(#[source] MemoryError),
    /// Its memfd could not be read or written.
    #[error("document: cannot {operation} its memfd")]
    File {
        /// "read" or "write".
        operation: &'static str,
        /// Why not.
        source: io::Error,
    },
}

/// The memfd that receives a document. It is preserved before the document is known, while the guest runs, so that inside the
/// pause nothing is left to do but to write.
pub struct StateFile {
    file: OwnedFd,
    capacity: usize,
}

impl StateFile {
    /// Sets aside room for the document of a VM of that shape.
    pub fn create(config: &MachineConfig) -> Result<Self, PersistError> {
        let MachineConfig { name, cpus, memory, serial: _, devices } = config;
        // Of which output that nobody has read may take 64 KiB.
        // A vCPU has 12 KiB of state with AVX-512, 20 KiB with AMX.
        const SHARED: usize = (64 << 10) + SERIAL_BACKLOG_MAX;
        const PER_VCPU: usize = 64 << 10;
        // A device has less than 1 KiB of state, and some more for each further queue.
        const PER_DEVICE: usize = 16 << 10;
        // A balloon has a bit for each 2 MiB of RAM.
        let blocks = (memory / MEMORY_GRANULE).div_ceil(8) as usize;
        let capacity = SHARED + PER_VCPU * *cpus as usize + PER_DEVICE * devices.len() + blocks;
        let capacity = capacity.min(header::CAP);
        let file =
            memory::create_memfd(&format!("kho-vmm-state:{name}"), capacity as u64).map_err(PersistError::Memory)?;
        Ok(Self { file, capacity })
    }

    /// The memfd.
    pub fn file(&self) -> &OwnedFd {
        &self.file
    }

    /// Writes the document and returns its size in bytes.
    pub fn write(&self, document: &MachineV3) -> Result<u64, PersistError> {
        let bytes = document.to_bytes()?;
        if bytes.len() > self.capacity {
            return Err(PersistError::TooLarge { document: bytes.len(), capacity: self.capacity });
        }
        let mut written = 0;
        while written < bytes.len() {
            let count = rustix::io::pwrite(&self.file, &bytes[written..], written as u64)
                .map_err(|errno| PersistError::File { operation: "write", source: errno.into() })?;
            written += count;
        }
        Ok(bytes.len() as u64)
    }

    /// Changes one byte in the middle of the document, so that tests can show that it is found out.
    pub fn spoil(&self, size: u64) -> Result<(), PersistError> {
        let failed = |errno: rustix::io::Errno| PersistError::File { operation: "write", source: errno.into() };
        let mut byte = [0];
        rustix::io::pread(&self.file, &mut byte, size / 2).map_err(failed)?;
        rustix::io::pwrite(&self.file, &[!byte[0]], size / 2).map_err(failed)?;
        Ok(())
    }
}

/// Reads and decodes the document in a memfd that another process or kernel has left. Tells its size in bytes, too.
pub fn read(file: impl AsFd) -> Result<(MachineV3, u64), PersistError> {
    // One byte more than a document may have is enough to see that it is too long.
    let mut bytes = vec![0; header::CAP + 1];
    let mut read = 0;
    while read < bytes.len() {
        match rustix::io::pread(&file, &mut bytes[read..], read as u64) {
            Ok(0) => break,
            Ok(count) => read += count,
            Err(errno) => return Err(PersistError::File { operation: "read", source: errno.into() }),
        }
    }
    let document = MachineV3::from_bytes(&bytes[..read])?;
    let size = header::length(&bytes[..read]).unwrap_or(read as u64);
    Ok((document, size))
}

/// The machine's shape, as the document has it.
pub fn config_record(config: &MachineConfig) -> ConfigV2 {
    let MachineConfig { name: _, cpus, memory, serial, devices } = config;
    let devices = devices.iter().map(ToString::to_string).collect();
    ConfigV2 { cpus: *cpus, memory: *memory, serial: serial.to_string(), devices }
}

/// The machine's shape, from the document.
pub fn config(document: &MachineV3) -> Result<MachineConfig, PersistError> {
    let ConfigV2 { cpus, memory, serial, devices } = &document.config;
    Ok(MachineConfig {
        name: document.name.clone(),
        cpus: *cpus,
        memory: *memory,
        serial: serial.parse()?,
        devices: devices.iter().map(|device| device.parse()).collect::<Result<_, _>>()?,
    })
}
