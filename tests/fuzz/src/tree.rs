//! Flattened device trees and sealed documents: changed as trees, and put together again so that seal and sizes are right.

use kho_abi::document::fdt;
use kho_abi::document::header::{self, Kind};
use kho_abi::document::node::Node;

use crate::random::{Random, changed, put};

/// How much longer names and values may become at once.
const ROOM: usize = 32;
/// Where the structure block begins: behind the header and an empty block of reservations.
const STRUCTURE: usize = 56;

/// Changes a sealed document.
pub fn change_document(input: &mut [u8], size: usize, seed: u32) -> usize {
    let mut random = Random::new(seed);
    let document = &input[..size];
    let kind = [Kind::Machine, Kind::Index].into_iter().find(|kind| document.starts_with(&kind.magic()));
    let sealed = kind.and_then(|kind| Some((kind, header::open_as(kind, document).ok()?)));
    let next = match sealed {
        Some((kind, body)) if random.below(16) != 0 => header::seal_as(kind, &changed_tree(body, &mut random)).ok(),
        // The seal itself.
        _ => None,
    };
    let next = next.unwrap_or_else(|| changed(document, ROOM));
    put(input, size, &next)
}

/// Changes a tree; what is none becomes one of `samples`.
pub fn change(input: &mut [u8], size: usize, seed: u32, samples: &[Vec<u8>]) -> usize {
    let mut random = Random::new(seed);
    let next = match blocks(&input[..size]) {
        Some(_) => changed_tree(&input[..size], &mut random),
        None => random.one(samples).cloned().unwrap_or_default(),
    };
    put(input, size, &next)
}

/// A tree with one change.
pub fn changed_tree(tree: &[u8], random: &mut Random) -> Vec<u8> {
    let as_nodes = match fdt::read(tree) {
        Ok(mut root) if random.below(8) != 0 => {
            change_node(&mut root, random);
            // Refused is what could not be read either.
            fdt::write(&root).ok()
        }
        _ => None,
    };
    as_nodes.unwrap_or_else(|| match blocks(tree) {
        Some((structure, strings)) if random.below(4) != 0 => compose(&changed(structure, ROOM), strings),
        Some((structure, strings)) if random.below(2) != 0 => compose(structure, &changed(strings, ROOM)),
        _ => changed(tree, ROOM),
    })
}

/// The structure block and the strings, as far as the header can be believed.
fn blocks(tree: &[u8]) -> Option<(&[u8], &[u8])> {
    let strings = u32::from_be_bytes(tree.get(12..16)?.try_into().ok()?) as usize;
    Some((tree.get(STRUCTURE..strings)?, tree.get(strings..)?))
}

/// A tree under a header that tells the truth.
fn compose(structure: &[u8], strings: &[u8]) -> Vec<u8> {
    let length = structure.len() & !3;
    let end = STRUCTURE + length;
    let fields = [0xd00d_feed, end + strings.len(), STRUCTURE, end, 40, 17, 16, 0, strings.len(), length];
    let header = fields.into_iter().flat_map(|field| (field as u32).to_be_bytes());
    header.chain([0; 16]).chain(structure[..length].iter().copied()).chain(strings.iter().copied()).collect()
}

fn count(node: &Node) -> usize {
    1 + node.children.iter().map(count).sum::<usize>()
}

/// The node of that number, from front to back.
fn nth<'a>(node: &'a mut Node, number: &mut usize) -> Option<&'a mut Node> {
    if *number == 0 {
        return Some(node);
    }
    *number -= 1;
    node.children.iter_mut().find_map(|child| nth(child, number))
}

fn change_node(root: &mut Node, random: &mut Random) {
    let [mut number, mut other] = [(); 2].map(|()| random.below(count(root)));
    let other = nth(root, &mut other).cloned();
    let (Some(node), Some(other)) = (nth(root, &mut number), other) else { return };
    let names: Vec<String> = node.properties.keys().cloned().collect();
    let name = random.one(&names).cloned().unwrap_or_default();
    let child = random.below(node.children.len());
    match random.below(16) {
        0 => {
            node.properties.remove(&name);
        }
        1 => {
            let value = node.properties.remove(&name).unwrap_or_default();
            node.properties.insert(renamed(&name), value);
        }
        2 if !node.children.is_empty() => {
            node.children.remove(child);
        }
        3 if !node.children.is_empty() => {
            let child = &mut node.children[child];
            child.name = renamed(&child.name);
        }
        // A copy, its name changed or not.
        4 => {
            let name = if random.below(2) == 0 { renamed(&other.name) } else { other.name.clone() };
            node.children.push(Node { name, ..other });
        }
        // What another node has under a name, or this one under another.
        5 => node.properties.extend(other.properties.into_iter().filter(|_| random.below(4) == 0)),
        6 => {
            let values: Vec<Vec<u8>> = node.properties.values().chain(other.properties.values()).cloned().collect();
            node.properties.insert(name, random.one(&values).cloned().unwrap_or_default());
        }
        7..=10 => {
            if let Some(value) = node.properties.get_mut(&name) {
                // The last digits of an integer, or some in a list.
                let width = value.len().clamp(1, 8);
                let number = random.limit(width).to_be_bytes();
                let at = random.below(value.len() / width) * width;
                value.iter_mut().skip(at).zip(&number[8 - width..]).for_each(|(to, from)| *to = *from);
            }
        }
        _ => {
            if let Some(value) = node.properties.get_mut(&name) {
                *value = changed(value, ROOM);
            }
        }
    }
}

fn renamed(name: &str) -> String {
    String::from_utf8_lossy(&changed(name.as_bytes(), 4)).into_owned()
}

/// Reads a tree as a value and as text, and writes the value: it is the same when it is read again.
pub fn read(bytes: &[u8]) {
    let _ = fdt::print(bytes);
    if let Ok(root) = fdt::read(bytes) {
        let again = fdt::write(&root).expect("a tree that was read can be written");
        assert_eq!(fdt::read(&again).as_ref(), Ok(&root));
    }
}
