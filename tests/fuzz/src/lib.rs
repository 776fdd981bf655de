//! What the fuzz targets share: how their inputs are changed, so that what is wrong with one lies behind the checks that stop
//! any random bytes.
//!
//! Each file in `targets/` is a program of libFuzzer. `cargo xtask fuzz` builds and runs them with a stable toolchain; `cargo fuzz
//! run --fuzz-dir tests/fuzz TARGET` does with a nightly one.

pub mod memory;
pub mod random;
pub mod tree;

#[path = "../../../kho-abi/tests/kernel/sample.rs"]
mod sample;

/// The parts of `vmm` that decode files: it is a program, so they are taken in as they are.
#[path = "../../../vmm/src"]
pub mod vmm {
    #![allow(dead_code, missing_docs, reason = "the rest of vmm makes use of it, and it is no interface")]

    pub mod kernel_image;

    #[path = "host/check"]
    pub mod check {
        mod finding;
        pub mod initrd;

        pub use finding::Finding;
    }
}

// Its name within `vmm`.
use vmm::kernel_image;
