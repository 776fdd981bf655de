//! The virtio-serial port, found by its name.
use crate::link::PORT;
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::thread;
use std::time::{Duration, Instant};

/// Opens the port. The driver learns names from the device in the background, so it may take a moment to appear.
pub fn open() -> Result<File> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(device) = find()? {
            let path = format!("/dev/{device}");
            return File::options().read(true).write(true).open(&path).with_context(|| format!("cannot open {path}"));
        }
        if Instant::now() > deadline {
            bail!("no virtio-serial port is named {PORT}");
        }
        thread::sleep(Duration::from_millis(2));
    }
}

fn find() -> Result<Option<String>> {
    let class = "/sys/class/virtio-ports";
    for entry in fs::read_dir(class).with_context(|| format!("cannot list {class}"))? {
        let entry = entry.with_context(|| format!("cannot list {class}"))?;
        if fs::read_to_string(entry.path().join("name")).is_ok_and(|name| name.trim() == PORT) {
            return Ok(Some(entry.file_name().to_string_lossy().into_owned()));
        }
    }
    Ok(None)
}
