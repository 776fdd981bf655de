//! A tree of nodes as a flattened device tree, version 17, and back.
//!
//! Written by vm-fdt, read by dtoolkit, which is known to no other file. What is read is of the one form that is
//! written: no memory reservations, no gaps between the blocks, no NOPs, padding of zeros, names that occur once, and
//! limits on depth and number of nodes. All of that is checked over the bytes, without recursion, before the parser
//! sees them. The trees that Linux hands over are of that form, too.

use alloc::collections::BTreeSet;
use alloc::format;
use alloc::string::{String, ToString};

use alloc::vec::Vec;

use dtoolkit::fdt::{Fdt, FdtNode};
use dtoolkit::{Node as _, Property as _};
use vm_fdt::FdtWriter;

use super::node::Node;
use super::{DecodeError, EncodeError, Problem};

/// How deep nodes may be nested, the root counted.
pub const MAX_DEPTH: usize = 16;
/// How many nodes a tree may have.
pub const MAX_NODES: usize = 4096;

/// The longest name of a property, or of a node without its unit address.
const NAME_MAX: usize = 31;
/// The longest unit address: a VM's name fits.
const ADDRESS_MAX: usize = 63;

/// Writes the tree under `root`, whose own name is empty.
///
/// # Errors
/// When [`read()`] would refuse it: a name that is not allowed or occurs twice, too deep, too many nodes.
pub fn write(root: &Node) -> Result<Vec<u8>, EncodeError> {
    if !root.name.is_empty() {
        return Err(DecodeError::new("/", Problem::BadName { name: root.name.clone() }).into());
    }
    let mut writer = FdtWriter::new().map_err(refused)?;
    let mut nodes = 0;
    write_node(&mut writer, root, "", 1, &mut nodes)?;
    writer.finish().map_err(refused)
}

fn refused(error: vm_fdt::Error) -> EncodeError {
    EncodeError::Writer { reason: error.to_string() }
}

fn write_node(
    writer: &mut FdtWriter,
    node: &Node,
    path: &str,
    depth: usize,
    nodes: &mut usize,
) -> Result<(), EncodeError> {
    let error = |problem| EncodeError::from(DecodeError::new(if path.is_empty() { "/" } else { path }, problem));
    count(nodes, depth).map_err(error)?;
    let open = writer.begin_node(&node.name).map_err(refused)?;
    for (name, value) in &node.properties {
        if !is_property_name(name) {
            return Err(error(Problem::BadName { name: name.clone() }));
        }
        writer.property(name, value).map_err(refused)?;
    }
    let mut names = BTreeSet::new();
    for child in &node.children {
        if !is_node_name(&child.name) {
            return Err(error(Problem::BadName { name: child.name.clone() }));
        }
        if !names.insert(&child.name) {
            return Err(error(Problem::DuplicateNode { name: child.name.clone() }));
        }
        write_node(writer, child, &format!("{path}/{}", child.name), depth + 1, nodes)?;
    }
    writer.end_node(open).map_err(refused)
}

/// Counts a node at `depth`.
fn count(nodes: &mut usize, depth: usize) -> Result<(), Problem> {
    *nodes += 1;
    if depth > MAX_DEPTH {
        return Err(Problem::TooDeep { max: MAX_DEPTH });
    }
    if *nodes > MAX_NODES {
        return Err(Problem::TooMany { what: "nodes", max: MAX_NODES });
    }
    Ok(())
}

fn is_name(name: &str, max: usize) -> bool {
    (1..=max).contains(&name.len())
        && name.chars().all(|letter| letter.is_ascii_alphanumeric() || matches!(letter, ',' | '.' | '_' | '+' | '-'))
}

fn is_property_name(name: &str) -> bool {
    is_name(name, NAME_MAX)
}

fn is_node_name(name: &str) -> bool {
    let (name, address) = match name.split_once('@') {
        Some((name, address)) => (name, Some(address)),
        None => (name, None),
    };
    is_name(name, NAME_MAX)
        && name.starts_with(|first: char| first.is_ascii_alphabetic())
        && address.is_none_or(|address| is_name(address, ADDRESS_MAX))
}

/// Reads a tree.
///
/// # Errors
/// When `bytes` is not exactly one tree of the form that [`write()`] writes.
pub fn read(bytes: &[u8]) -> Result<Node, DecodeError> {
    scan::validate(bytes).map_err(|problem| DecodeError::new("/", problem))?;
    let tree = Fdt::new(bytes)
        .map_err(|error| DecodeError::new("/", Problem::Malformed { reason: error.to_string(), offset: 0 }))?;
    read_node(tree.root(), "")
}

/// A tree as device tree source, for people to read. It need not be of this machine's architecture, nor of a form that
/// this version can restore.
///
/// # Errors
/// As [`read()`], but for names.
pub fn print(bytes: &[u8]) -> Result<String, DecodeError> {
    scan::validate(bytes).map_err(|problem| DecodeError::new("/", problem))?;
    let tree = Fdt::new(bytes)
        .map_err(|error| DecodeError::new("/", Problem::Malformed { reason: error.to_string(), offset: 0 }))?;
    Ok(tree.to_string())
}

