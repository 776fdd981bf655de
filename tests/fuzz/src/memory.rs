//! Dumps of a handover: changed page by page, with addresses that lead to other pages.

use kho_abi::kernel::bitmaps::{self, Bitmap};
use kho_abi::kernel::dump::Dump;
use kho_abi::kernel::root::{Root, Version};
use kho_abi::kernel::{Image, PageSize, PhysMem, scratch};

use crate::random::{Random, changed, put};
use crate::{sample, tree};

/// Changes a dump; what is none becomes one.
pub fn change(input: &mut [u8], size: usize, seed: u32) -> usize {
    let mut random = Random::new(seed);
    let next = match Dump::decode(&input[..size]) {
        // The dump's own format.
        _ if size > 0 && random.below(16) == 0 => changed(&input[..size], 64),
        Ok(mut dump) => {
            change_dump(&mut dump, &mut random);
            dump.encode()
        }
        Err(_) => sample(&mut random).encode(),
    };
    put(input, size, &next)
}

fn sample(random: &mut Random) -> Dump {
    let (mut image, root) = if random.below(2) == 0 { sample::handover() } else { of_version_1() };
    let scratch = scratch::encode(&mut image, &[0x100_0000..0x200_0000, 0x4000_0000..0x4800_0000]);
    Dump { image, root, scratch }
}

/// As kernels before 7.1 hand over.
fn of_version_1() -> (Image, u64) {
    let mut image = Image::new(PageSize::SMALL);
    let bits = image.add(&[0b101, 0xff, 0, 1]);
    let bitmap = |order, start| Bitmap { order, start, bits };
    let memory_map = bitmaps::encode(&mut image, &[bitmap(0, 0x100_0000), bitmap(0, 0), bitmap(9, 0x4000_0000)]);
    let root = Root { version: Version::V1, memory_map, subtrees: vec![] };
    let root = image.add(&root.encode().expect("a tree with known names"));
    (image, root)
}

fn change_dump(dump: &mut Dump, random: &mut Random) {
    let pages: Vec<(u64, Vec<u8>)> = dump.image.pages().map(|(address, page)| (address, page.to_vec())).collect();
    let (Some((address, page)), Some((other, _))) = (random.one(&pages), random.one(&pages)) else { return };
    let (address, size) = (*address, page.len() as u64);
    let used = page.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    match random.below(14) {
        0 => dump.image.remove(address),
        1 => dump.image.set_page(random.number() & !(size - 1), page),
        2 => dump.image.set_page(other.wrapping_add(size), page),
        3 => match random.below(4) {
            0 => dump.root = *other,
            1 => dump.scratch.0 = *other,
            2 => dump.scratch.1 = random.number() >> random.below(64),
            _ => dump.root = random.number() >> random.below(64),
        },
        // Instead of one address another: there are most where there are any.
        4 | 5 => {
            let words: Vec<u64> = (0..used as u64 / 8 + 2).map(|word| address + word * 8).collect();
            let to = if random.below(4) == 0 { random.number() & !(size - 1) } else { *other };
            if let Some(word) = random.one(&words).filter(|&&word| word < address + size) {
                dump.image.write(*word, &to.to_le_bytes());
            }
        }
        // A field, where it is: structs are small, and nothing in them moves.
        6..=9 => {
            let width = 1 << random.below(4);
            let at = random.below((used / width + 2).min(page.len() / width)) * width;
            dump.image.write(address + at as u64, &random.limit(width).to_le_bytes()[..width]);
        }
        10 => {
            let mut bytes = page.clone();
            // As much of it as its root has; what is behind is zero.
            if dump.image.read(dump.root, &mut bytes).is_ok() {
                let length = u32::from_be_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]) as usize;
                let next = tree::changed_tree(bytes.get(..length).unwrap_or(&bytes), random);
                dump.image.write(dump.root, &next);
            }
        }
        _ => {
            let mut next = changed(&page[..used], (page.len() - used).min(64));
            next.truncate(page.len());
            dump.image.set_page(address, &next);
        }
    }
}
