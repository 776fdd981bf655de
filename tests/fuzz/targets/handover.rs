//! A whole handover in physical memory, with all that decodes some part of it.
#![no_main]

use fuzz::memory;
use kho_abi::kernel::dump::{Dump, Recorder};
use kho_abi::kernel::metadata::Metadata;
use kho_abi::kernel::{Limits, bitmaps, handover, scratch};
use libfuzzer_sys::{fuzz_mutator, fuzz_target};

/// Few, for more runs per second: what exceeds the usual ones exceeds these.
const LIMITS: Limits = Limits { pages: 1 << 10, entries: 1 << 12 };

fuzz_mutator!(|data: &mut [u8], size: usize, _max_size: usize, seed: u32| { memory::change(data, size, seed) });

fuzz_target!(|data: &[u8]| {
    let _ = Metadata::decode(data, "/");
    let Ok(dump) = Dump::decode(data) else { return };
    assert_eq!(Dump::decode(&dump.encode()).as_ref(), Ok(&dump));
    let Dump { image, root, scratch: (address, length) } = &dump;
    let _ = scratch::decode(image, *address, *length, "/scratch");
    let recorder = Recorder::new(image);
    let Ok(found) = handover::read(&recorder, *root, &LIMITS) else { return };
    for memfd in found.memfds.values().flatten().take(8) {
        let _ = memfd.folios(&recorder, &LIMITS, "/memfd");
    }
    if let Ok(map) = bitmaps::decode(&recorder, found.root.memory_map, &LIMITS, "/map") {
        for size in [512, 4096] {
            let _ = bitmaps::pages(&recorder, &map, size, &LIMITS, "/map");
        }
    }
    // The pages that were read are all that is needed to read it again.
    let again = handover::read(&recorder.into_image(), *root, &LIMITS).expect("the same root");
    assert_eq!(again.preserved.ok(), found.preserved.ok());
    assert_eq!(again.luo.and_then(Result::ok), found.luo.and_then(Result::ok));
});