/// The recursion is as deep as the tree, which is known to be at most [`MAX_DEPTH`].
fn read_node(found: FdtNode<'_>, path: &str) -> Result<Node, DecodeError> {
    let error = |problem| DecodeError::new(if path.is_empty() { "/" } else { path }, problem);
    let mut node = Node::new(found.name());
    for property in found.properties() {
        let name = property.name();
        if !is_property_name(name) {
            return Err(error(Problem::BadName { name: name.into() }));
        }
        if node.properties.insert(name.into(), property.value().to_vec()).is_some() {
            return Err(error(Problem::DuplicateProperty { name: name.into() }));
        }
    }
    let mut names = BTreeSet::new();
    for child in found.children() {
        let name = child.name();
        if !is_node_name(name) {
            return Err(error(Problem::BadName { name: name.into() }));
        }
        if !names.insert(name) {
            return Err(error(Problem::DuplicateNode { name: name.into() }));
        }
        node.children.push(read_node(child, &format!("{path}/{name}"))?);
    }
    Ok(node)
}

/// The check of the bytes: one pass from front to back.
mod scan {
    use super::{Problem, String, count};

    const HEADER: usize = 40;
    const RESERVATIONS_END: usize = HEADER + 16;
    const BEGIN_NODE: u32 = 1;
    const END_NODE: u32 = 2;
    const PROPERTY: u32 = 3;
    const END: u32 = 9;

    fn malformed(reason: &str, offset: usize) -> Problem {
        Problem::Malformed { reason: String::from(reason), offset }
    }

    /// A place in the structure block.
    struct Cursor<'a> {
        /// All bytes up to the end of the structure block.
        bytes: &'a [u8],
        offset: usize,
    }

    impl<'a> Cursor<'a> {
        fn take(&mut self, length: usize) -> Result<&'a [u8], Problem> {
            let cut = || malformed("the structure block is cut short", self.offset);
            let end = self.offset.checked_add(length).ok_or_else(cut)?;
            let taken = self.bytes.get(self.offset..end).ok_or_else(cut)?;
            self.offset = end;
            Ok(taken)
        }

        fn u32(&mut self) -> Result<u32, Problem> {
            Ok(self.take(4)?.iter().fold(0, |value, &byte| value << 8 | u32::from(byte)))
        }

        fn pad(&mut self) -> Result<(), Problem> {
            let offset = self.offset;
            match self.take(offset.next_multiple_of(4) - offset)?.iter().all(|&byte| byte == 0) {
                true => Ok(()),
                false => Err(malformed("the padding is not zero", offset)),
            }
        }

        fn skip_name(&mut self) -> Result<(), Problem> {
            while self.take(1)? != [0] {}
            self.pad()
        }
    }

    pub fn validate(bytes: &[u8]) -> Result<(), Problem> {
        let strings = validate_header(bytes)?;
        let (structure, strings) = bytes.split_at(strings);
        let mut cursor = Cursor { bytes: structure, offset: RESERVATIONS_END };
        let (mut depth, mut nodes) = (0, 0);
        loop {
            let at = cursor.offset;
            match cursor.u32()? {
                BEGIN_NODE => {
                    depth += 1;
                    count(&mut nodes, depth)?;
                    cursor.skip_name()?;
                }
                PROPERTY => {
                    let (length, name) = (cursor.u32()?, cursor.u32()?);
                    if name as usize >= strings.len() {
                        return Err(malformed("a property's name is outside the strings block", at));
                    }
                    cursor.take(length as usize)?;
                    cursor.pad()?;
                }
                END_NODE if depth > 1 => depth -= 1,
                END_NODE if depth == 1 => break,
                _ => return Err(malformed("this is no token that can stand here", at)),
            }
        }
        let at = cursor.offset;
        match (cursor.u32()?, cursor.offset == structure.len()) {
            (END, true) => Ok(()),
            _ => Err(malformed("the root is not followed by the end of the structure block", at)),
        }
    }

    /// Checks that the blocks follow one another without a gap, and returns where the strings begin.
    fn validate_header(bytes: &[u8]) -> Result<usize, Problem> {
        let Some((header, reservations)) = bytes.split_at_checked(HEADER) else {
            return Err(malformed("the header is cut short", bytes.len()));
        };
        let mut cursor = Cursor { bytes: header, offset: 0 };
        let mut fields = [0; 10];
        for field in &mut fields {
            *field = cursor.u32()?;
        }
        let [magic, total, structure, strings, map, version, compatible, boot_cpu, strings_size, structure_size] =
            fields;
        let total_is_right = usize::try_from(total) == Ok(bytes.len());
        let structure_end = structure.checked_add(structure_size);
        let strings_end = strings.checked_add(strings_size);
        let rules = [
            (magic == 0xd00d_feed, "the magic is wrong", 0),
            (total_is_right, "the total size is not that of the bytes", 4),
            (structure as usize == RESERVATIONS_END, "the structure block is not where it must be", 8),
            (structure_end == Some(strings), "the strings block does not follow the structure block", 12),
            (map as usize == HEADER, "the reservation block does not follow the header", 16),
            (version == 17, "the version is not 17", 20),
            (compatible == 16, "the last compatible version is not 16", 24),
            (boot_cpu == 0, "the boot CPU is not 0", 28),
            (strings_end == Some(total), "the strings block does not end the tree", 32),
            (structure_size % 4 == 0, "the structure block's size is no multiple of four", 36),
        ];
        for (holds, rule, offset) in rules {
            if !holds {
                return Err(malformed(rule, offset));
            }
        }
        match reservations.split_at_checked(RESERVATIONS_END - HEADER) {
            Some((entry, _)) if entry.iter().all(|&byte| byte == 0) => Ok(strings as usize),
            _ => Err(malformed("there are memory reservations", HEADER)),
        }
    }
}
