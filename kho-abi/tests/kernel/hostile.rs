//! What is wrong is refused, with the way to it, in bounded time and memory.

use kho_abi::kernel::bitmaps::{self, Bitmap};
use kho_abi::kernel::luo::{self, Luo, RawFile, RawLuo, RawSession, RawSharedHeader};
use kho_abi::kernel::memfd::{Memfd, RawMemfd};
use kho_abi::kernel::metadata::Metadata;
use kho_abi::kernel::root::Root;
use kho_abi::kernel::vmalloc::{self, Area};
use kho_abi::kernel::{Error, Image, Limits, PageSize, PhysMem, Problem, Unreadable, blocks, handover, radix, scratch};
use proptest::prelude::*;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromZeros, IntoBytes};

use crate::{cases, sample};

fn image() -> Image {
    Image::new(PageSize::SMALL)
}

fn limits() -> Limits {
    Limits::default()
}

/// Every byte of it is there, and the same.
struct Endless(u8);

impl PhysMem for Endless {
    fn page_size(&self) -> PageSize {
        PageSize::SMALL
    }

    fn read(&self, _: u64, buffer: &mut [u8]) -> Result<(), Unreadable> {
        buffer.fill(self.0);
        Ok(())
    }
}

fn map(memory: &dyn PhysMem, root: u64) -> Error {
    radix::decode(memory, root, &limits(), "/map").unwrap_err()
}

#[test]
fn a_map_that_leads_astray_is_refused() {
    let mut image = image();
    let root = radix::encode(&mut image, [(0x1000, 0)]).unwrap();
    // A table that is its own child.
    image.write(root + 8, &root.to_le_bytes());
    assert_eq!(map(&image, root).problem, Problem::Again { address: root });
    image.write(root + 8, &0x7f00_0000_0000_u64.to_le_bytes());
    let error = map(&image, root);
    assert!(matches!(&error.problem, Problem::Unreadable(found) if found.address == 0x7f00_0000_0000), "{error}");
    image.write(root + 8, &(root + 1).to_le_bytes());
    assert!(matches!(map(&image, root).problem, Problem::Misaligned { .. }));
    // Bits of a key that no page has.
    image.write(root + 8, &[0; 8]);
    let next = image.allocate(4096);
    image.write(root + 511 * 8, &next.to_le_bytes());
    image.write(next, &next.to_le_bytes());
    assert!(map(&image, root).to_string().starts_with("/map: "));
}

#[test]
fn a_leaf_without_an_order_is_refused() {
    let mut image = image();
    let root = image.allocate(4096);
    let mut table = root;
    for _ in 0..5 {
        let next = image.allocate(4096);
        image.write(table, &next.to_le_bytes());
        table = next;
    }
    assert_eq!(radix::decode(&image, root, &limits(), "/map").unwrap().by_order.len(), 0, "an empty leaf is none");
    image.write(table, &[1]);
    let error = map(&image, root).to_string();
    assert!(error.contains("stands for no page"), "{error}");
}

#[test]
fn an_endless_map_is_refused() {
    // Every entry of every table is another page of the same.
    struct Deep;
    impl PhysMem for Deep {
        fn page_size(&self) -> PageSize {
            PageSize::SMALL
        }

        fn read(&self, address: u64, buffer: &mut [u8]) -> Result<(), Unreadable> {
            let words = buffer.as_chunks_mut::<8>().0;
            words.fill([0; 8]);
            // Not the first: a way of nothing but first entries leads to no page.
            for (number, word) in words.iter_mut().enumerate().skip(1).take(4) {
                *word = ((address / 4096 * 4 + number as u64) % (1 << 40) * 4096).to_le_bytes();
            }
            Ok(())
        }
    }
    let few = Limits { pages: 1000, entries: 1000 };
    let error = radix::decode(&Deep, 4096, &few, "/map").unwrap_err();
    assert!(matches!(error.problem, Problem::TooMany { .. }), "{error}");
    assert!(matches!(map(&Endless(0xff), 4096).problem, Problem::Misaligned { .. }));
}

