//! A VM's document and a host's index: what is accepted can be written, and is the same when it is read again.
#![no_main]

use fuzz::tree;
use kho_abi::document::header::{self, Kind};
use kho_abi::document::index::IndexV2;
use kho_abi::document::machine::MachineV3;
use libfuzzer_sys::{fuzz_mutator, fuzz_target};

fuzz_mutator!(|data: &mut [u8], size: usize, _max_size: usize, seed: u32| { tree::change_document(data, size, seed) });

fuzz_target!(|data: &[u8]| {
    let _ = header::length(data);
    if let Ok(machine) = MachineV3::from_bytes(data) {
        let again = machine.to_bytes().expect("a machine that was read can be written");
        assert_eq!(MachineV3::from_bytes(&again).as_ref(), Ok(&machine));
    }
    if let Ok(index) = IndexV2::from_bytes(data) {
        let again = index.to_bytes().expect("an index that was read can be written");
        assert_eq!(IndexV2::from_bytes(&again).as_ref(), Ok(&index));
    }
    for kind in [Kind::Machine, Kind::Index] {
        if let Ok(body) = header::open_as(kind, data) {
            tree::read(body);
        }
    }
});
