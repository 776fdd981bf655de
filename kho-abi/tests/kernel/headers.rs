//! Sizes, offsets, names and numbers against the kernel's own headers, where they are there: a C compiler is asked.
//!
//! They are looked for in `$KHO_ABI_HEADERS` (a kernel's source tree), and in unpacked kernel sources under `/usr/src`.

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use kho_abi::kernel::luo::{RawFile, RawLuo, RawSession, RawShared, RawSharedHeader};
use kho_abi::kernel::memfd::{Folio, RawFolio, RawMemfd};
use kho_abi::kernel::metadata::RawMetadata;
use kho_abi::kernel::vmalloc::Area;
use kho_abi::kernel::{blocks, luo, memblock, memfd, metadata, root::Version};

fn find() -> Option<PathBuf> {
    let named = env::var_os("KHO_ABI_HEADERS").map(PathBuf::from);
    let sources = fs::read_dir("/usr/src").into_iter().flatten().flatten().map(|tree| tree.path());
    named.into_iter().chain(sources).find(|tree| tree.join("include/linux/kho/abi/luo.h").is_file())
}

/// What the headers take from the rest of the kernel.
const PRELUDE: &str = r#"
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
typedef uint64_t u64; typedef uint32_t u32; typedef uint64_t phys_addr_t;
typedef uint64_t __aligned_u64; typedef uint32_t __u32; typedef int32_t __s32; typedef uint8_t __u8;
#define __packed __attribute__((packed))
#define PAGE_SHIFT 12
#define PAGE_SIZE 4096UL
#define BITS_PER_BYTE 8
#define BIT(n) (1UL << (n))
#define ALIGN(x, a) (((x) + (a) - 1) / (a) * (a))
#define DIV_ROUND_UP(n, d) (((n) + (d) - 1) / (d))
#define const_ilog2(n) (63 - __builtin_clzl(n))
#define DECLARE_BITMAP(name, bits) unsigned long name[(bits) / 64]
#define static_assert _Static_assert
#define __NEW_UTS_LEN 64
#define _IO(type, number) ((type) << 8 | (number))
"#;

/// Headers of the kernel that others of it name, and that [`PRELUDE`] replaces.
const REPLACED: [&str; 7] =
    ["linux/bits.h", "linux/log2.h", "linux/math.h", "linux/types.h", "linux/align.h", "linux/utsname.h", "asm/page.h"];

/// Asks a C compiler for expressions, strings and numbers.
fn ask(tree: &Path, numbers: &[String], strings: &[&str]) -> BTreeMap<String, String> {
    let folder = tempfile::tempdir().unwrap();
    for header in REPLACED.into_iter().chain(["linux/ioctl.h"]) {
        let path = folder.path().join(header);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    }
    for part in ["linux/kho/abi", "uapi/linux"] {
        let to = folder.path().join(part);
        fs::create_dir_all(&to).unwrap();
        for file in fs::read_dir(tree.join("include").join(part)).unwrap().flatten() {
            if part == "linux/kho/abi" || file.file_name() == "liveupdate.h" {
                fs::copy(file.path(), to.join(file.file_name())).unwrap();
            }
        }
    }
    let includes: String = ["luo", "memfd", "memblock", "kexec_metadata", "block", "kexec_handover"]
        .map(|name| format!("#include <linux/kho/abi/{name}.h>\n"))
        .concat();
    let print_number = |expression: &String| {
        format!("printf(\"%s=%llu\\n\", \"{expression}\", (unsigned long long)({expression}));\n")
    };
    let print_string = |name: &&str| format!("printf(\"%s=%s\\n\", \"{name}\", {name});\n");
    let body: String = numbers.iter().map(print_number).chain(strings.iter().map(print_string)).collect();
    let source = folder.path().join("ask.c");
    fs::write(&source, format!("{PRELUDE}{includes}int main(void) {{\n{body}return 0; }}\n")).unwrap();
    let program = folder.path().join("ask");
    let compiled =
        Command::new("cc").arg("-I").arg(folder.path()).args([&source, Path::new("-o"), &program]).output().unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let said = Command::new(program).output().unwrap();
    let said = String::from_utf8(said.stdout).unwrap();
    said.lines().filter_map(|line| line.split_once('=')).map(|(name, value)| (name.into(), value.into())).collect()
}