#[test]
fn lists_that_go_in_circles_or_count_too_much_are_refused() {
    let mut image = image();
    let head = blocks::encode(&mut image, &[[1_u8; 64]]);
    let read = |image: &Image| blocks::decode::<[u8; 64]>(image, head, &limits(), "/list").unwrap_err();
    image.write(head, &head.to_le_bytes());
    assert_eq!(read(&image).problem, Problem::Again { address: head });
    image.write(head, &[0; 8]);
    for count in [0, 64, u64::MAX] {
        image.write(head + 8, &count.to_le_bytes());
        assert!(read(&image).to_string().contains(&format!("counts {count} entries")), "{count}");
    }
    let bitmap = Bitmap { order: 3, start: 0, bits: 0x1000 };
    let head = bitmaps::encode(&mut image, &[bitmap]);
    let read = |image: &Image| bitmaps::decode(image, head, &limits(), "/map").unwrap_err();
    image.write(head + 8, &99_u32.to_le_bytes());
    assert!(read(&image).to_string().contains("order 99"));
    image.write(head + 8, &3_u32.to_le_bytes());
    image.write(head + 12, &u32::MAX.to_le_bytes());
    assert!(read(&image).to_string().contains("more than it has room for"));
    image.write(head + 12, &1_u32.to_le_bytes());
    image.write(head, &head.to_le_bytes());
    assert_eq!(read(&image).problem, Problem::Again { address: head });
}

#[test]
fn an_area_that_is_not_as_large_as_it_says_is_refused() {
    let mut image = image();
    let area = vmalloc::encode(&mut image, &[7; 20_000]);
    let read = |image: &Image, area: Area| vmalloc::pages(image, &area, &limits(), "/area").unwrap_err();
    for total in [4, 6, u32::MAX] {
        read(&image, Area { total_pages: U32::new(total), ..area });
    }
    for order in [1, 21, u16::MAX] {
        read(&image, Area { order: U16::new(order), ..area });
    }
    let first = area.first.get();
    image.write(first, &first.to_le_bytes());
    assert_eq!(read(&image, Area { total_pages: U32::new(10), ..area }).problem, Problem::Again { address: first });
    image.write(first, &[0; 8]);
    image.write(first + 8, &[1]);
    assert!(matches!(read(&image, area).problem, Problem::Misaligned { .. }));
}

#[test]
fn sessions_that_contradict_themselves_are_refused() {
    let mut image = image();
    let whole = RawLuo {
        compatible: *b"luo-v5\0\0",
        liveupdate_number: U64::new(1),
        sessions: U64::new(0),
        shared: U64::new(0),
    };
    let read = |image: &mut Image, raw: RawLuo| {
        let address = image.add(raw.as_bytes());
        Luo::decode(image, address, &limits(), "/LUO")
    };
    read(&mut image, whole).unwrap();
    let error = read(&mut image, RawLuo { compatible: *b"luo-v6\0\0", ..whole }).unwrap_err();
    assert_eq!(error.problem, Problem::Version { found: "luo-v6".into(), known: luo::COMPATIBLE });
    read(&mut image, RawLuo { compatible: *b"luo-v5..", ..whole }).unwrap_err();
    let mut session = RawSession { name: [0; 64], files: U64::new(0), count: U64::new(1) };
    session.name[0] = b'a';
    let sessions = U64::new(blocks::encode(&mut image, &[session]));
    let error = read(&mut image, RawLuo { sessions, ..whole }).unwrap_err();
    assert_eq!(error.path, "/LUO/sessions/a/files");
    let file = RawFile { compatible: [b'a'; 48], data: U64::new(0), token: U64::new(0) };
    let files = U64::new(blocks::encode(&mut image, &[file]));
    let sessions = U64::new(blocks::encode(&mut image, &[RawSession { files, ..session }]));
    let error = read(&mut image, RawLuo { sessions, ..whole }).unwrap_err();
    assert!(error.to_string().contains("no text ended by a NUL"), "{error}");
    for (pages, count) in [(1, 64), (u64::MAX, 1), (1 << 40, u64::MAX)] {
        let header = RawSharedHeader { pages: U64::new(pages), count: U64::new(count) };
        let shared = U64::new(image.add(header.as_bytes()));
        read(&mut image, RawLuo { shared, ..whole }).unwrap_err();
    }
}

/// A hundred thousand sessions that share a list of as many files would be more than any memory holds.
#[test]
fn sessions_that_share_their_files_are_refused() {
    let mut image = image();
    let mut file = RawFile { compatible: [0; 48], data: U64::new(0), token: U64::new(0) };
    file.compatible[0] = b'a';
    let files = blocks::encode(&mut image, &[file]);
    let mut session = RawSession { name: [0; 64], files: U64::new(files), count: U64::new(1) };
    session.name[0] = b'a';
    let sessions = U64::new(blocks::encode(&mut image, &[session, session]));
    let shared = U64::new(0);
    let raw = RawLuo { compatible: *b"luo-v5\0\0", liveupdate_number: U64::new(1), sessions, shared };
    let address = image.add(raw.as_bytes());
    let error = Luo::decode(&image, address, &limits(), "/LUO").unwrap_err();
    assert_eq!(error, Error::new("/LUO/sessions/a/files", Problem::Again { address: files }));
}

