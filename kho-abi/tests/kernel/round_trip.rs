//! What is encoded is decoded to the same.

use std::collections::{BTreeMap, BTreeSet};

use kho_abi::kernel::bitmaps::{self, Bitmap};
use kho_abi::kernel::dump::{Dump, Recorder};
use kho_abi::kernel::luo::{File, Luo, Session, Shared};
use kho_abi::kernel::memblock::{self, Region};
use kho_abi::kernel::memfd::{Folio, Memfd};
use kho_abi::kernel::metadata::Metadata;
use kho_abi::kernel::root::{Root, Subtree, Version};
use kho_abi::kernel::{Image, Limits, PageSize, PhysMem, Ranges, blocks, handover, radix, scratch, vmalloc};
use proptest::collection::{btree_set, vec};
use proptest::prelude::*;

use crate::{cases, sample};

fn page_size() -> impl Strategy<Value = PageSize> {
    prop_oneof![Just(12), Just(14), Just(16)].prop_map(|shift| PageSize::from_shift(shift).unwrap())
}

/// A name that the kernel's fields hold and its trees allow.
fn name(longest: usize) -> impl Strategy<Value = String> {
    proptest::string::string_regex(&format!("[a-zA-Z][a-zA-Z0-9._-]{{0,{}}}", longest - 1)).unwrap()
}

/// Blocks of pages as the map knows them: numbered by their own size.
fn blocks_of_pages() -> impl Strategy<Value = BTreeSet<(u64, u32)>> {
    let block = (0..12_u32).prop_flat_map(|order| (prop_oneof![0..200_u64, 0..1_u64 << (40 - order)], Just(order)));
    btree_set(block, 0..60)
}

proptest! {
    // Some thousand names each.
    #![proptest_config(cases(200))]

    #[test]
    fn sessions_and_files_are_what_they_were(
        number in any::<u64>(),
        sessions in vec((name(63), vec((name(47), any::<u64>(), any::<u64>()), 0..80)), 0..60),
        shared in vec((name(47), any::<u64>(), any::<u64>()), 0..80),
    ) {
        let file = |(compatible, data, token)| File { compatible, data, token };
        let session = |(name, files): (String, Vec<_>)| Session { name, files: files.into_iter().map(file).collect() };
        let luo = Luo {
            liveupdate_number: number,
            sessions: sessions.into_iter().map(session).collect(),
            shared: shared.into_iter().map(|(name, data, count)| Shared { name, data, count }).collect(),
        };
        let mut image = Image::new(PageSize::SMALL);
        let address = luo.encode(&mut image);
        prop_assert_eq!(Luo::decode(&image, address, &Limits::default(), "/LUO").unwrap(), luo);
    }
}

