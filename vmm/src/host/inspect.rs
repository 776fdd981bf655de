//! `vmm inspect`: what is in a document or an index, and what this host has been handed and is about to hand over.

mod diff;
mod document;
mod handover;
mod outline;
mod parts;
mod summary;

pub use handover::{outgoing_root, scratch_areas, was_handed_something};

use std::fs;
use std::path::Path;

use anyhow::{Context, bail};
use kho_abi::kernel::dump::Dump;

use super::report;
use crate::cli::{InspectArgs, status};
use outline::Outline;

/// What was looked into: for people, and for programs.
struct Inspected {
    outline: Outline,
    json: serde_json::Value,
}

/// `vmm inspect`.
pub fn inspect(arguments: &InspectArgs) -> anyhow::Result<u8> {
    if let Some([one, other]) = arguments.diff.as_deref() {
        return diff(one, other, arguments.json);
    }
    let inspected = match &arguments.file {
        Some(path) => {
            let bytes = read(path)?;
            if arguments.dts {
                report::print(&document::source(&bytes).with_context(|| format!("cannot read {}", path.display()))?);
                return Ok(status::DONE);
            }
            let inspected = match Dump::is_one(&bytes) {
                true => handover::inspect_dump(&bytes),
                false => document::inspect(&bytes),
            };
            inspected.with_context(|| format!("cannot read {}", path.display()))?
        }
        None => handover::inspect(arguments.incoming, arguments.outgoing)?,
    };
    if let Some(folder) = &arguments.save {
        handover::save(folder, &inspected)?;
    }
    if arguments.json {
        report::print_json(&inspected.json);
    } else {
        report::print(&inspected.outline.to_text());
    }
    Ok(status::DONE)
}

/// Like `diff`: 1 when there are differences.
fn diff(one: &Path, other: &Path, json: bool) -> anyhow::Result<u8> {
    let differences = diff::diff(&read(one)?, &read(other)?)?;
    if json {
        report::print_json(&serde_json::to_value(&differences)?);
    } else {
        for difference in &differences {
            report::print(&difference.to_string());
        }
    }
    Ok(if differences.is_empty() { status::DONE } else { status::FAILED })
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    /// A document with what is behind it.
    const MOST_BYTES: u64 = 64 << 20;
    let failed = || format!("cannot read {}", path.display());
    let length = fs::metadata(path).with_context(failed)?.len();
    if length > MOST_BYTES {
        bail!("{} has {length} bytes, more than any document", path.display());
    }
    fs::read(path).with_context(failed)
}