/// The size of a struct and where its fields are, ours beside the kernel's expression for it.
macro_rules! layout {
    ($ours:ident = $theirs:literal { $($field:ident = $name:literal),* $(,)? }) => {
        vec![
            (format!("sizeof(struct {})", $theirs), size_of::<$ours>() as u64),
            $((format!("offsetof(struct {}, {})", $theirs, $name), offset_of!($ours, $field) as u64),)*
        ]
    };
}

#[test]
fn structs_names_and_numbers_are_those_of_the_kernel() {
    let Some(tree) = find() else {
        println!("skipped: no kernel sources with include/linux/kho/abi here, name some in KHO_ABI_HEADERS");
        return;
    };
    use kho_abi::kernel::blocks::Header;
    let structs = [
        layout!(RawLuo = "luo_ser" {
            compatible = "compatible", liveupdate_number = "liveupdate_num", sessions = "sessions_pa", shared = "flbs_pa",
        }),
        layout!(RawSession = "luo_session_ser" {
            name = "name", files = "file_set_ser.files", count = "file_set_ser.count",
        }),
        layout!(RawFile = "luo_file_ser" { compatible = "compatible", data = "data", token = "token" }),
        layout!(RawSharedHeader = "luo_flb_header_ser" { pages = "pgcnt", count = "count" }),
        layout!(RawShared = "luo_flb_ser" { name = "name", data = "data", count = "count" }),
        layout!(RawMemfd = "memfd_luo_ser" {
            position = "pos", size = "size", seals = "seals", flags = "flags", folio_count = "nr_folios", folios = "folios",
        }),
        layout!(RawFolio = "memfd_luo_folio_ser" { index = "index" }),
        layout!(Area = "kho_vmalloc" { first = "first", total_pages = "total_pages", flags = "flags", order = "order" }),
        layout!(Header = "kho_block_header_ser" { next = "next", count = "count" }),
        layout!(RawMetadata = "kho_kexec_metadata" {
            version = "version", previous_release = "previous_release", kexec_count = "kexec_count",
        }),
    ];
    let constants = [
        ("MEMFD_LUO_FOLIO_DIRTY", u64::from(Folio::DIRTY)),
        ("MEMFD_LUO_FOLIO_UPTODATE", u64::from(Folio::UP_TO_DATE)),
        ("KHO_KEXEC_METADATA_VERSION", u64::from(metadata::VERSION)),
        ("KHO_BLOCK_SIZE", 4096),
        ("KHO_TREE_MAX_DEPTH", 6),
        ("KHO_ORDER_0_LOG2", 52),
    ];
    let constants = constants.map(|(name, value)| (name.to_string(), value));
    let numbers: BTreeMap<String, u64> = structs.into_iter().flatten().chain(constants).collect();
    let strings = [
        ("KHO_FDT_COMPATIBLE", Version::V4.name()),
        ("LUO_ABI_COMPATIBLE", luo::COMPATIBLE),
        ("LUO_KHO_ENTRY_NAME", luo::NAME),
        ("MEMFD_LUO_FH_COMPATIBLE", memfd::COMPATIBLE),
        ("MEMBLOCK_KHO_FDT", memblock::NAME),
        ("KHO_METADATA_NODE_NAME", metadata::NAME),
        ("KHO_FDT_MEMORY_MAP_PROP_NAME", "preserved-memory-map"),
        ("KHO_SUB_TREE_PROP_NAME", "preserved-data"),
        ("KHO_SUB_TREE_SIZE_PROP_NAME", "blob-size"),
    ];
    let asked: Vec<String> = numbers.keys().cloned().collect();
    let found = ask(&tree, &asked, &strings.map(|(name, _)| name));
    let ours = numbers.into_iter().map(|(name, value)| (name, value.to_string()));
    let ours: BTreeMap<String, String> =
        ours.chain(strings.map(|(name, value)| (name.to_string(), value.to_string()))).collect();
    assert_eq!(found, ours, "{}", tree.display());
    assert_eq!(blocks::MAX_BLOCKS, 10_000);
    println!("compared with {}", tree.display());
}
