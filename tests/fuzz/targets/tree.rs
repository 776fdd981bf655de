//! Trees without a seal, as the kernel hands them over: any, its root, and what `reserve_mem=` has set apart.
#![no_main]

use fuzz::tree;
use kho_abi::kernel::memblock::{self, Region};
use kho_abi::kernel::root::{Root, Subtree, Version};
use libfuzzer_sys::{fuzz_mutator, fuzz_target};

fn samples() -> [Vec<u8>; 3] {
    let root = |version, size| {
        let subtrees = vec![Subtree { name: "LUO".into(), address: 0x20_0000, size }];
        Root { version, memory_map: 0x10_0000, subtrees }.encode().expect("known names")
    };
    let region = Region { name: "trace".into(), start: 0x8000_0000, size: 0x40_0000 };
    [root(Version::V1, None), root(Version::V4, Some(32)), memblock::encode(&[region]).expect("known names")]
}

fuzz_mutator!(|data: &mut [u8], size: usize, _max_size: usize, seed: u32| {
    tree::change(data, size, seed, &samples())
});

fuzz_target!(|data: &[u8]| {
    tree::read(data);
    if let Ok(root) = Root::decode(data, "/") {
        assert_eq!(Root::decode(&root.encode().expect("a root that was read can be written"), "/"), Ok(root));
    }
    if let Ok(regions) = memblock::decode(data, "/") {
        let again = memblock::encode(&regions).expect("regions that were read can be written");
        assert_eq!(memblock::decode(&again, "/"), Ok(regions));
    }
});
