//! What the build has left in a kernel: its version, the names of the formats it speaks, its configuration.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

use aho_corasick::AhoCorasick;

use super::integer;

/// What a kernel runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// `x86_64`.
    X86_64,
    /// `aarch64`.
    Aarch64,
    /// Another: the number in its ELF header.
    Other(u64),
}

impl Architecture {
    /// As `uname -m` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
            Self::Other(_) => "another architecture",
        }
    }
}

/// A kernel's own configuration (`CONFIG_IKCONFIG`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config(BTreeMap<String, String>);

impl Config {
    fn parse(text: &str) -> Self {
        let line = |line: &str| line.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
        Self(text.lines().filter(|line| line.starts_with("CONFIG_")).filter_map(line).collect())
    }

    /// Whether an option is built in, or a module.
    pub fn has(&self, option: &str) -> bool {
        self.0.get(&format!("CONFIG_{option}")).is_some_and(|value| matches!(value.as_str(), "y" | "m"))
    }

    /// An option's value.
    pub fn value(&self, option: &str) -> Option<&str> {
        self.0.get(&format!("CONFIG_{option}")).map(String::as_str)
    }
}

/// A kernel, unpacked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    /// What it runs on.
    pub architecture: Architecture,
    /// Its release, as `uname -r` has it.
    pub release: Option<String>,
    /// Its page size in bytes, where it is known.
    pub page_size: Option<u64>,
    /// `kho-vN`, `luo-vN`, `memfd-vN`: what it says of the formats it speaks.
    pub formats: BTreeSet<String>,
    /// Its configuration, where it carries one.
    pub config: Option<Config>,
}

/// What is looked for: formats whose names with their versions are text in the kernel, the banner, the configuration.
const TEXTS: [&[u8]; 5] = [b"kho-v", b"luo-v", b"memfd-v", b"Linux version ", b"IKCFG_ST"];

impl Content {
    /// Looks into a kernel; None for what is none.
    pub fn read(kernel: &[u8]) -> Option<Self> {
        let architecture = architecture(kernel)?;
        let Texts { release, formats, config } = Texts::find(kernel);
        let page_size = page_size(architecture, kernel, config.as_ref());
        Some(Self { architecture, release, page_size, formats, config })
    }
}

/// What a kernel, or the memory of a running one, says of the formats it speaks.
pub fn formats(kernel: &[u8]) -> BTreeSet<String> {
    Texts::find(kernel).formats
}

#[derive(Default)]
struct Texts {
    release: Option<String>,
    formats: BTreeSet<String>,
    config: Option<Config>,
}

impl Texts {
    /// All at one pass: a kernel is tens of megabytes, and an update waits for it.
    fn find(kernel: &[u8]) -> Self {
        let mut texts = Self::default();
        // These few texts make a small automaton, which it always is possible to build.
        let Ok(search) = AhoCorasick::new(TEXTS) else { return texts };
        for found in search.find_iter(kernel) {
            let text = kernel.get(found.range()).unwrap_or_default();
            let rest = kernel.get(found.end()..).unwrap_or_default();
            match text {
                b"Linux version " => texts.release = texts.release.or_else(|| release(rest)),
                b"IKCFG_ST" => texts.config = texts.config.or_else(|| config(rest)),
                format => texts.formats.extend(version(format, rest)),
            }
        }
        texts
    }
}

/// The versions of one format, by their names.
pub fn versions<'a>(formats: &'a BTreeSet<String>, format: &'a str) -> impl Iterator<Item = &'a str> {
    let of = move |name: &&str| name.strip_prefix(format).is_some_and(|rest| rest.starts_with("-v"));
    formats.iter().map(String::as_str).filter(of)
}

fn architecture(kernel: &[u8]) -> Option<Architecture> {
    if kernel.starts_with(b"\x7fELF") {
        return Some(match integer::<2>(kernel, 18)? {
            62 => Architecture::X86_64,
            183 => Architecture::Aarch64,
            other => Architecture::Other(other),
        });
    }
    (kernel.get(0x38..0x3c) == Some(b"ARM\x64")).then_some(Architecture::Aarch64)
}

/// arm64's `image_size` (Linux's `Documentation/arch/arm64/booting.rst`).
pub fn memory(kernel: &[u8]) -> Option<u64> {
    if kernel.get(0x38..0x3c) == Some(b"ARM\x64") { integer::<8>(kernel, 0x10) } else { None }
}

/// x86_64 has one; an Image has it among its flags; else the configuration tells.
fn page_size(architecture: Architecture, kernel: &[u8], config: Option<&Config>) -> Option<u64> {
    match architecture {
        Architecture::X86_64 => Some(4096),
        Architecture::Aarch64 if !kernel.starts_with(b"\x7fELF") => match integer::<8>(kernel, 0x18)? >> 1 & 3 {
            1 => Some(4 << 10),
            2 => Some(16 << 10),
            3 => Some(64 << 10),
            _ => None,
        },
        _ => {
            let shift: u32 = config?.value("PAGE_SHIFT")?.parse().ok()?;
            1_u64.checked_shl(shift)
        }
    }
}

/// "Linux version 7.2.12 (…": the banner, not the format string for it.
fn release(rest: &[u8]) -> Option<String> {
    const LONGEST: usize = 65;
    let end = rest.iter().take(LONGEST).position(|byte| *byte == b' ')?;
    let text = std::str::from_utf8(rest.get(..end)?).ok()?;
    text.starts_with(|first: char| first.is_ascii_digit()).then(|| text.to_owned())
}

/// `NAME-vN`, ended by a NUL.
fn version(format: &[u8], rest: &[u8]) -> Option<String> {
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let number = std::str::from_utf8(rest.get(..digits)?).ok()?;
    let format = std::str::from_utf8(format).ok()?;
    ((1..=4).contains(&digits) && rest.get(digits) == Some(&0)).then(|| format!("{format}{number}"))
}

fn config(packed: &[u8]) -> Option<Config> {
    const MOST_BYTES: u64 = 4 << 20;
    let mut text = String::new();
    flate2::read::GzDecoder::new(packed).take(MOST_BYTES).read_to_string(&mut text).ok()?;
    Some(Config::parse(&text))
}
