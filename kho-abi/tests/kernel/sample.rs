//! A whole handover, as a kernel would leave it.

use kho_abi::kernel::luo::{File, Luo, Session, Shared};
use kho_abi::kernel::memblock::{self, Region};
use kho_abi::kernel::memfd::{self, Folio, Memfd};
use kho_abi::kernel::metadata::{self, Metadata};
use kho_abi::kernel::root::{Root, Subtree, Version};
use kho_abi::kernel::{Image, PageSize, luo, radix};

/// Seals that a guest's RAM has.
pub const SEALS: u32 = 0b111;

/// Folios of 2 MiB, not in the order of their addresses.
pub fn folios() -> Vec<Folio> {
    let flags = Folio::DIRTY | Folio::UP_TO_DATE;
    let folio = |number: u64| Folio { address: 0x8000_0000 - (number << 21), index: number << 9, flags };
    (0..600).map(folio).collect()
}

pub fn luo(memfd: u64) -> Luo {
    let file = |compatible: &str, data, token| File { compatible: compatible.into(), data, token };
    let session = |name: &str, files| Session { name: name.into(), files };
    Luo {
        liveupdate_number: 3,
        sessions: vec![
            session("kho-vmm.index", vec![file("other-v1", 7, 0)]),
            session("kho-vmm.vm@a", vec![file(memfd::COMPATIBLE, memfd, 1)]),
            session("empty", vec![]),
        ],
        shared: vec![Shared { name: "iommu-v1".into(), data: 0x1234, count: 2 }],
    }
}

pub fn metadata() -> Metadata {
    Metadata { previous_release: "7.2.12".into(), kexec_count: 3 }
}

pub fn regions() -> Vec<Region> {
    vec![Region { name: "trace".into(), start: 0x8000_0000, size: 0x40_0000 }]
}

/// The image, and where its root is.
pub fn handover() -> (Image, u64) {
    let mut image = Image::new(PageSize::SMALL);
    let memfd = Memfd::encode(&mut image, 600 << 21, SEALS, &folios());
    let luo_at = luo(memfd).encode(&mut image);
    let metadata = metadata().encode();
    let metadata_at = image.add(&metadata);
    let regions = memblock::encode(&regions()).unwrap();
    let regions_at = image.add(&regions);
    let pages: Vec<(u64, u32)> = image.pages().map(|(address, _)| (address, 0)).collect();
    let pages = pages.into_iter().chain(folios().into_iter().map(|folio| (folio.address, 9)));
    let memory_map = radix::encode(&mut image, pages).unwrap();
    let subtree = |name: &str, address, size: usize| Subtree { name: name.into(), address, size: Some(size as u64) };
    let subtrees = vec![
        subtree(metadata::NAME, metadata_at, metadata.len()),
        subtree(memblock::NAME, regions_at, regions.len()),
        subtree(luo::NAME, luo_at, 32),
        subtree("something", 0x1000, 8),
    ];
    let root = Root { version: Version::V4, memory_map, subtrees };
    let root = image.add(&root.encode().unwrap());
    (image, root)
}
