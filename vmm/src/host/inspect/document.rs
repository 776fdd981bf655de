//! Documents and indexes, as files.

use anyhow::{Result, bail};
use kho_abi::document::header::{self, Kind};
use kho_abi::document::node::Node;
use kho_abi::document::{DocumentError, fdt};
use serde_json::{Map, Value, json};

use super::{Inspected, Outline, summary};
use crate::host::report;

/// What a file is sealed as, and its tree's bytes.
pub fn open(bytes: &[u8]) -> Result<(&'static str, &[u8])> {
    for (kind, what) in [(Kind::Machine, "document of a VM"), (Kind::Index, "index of a host")] {
        if bytes.starts_with(&kind.magic()) {
            return Ok((what, header::open_as(kind, bytes).map_err(DocumentError::from)?));
        }
    }
    if bytes.starts_with(&0xd00d_feed_u32.to_be_bytes()) {
        return Ok(("flattened device tree", bytes));
    }
    bail!("it is neither a document of a VM, nor an index, nor a flattened device tree");
}

/// The tree as device tree source.
pub fn source(bytes: &[u8]) -> Result<String> {
    Ok(fdt::print(open(bytes)?.1)?)
}

/// All that is in it.
pub fn inspect(bytes: &[u8]) -> Result<Inspected> {
    let (what, body) = open(bytes)?;
    let tree = fdt::read(body)?;
    let title = Outline::new(what, report::bytes(body.len() as u64));
    let title = if body.len() == bytes.len() { title } else { title.with_value("its checksum is right") };
    let (summary, told) = summary::of(bytes);
    let outline = outline(title.with(summary), &tree);
    let json = json!({"what": what, "bytes": body.len(), "summary": told, "tree": value(&tree)});
    Ok(Inspected { outline, json })
}

/// The property that says what a node is.
pub const COMPATIBLE: &str = "compatible";

fn outline(title: Outline, node: &Node) -> Outline {
    let properties = node.properties.iter().filter(|(name, _)| *name != COMPATIBLE);
    let properties = properties.map(|(name, bytes)| Outline::new(name, shown(bytes)));
    let children = node.children.iter().map(|child| {
        let kind = child.property(COMPATIBLE).and_then(text).unwrap_or_default();
        outline(Outline::new(&child.name, kind), child)
    });
    title.with_all(properties).with_all(children)
}

/// Text that ends with its only NUL.
pub fn text(bytes: &[u8]) -> Option<&str> {
    let text = std::ffi::CStr::from_bytes_with_nul(bytes).ok()?.to_str().ok()?;
    text.chars().all(|letter| !letter.is_control()).then_some(text)
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A property for people: text, an integer, or some of the bytes.
pub fn shown(bytes: &[u8]) -> String {
    const SOME: usize = 16;
    match bytes {
        [] => String::new(),
        [_] | [_, _, _, _] | [_, _, _, _, _, _, _, _] if text(bytes).is_none_or(str::is_empty) => {
            format!("{:#x}", integer(bytes))
        }
        _ => match text(bytes).filter(|text| !text.is_empty()) {
            Some(text) => format!("{text:?}"),
            None if bytes.len() <= SOME => hexadecimal(bytes),
            None => format!("{}… ({})", hexadecimal(&bytes[..SOME]), report::bytes(bytes.len() as u64)),
        },
    }
}

fn integer(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// A node for programs: what no text or integer is, as hexadecimal digits.
fn value(node: &Node) -> Value {
    let property = |bytes: &[u8]| match bytes {
        [_] | [_, _, _, _] | [_, _, _, _, _, _, _, _] if text(bytes).is_none_or(str::is_empty) => json!(integer(bytes)),
        _ => match text(bytes).filter(|text| !text.is_empty()) {
            Some(text) => json!(text),
            None => json!(hexadecimal(bytes)),
        },
    };
    let properties: Map<String, Value> =
        node.properties.iter().map(|(name, bytes)| (name.clone(), property(bytes))).collect();
    let children: Map<String, Value> = node.children.iter().map(|child| (child.name.clone(), value(child))).collect();
    json!({"properties": properties, "nodes": children})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealed(node: &Node) -> Vec<u8> {
        header::seal(&fdt::write(node).unwrap()).unwrap()
    }

    fn machine() -> Node {
        let vcpu = Node::new("vcpu@0").with_bytes("regs", vec![1; 24]).with_u32("id", 0);
        Node::new("").with_str("compatible", "kho-vmm,vm-v3").with_str("name", "a").with_child(vcpu)
    }

    #[test]
    fn a_document_is_told_in_lines_and_in_json() {
        let inspected = inspect(&sealed(&machine())).unwrap();
        let text = inspected.outline.to_text();
        assert!(text.starts_with("document of a VM: "), "{text}");
        assert!(text.contains("  name: \"a\"\n") && text.contains("  vcpu@0\n    id: 0x0\n"), "{text}");
        assert_eq!(inspected.json["tree"]["nodes"]["vcpu@0"]["properties"]["id"], 0);
        assert!(source(&sealed(&machine())).unwrap().contains("vcpu@0 {"));
    }

    #[test]
    fn what_is_no_document_is_refused() {
        assert!(inspect(b"").is_err());
        assert!(inspect(&[0; 100]).is_err());
        let mut damaged = sealed(&machine());
        let last = damaged.len() - 1;
        damaged[last] ^= 1;
        assert!(inspect(&damaged).err().unwrap().to_string().contains("checksum"));
    }
}
