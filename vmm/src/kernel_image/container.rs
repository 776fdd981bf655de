//! What the kernel is wrapped in for its boot loader.

use super::{ImageError, integer};

/// The part of a file that is the kernel, compressed or not.
pub struct Payload<'a> {
    /// What the file is.
    pub form: &'static str,
    /// That part.
    pub bytes: &'a [u8],
    /// The bytes of memory that the kernel takes when it starts, where its wrapper says so.
    pub memory: Option<u64>,
}

/// Finds it. What is neither of the wrappers is taken for the kernel itself.
pub fn open(file: &[u8]) -> Result<Payload<'_>, ImageError> {
    if file.get(0x202..0x206) == Some(b"HdrS") {
        return bzimage(file);
    }
    if file.starts_with(b"MZ") && file.get(4..8) == Some(b"zimg") {
        return zboot(file);
    }
    if file.get(0x38..0x3c) == Some(b"ARM\x64") {
        sections(file)?;
        most_of_it(file)?;
        return Ok(Payload { form: "Image", bytes: file, memory: None });
    }
    let form = if file.starts_with(b"\x7fELF") { "ELF file" } else { "compressed kernel" };
    Ok(Payload { form, bytes: file, memory: None })
}

fn part<'a>(file: &'a [u8], what: &'static str, start: u64, length: u64) -> Result<&'a [u8], ImageError> {
    let end = start.saturating_add(length);
    let range = usize::try_from(start).ok().zip(usize::try_from(end).ok());
    let bytes = range.and_then(|(start, end)| file.get(start..end));
    bytes.ok_or(ImageError::Truncated { what, end, length: file.len() as u64 })
}

/// Linux's `Documentation/arch/x86/boot.rst`.
fn bzimage(file: &[u8]) -> Result<Payload<'_>, ImageError> {
    const SECTOR: u64 = 512;
    let field = |at, wide| if wide { integer::<4>(file, at) } else { integer::<1>(file, at) };
    let cut = ImageError::Truncated { what: "its header", end: 0x250, length: file.len() as u64 };
    let (Some(sectors), Some(paragraphs), Some(offset), Some(length)) =
        (field(0x1f1, false), field(0x1f4, true), field(0x248, true), field(0x24c, true))
    else {
        return Err(cut);
    };
    // 0 stands for 4, as it did for boot loaders of the last century.
    let setup = (if sectors == 0 { 4 } else { sectors } + 1) * SECTOR;
    let whole = part(file, "the kernel", setup, paragraphs * 16)?;
    let payload = part(whole, "the compressed kernel", offset, length)?;
    // Behind it is its size, except where the format has that already.
    let bytes = match payload {
        [rest @ .., _, _, _, _] if !rest.starts_with(&[0x1f, 0x8b]) => rest,
        all => all,
    };
    Ok(Payload { form: "bzImage", bytes, memory: field(0x260, true) })
}

/// Linux's `drivers/firmware/efi/libstub/zboot-header.S`.
fn zboot(file: &[u8]) -> Result<Payload<'_>, ImageError> {
    let cut = || ImageError::Truncated { what: "its header", end: 16, length: file.len() as u64 };
    let offset = integer::<4>(file, 8).ok_or_else(cut)?;
    let length = integer::<4>(file, 12).ok_or_else(cut)?;
    Ok(Payload { form: "EFI zboot", bytes: part(file, "the compressed kernel", offset, length)?, memory: None })
}

/// An Image does not say how long its file is, but is an EFI program as well, whose sections do.
fn sections(file: &[u8]) -> Result<(), ImageError> {
    let Some(header) = integer::<4>(file, 0x3c).and_then(|at| usize::try_from(at).ok()) else { return Ok(()) };
    if !file.starts_with(b"MZ") || file.get(header..header.saturating_add(4)) != Some(b"PE\0\0") {
        return Ok(());
    }
    let count = integer::<2>(file, header + 6).unwrap_or_default() as usize;
    let optional = integer::<2>(file, header + 20).unwrap_or_default() as usize;
    for number in 0..count {
        let at = header + 24 + optional + 40 * number;
        if let (Some(length), Some(start)) = (integer::<4>(file, at + 16), integer::<4>(file, at + 20)) {
            part(file, "a section of the kernel", start, length)?;
        }
    }
    Ok(())
}

/// Without an EFI header only the memory that it will take is known. What the file does not have of it begins as zeroes, which is a
/// small part of any kernel.
fn most_of_it(file: &[u8]) -> Result<(), ImageError> {
    let memory = integer::<8>(file, 0x10).unwrap_or_default();
    part(file, "half of what the kernel will take", 0, memory / 2).map(|_| ())
}