#[test]
fn a_memfd_with_more_folios_than_room_is_refused() {
    let mut image = image();
    let mut raw = RawMemfd::new_zeroed();
    for (count, pages) in [(1, 0), (u64::MAX, 1), (257, 1), (1 << 33, u32::MAX)] {
        raw.folio_count = U64::new(count);
        raw.folios.total_pages = U32::new(pages);
        let address = image.add(raw.as_bytes());
        let memfd = Memfd::decode(&image, address, "/memfd");
        assert!(memfd.and_then(|memfd| memfd.folios(&image, &limits(), "/memfd")).is_err(), "{count} {pages}");
    }
}

#[test]
fn other_versions_are_named_and_never_guessed() {
    let (image, root) = sample::handover();
    let mut bytes = vec![0; 4096];
    image.read(root, &mut bytes).unwrap();
    let size = u32::from_be_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]) as usize;
    bytes.truncate(size);
    let at = bytes.windows(6).position(|window| window == b"kho-v4").unwrap();
    bytes[at + 5] = b'2';
    let Problem::Version { found, .. } = Root::decode(&bytes, "/").unwrap_err().problem else {
        panic!("another error")
    };
    assert_eq!(found, "kho-v2");
    let mut metadata = sample::metadata().encode();
    metadata[0] = 2;
    assert!(matches!(Metadata::decode(&metadata, "/m").unwrap_err().problem, Problem::Version { .. }));
    assert!(Metadata::decode(&sample::metadata().encode()[..72], "/m").is_err());
    assert!(Metadata::decode(&[1, 0], "/m").is_err());
}

#[test]
fn a_claim_of_much_memory_costs_none() {
    let mut image = image();
    let claim = [&0xd00d_feed_u32.to_be_bytes()[..], &(1_u32 << 30).to_be_bytes()].concat();
    let address = image.add(&claim);
    assert!(Root::read(&image, address, "/").unwrap_err().to_string().contains("no flattened device tree"));
    assert!(scratch::decode(&image, address, 1 << 30, "/scratch").is_err());
    assert!(scratch::decode(&image, address, 17, "/scratch").is_err());
}

proptest! {
    #![proptest_config(cases(3_000))]

    /// A bit anywhere, and words that are addresses of the handover's own pages.
    #[test]
    fn a_damaged_handover_never_panics(
        flips in proptest::collection::vec((any::<prop::sample::Index>(), 0..4096_u64, 0..8_u8), 0..6),
        links in proptest::collection::vec((any::<prop::sample::Index>(), 0..512_u64, any::<prop::sample::Index>()), 0..4),
    ) {
        let (mut image, root) = sample::handover();
        let pages: Vec<u64> = image.pages().map(|(address, _)| address).collect();
        for (page, offset, bit) in flips {
            let (address, mut byte) = (pages[page.index(pages.len())] + offset, [0]);
            image.read(address, &mut byte).unwrap();
            image.write(address, &[byte[0] ^ 1 << bit]);
        }
        for (page, word, to) in links {
            let address = pages[page.index(pages.len())] + word * 8;
            image.write(address, &pages[to.index(pages.len())].to_le_bytes());
        }
        if let Ok(found) = handover::read(&image, root, &limits()) {
            for memfd in found.memfds.values().flatten() {
                let _ = memfd.folios(&image, &limits(), "/memfd");
            }
        }
    }

    #[test]
    fn memory_that_is_all_the_same_never_panics(byte in any::<u8>(), address in any::<u64>()) {
        let (memory, few) = (Endless(byte), Limits { pages: 100, entries: 100 });
        let _ = handover::read(&memory, address, &few);
        let _ = radix::decode(&memory, address, &few, "/");
        let _ = blocks::decode::<[u8; 80]>(&memory, address, &few, "/");
        let _ = bitmaps::decode(&memory, address, &few, "/");
        let _ = Luo::decode(&memory, address, &few, "/");
        let _ = scratch::decode(&memory, address, 160, "/");
        let _ = Memfd::decode(&memory, address, "/").and_then(|memfd| memfd.folios(&memory, &few, "/"));
    }

    #[test]
    fn random_bytes_are_no_tree_and_no_struct(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(Root::decode(&bytes, "/").is_err());
        prop_assert!(kho_abi::kernel::memblock::decode(&bytes, "/").is_err());
        let _ = Metadata::decode(&bytes, "/");
    }
}
