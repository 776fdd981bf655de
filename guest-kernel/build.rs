//! Hands the linker script to the linker when the image is built for its bare-metal target, and only then: on a host the
//! package is a library like any other.

use std::{env, path::PathBuf};

fn main() {
    let variable = |name| env::var(name).unwrap_or_default();
    if variable("CARGO_CFG_TARGET_OS") != "none" {
        return;
    }
    let architecture = variable("CARGO_CFG_TARGET_ARCH");
    let script = PathBuf::from(variable("CARGO_MANIFEST_DIR")).join("src/arch").join(architecture).join("link.ld");
    println!("cargo:rerun-if-changed={}", script.display());
    println!("cargo:rustc-link-arg-bin=oracle=--script={}", script.display());
    // The target's default is a position-independent image; a loader of kernels relocates nothing.
    println!("cargo:rustc-link-arg-bin=oracle=--no-pie");
    println!("cargo:rustc-link-arg-bin=oracle=-zmax-page-size=4096");
}
