//! A kernel's file in any wrapper, compressed in any way.
#![no_main]

use fuzz::vmm::kernel_image::KernelImage;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(image) = KernelImage::read(data) {
        let _ = image.content.versions("kho").count();
    }
});
