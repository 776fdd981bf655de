//! A kernel's file in any wrapper, compressed in any way.
#![no_main]

use fuzz::vmm::kernel_image::{self, KernelImage};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(image) = KernelImage::read(data) {
        let _ = kernel_image::versions(&image.content.formats, "kho").count();
    }
});