proptest! {
    #![proptest_config(cases(2_000))]

    #[test]
    fn a_map_has_what_was_put_into_it(size in page_size(), blocks in blocks_of_pages()) {
        let pages: Vec<(u64, u32)> =
            blocks.iter().map(|(number, order)| (number << (size.shift() + order), *order)).collect();
        let mut image = Image::new(size);
        let root = radix::encode(&mut image, pages.iter().copied()).unwrap();
        let preserved = radix::decode(&image, root, &Limits::default(), "/map").unwrap();
        let mut by_order = BTreeMap::new();
        blocks.iter().for_each(|(_, order)| *by_order.entry(*order).or_insert(0) += 1);
        prop_assert_eq!(preserved.by_order, by_order);
        let ranges: Ranges = pages.iter().map(|(at, order)| *at..at + (size.bytes() << order)).collect();
        prop_assert_eq!(preserved.ranges, ranges);
        prop_assert_eq!(preserved.map_pages, image.pages().count());
    }

    #[test]
    fn ranges_are_the_bytes_that_were_added(ranges in vec((0..200_u64, 0..30_u64), 0..20), probe in (0..240_u64, 0..30_u64)) {
        let mut all = Ranges::default();
        ranges.iter().for_each(|(start, bytes)| all.add(*start, *bytes));
        let bytes: BTreeSet<u64> = ranges.iter().flat_map(|(start, bytes)| *start..start + bytes).collect();
        prop_assert_eq!(all.iter().flatten().collect::<Vec<_>>(), bytes.iter().copied().collect::<Vec<_>>());
        prop_assert_eq!(all.bytes(), bytes.len() as u64);
        // Neither do they touch.
        let list: Vec<_> = all.iter().collect();
        prop_assert!(list.windows(2).all(|pair| pair[0].end < pair[1].start));
        let probe = probe.0..probe.0 + probe.1;
        prop_assert_eq!(all.contains(&probe), probe.clone().all(|byte| bytes.contains(&byte)));
        let first = probe.clone().find(|byte| bytes.contains(byte));
        prop_assert_eq!(all.overlap(&probe).map(|part| part.start), first);
        if let Some(part) = all.overlap(&probe) {
            prop_assert!(part.clone().all(|byte| bytes.contains(&byte)));
            prop_assert!(part.end == probe.end || !bytes.contains(&part.end));
        }
    }

    #[test]
    fn linked_blocks_keep_their_order(size in page_size(), entries in vec(any::<[u8; 80]>(), 0..400)) {
        let mut image = Image::new(size);
        let head = blocks::encode(&mut image, &entries);
        prop_assert_eq!(blocks::decode::<[u8; 80]>(&image, head, &Limits::default(), "/list").unwrap(), entries);
    }

    #[test]
    fn a_memfd_has_all_of_its_folios(
        page_size in page_size(),
        size in any::<u64>(),
        seals in any::<u32>(),
        folios in vec((0..1_u64 << 40, any::<u64>(), 0..4096_u16), 0..2000),
    ) {
        let folio = |(number, index, flags)| Folio { address: number << page_size.shift(), index, flags };
        let folios: Vec<Folio> = folios.into_iter().map(folio).collect();
        let mut image = Image::new(page_size);
        let address = Memfd::encode(&mut image, size, seals, &folios);
        let memfd = Memfd::decode(&image, address, "/memfd").unwrap();
        prop_assert_eq!((memfd.size, memfd.seals, memfd.folio_count), (size, seals, folios.len() as u64));
        prop_assert_eq!(memfd.folios(&image, &Limits::default(), "/memfd").unwrap(), folios);
    }

    #[test]
    fn a_list_of_bitmaps_is_what_it_was(size in page_size(), list in vec((0..20_u32, any::<u64>(), any::<u64>()), 0..600)) {
        let bitmap = |(order, start, bits)| Bitmap { order, start, bits };
        let list: Vec<Bitmap> = list.into_iter().map(bitmap).collect();
        let mut image = Image::new(size);
        let head = bitmaps::encode(&mut image, &list);
        prop_assert_eq!(bitmaps::decode(&image, head, &Limits::default(), "/map").unwrap(), list);
    }

    #[test]
    fn a_root_is_what_it_was(
        version in prop_oneof![Just(Version::V1), Just(Version::V3), Just(Version::V4)],
        memory_map in any::<u64>(),
        subtrees in proptest::collection::btree_map(name(31), (any::<u64>(), any::<u64>()), 0..8),
    ) {
        let size = |size| (version != Version::V1).then_some(size);
        let subtree = |(name, (address, bytes))| Subtree { name, address, size: size(bytes) };
        let root = Root { version, memory_map, subtrees: subtrees.into_iter().map(subtree).collect() };
        prop_assert_eq!(Root::decode(&root.encode().unwrap(), "/").unwrap(), root);
    }

    #[test]
    fn small_structs_are_what_they_were(
        release in name(64),
        kexec_count in any::<u32>(),
        regions in proptest::collection::btree_map(name(15), (any::<u64>(), any::<u64>()), 0..8),
        areas in vec((0..u64::MAX / 2, 0..u64::MAX / 2), 0..20),
        content in vec(any::<u8>(), 0..20_000),
    ) {
        let metadata = Metadata { previous_release: release, kexec_count };
        prop_assert_eq!(Metadata::decode(&metadata.encode(), "/m").unwrap(), metadata);
        let regions: Vec<Region> =
            regions.into_iter().map(|(name, (start, size))| Region { name, start, size }).collect();
        prop_assert_eq!(memblock::decode(&memblock::encode(&regions).unwrap(), "/memblock").unwrap(), regions);
        let mut image = Image::new(PageSize::SMALL);
        let areas: Vec<_> = areas.into_iter().map(|(start, size)| start..start + size).collect();
        let (address, length) = scratch::encode(&mut image, &areas);
        prop_assert_eq!(scratch::decode(&image, address, length, "/scratch").unwrap(), areas);
        let area = vmalloc::encode(&mut image, &content);
        let pages = vmalloc::pages(&image, &area, &Limits::default(), "/area").unwrap();
        prop_assert_eq!(pages.len(), content.len().div_ceil(4096));
    }
}

#[test]
fn a_whole_handover_is_read() {
    let (image, root) = sample::handover();
    let found = handover::read(&image, root, &Limits::default()).unwrap();
    let luo = found.luo.as_ref().unwrap().as_ref().unwrap();
    let memfd = luo.sessions[1].files[0].data;
    assert_eq!(luo, &sample::luo(memfd));
    let memfd = found.memfds[&memfd].as_ref().unwrap();
    assert_eq!((memfd.size, memfd.seals), (600 << 21, sample::SEALS));
    let folios = memfd.folios(&image, &Limits::default(), "/memfd").unwrap();
    assert_eq!(folios, sample::folios());
    let preserved = found.preserved.as_ref().unwrap();
    assert_eq!(preserved.by_order[&9], 600);
    assert!(folios.iter().all(|folio| preserved.ranges.contains(&(folio.address..folio.address + (2 << 20)))));
    assert_eq!(found.metadata.as_ref().unwrap().as_ref().unwrap(), &sample::metadata());
    assert_eq!(found.memblock.as_ref().unwrap().as_ref().unwrap(), &sample::regions());
    assert_eq!(found.unknown().map(|subtree| subtree.name.as_str()).collect::<Vec<_>>(), ["something"]);
}

#[test]
fn a_dump_has_all_that_a_handover_is_read_from_and_nothing_else() {
    let (mut image, root) = sample::handover();
    let unread = image.add(b"nobody reads this");
    let recorder = Recorder::new(&image);
    let read = |memory: &dyn PhysMem| {
        let found = handover::read(memory, root, &Limits::default()).unwrap();
        let folios = found.memfds.values().map(|memfd| memfd.as_ref().unwrap().folios(memory, &Limits::default(), "/"));
        let folios: Vec<_> = folios.map(Result::unwrap).collect();
        (format!("{found:?}"), folios)
    };
    let whole = read(&recorder);
    let dump = Dump { image: recorder.into_image(), root, scratch: (0x1000, 32) };
    assert!(!dump.image.has_page(unread));
    let bytes = dump.encode();
    let found = Dump::decode(&bytes).unwrap();
    assert_eq!(found, dump);
    assert_eq!(read(&found.image), whole);
    for length in [7, 30, 50, bytes.len() - 1] {
        assert!(Dump::decode(&bytes[..length]).is_err(), "{length}");
    }
    assert!(Dump::decode(&[&bytes[..], &[0]].concat()).is_err());
}
