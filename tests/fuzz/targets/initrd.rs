//! An initial RAM file system: archives behind each other, compressed or not.
#![no_main]

use fuzz::vmm::check::initrd;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = initrd::check(data).to_string();
});
