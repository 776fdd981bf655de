//! Handovers of real kernels: what `vmm inspect --host --save` wrote in the lab, one dump of each kernel on each architecture. See
//! `tests/golden/README.md`. They are never written again.

use std::fs;
use std::path::Path;

use kho_abi::kernel::dump::Dump;
use kho_abi::kernel::root::Version;
use kho_abi::kernel::{Limits, handover};

/// File, the kernel's release as the next one would be told it, number of the next live update.
const DUMPS: [(&str, &str, u64); 4] = [
    ("handover-7.2-x86_64.dump", "7.2.12", 1),
    ("handover-7.2-aarch64.dump", "7.2.12", 1),
    ("handover-7.3-x86_64.dump", "7.3.4", 2),
    ("handover-7.3-aarch64.dump", "7.3.4", 2),
];

fn golden(file: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(file);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn handovers_of_real_kernels_are_understood() {
    for (file, release, number) in DUMPS {
        let dump = Dump::decode(&golden(file)).unwrap();
        let found = handover::read(&dump.image, dump.root, &Limits::default()).unwrap();
        assert_eq!(found.root.version, Version::V4, "{file}");
        assert_eq!(found.unknown().count(), 0, "{file}");
        let preserved = found.preserved.unwrap();
        assert!(preserved.map_pages > 0 && !preserved.ranges.is_empty(), "{file}");
        let metadata = found.metadata.unwrap().unwrap();
        assert_eq!(metadata.previous_release, release, "{file}");
        assert_eq!(found.luo.unwrap().unwrap().liveupdate_number, number, "{file}");
    }
}

#[test]
fn a_dump_of_a_real_kernel_that_is_cut_short_or_has_a_page_less_is_refused_or_says_what_is_missing() {
    let bytes = golden(DUMPS[0].0);
    for length in (0..bytes.len()).step_by(97) {
        assert!(Dump::decode(&bytes[..length]).is_err(), "{length}");
    }
}
