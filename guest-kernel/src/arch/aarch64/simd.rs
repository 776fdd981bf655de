//! The SIMD registers, and what SVE adds to them. The kernel is built without any of these registers, so they keep their values
//! through all it does, and are only ever compared.

use core::arch::asm;

use guest_kernel::pattern::scramble;

use super::cpu::{read_register, write_register};
use super::number;
use crate::console::damage;

const REGISTERS: usize = 32;
const PREDICATES: usize = 16;
/// The largest vector there is, in bytes.
const LARGEST: usize = 256;
/// A SIMD register: the lower part of a vector.
const SIMD: usize = 16;

/// No traps for SIMD (FPEN) and SVE (ZEN).
const NO_TRAPS: u64 = 3 << 20 | 3 << 16;
/// Alternative half precision, default NaN, flush to zero, round towards zero.
const CONTROL: u64 = 0x07c0_0000;
/// Saturation and all exceptions that have been.
const STATUS: u64 = 0x0800_009f;

/// As the loads and stores below lay it out.
#[repr(C, align(64))]
struct Area {
    vectors: [u8; REGISTERS * LARGEST],
    predicates: [u8; PREDICATES * LARGEST / 8],
    first_fault: [u8; LARGEST / 8],
}

/// The live state, as it was loaded.
pub struct Simd {
    expected: Area,
    found: Area,
    /// The size of a vector in bytes; 16 where there is no SVE.
    size: usize,
}

impl Simd {
    /// Switches the registers on and loads them.
    pub fn new() -> Self {
        write_register!("cpacr_el1", read_register!("cpacr_el1") | NO_TRAPS);
        let size = if has_sve() {
            write_register!("S3_0_C1_C2_0", 0xf); // ZCR_EL1: the longest there are
            vector_size()
        } else {
            SIMD
        };
        let empty = || Area { vectors: [0; _], predicates: [0; _], first_fault: [0; _] };
        // Each CPU has other values.
        let own = (number() as u64) << 32;
        let mut simd = Simd { expected: empty(), found: empty(), size };
        for (index, byte) in simd.expected.vectors[..REGISTERS * size].iter_mut().enumerate() {
            *byte = scramble(index as u64 | own) as u8;
        }
        if simd.has_sve() {
            for (index, byte) in simd.expected.predicates[..PREDICATES * size / 8].iter_mut().enumerate() {
                *byte = scramble(!(index as u64 | own)) as u8;
            }
            // All the elements before the first fault, and none after it: another value is not allowed.
            simd.expected.first_fault[..size / 16].fill(0xff);
        }
        simd.load();
        simd
    }

    /// Whether there is more than SIMD.
    pub fn has_sve(&self) -> bool {
        self.size > SIMD
    }

    /// The size of a vector in bits.
    pub fn bits(&self) -> usize {
        self.size * 8
    }

    fn load(&self) {
        write_register!("S3_3_C4_C4_0", CONTROL);
        write_register!("S3_3_C4_C4_1", STATUS);
        let vectors = self.expected.vectors.as_ptr();
        if !self.has_sve() {
            // SAFETY: reads within the array; the kernel itself uses none of these registers.
            unsafe {
                asm!(
                    ".arch_extension fp",
                    ".arch_extension simd",
                    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
                    "ldr q\\n, [{vectors}, #16 * \\n]",
                    ".endr",
                    vectors = in(reg) vectors,
                    options(nostack)
                );
            }
            return;
        }
        // SAFETY: as above; the arrays have room for the largest vectors there are.
        unsafe {
            asm!(
                ".arch_extension sve",
                "ldr p0, [{first_fault}]",
                "wrffr p0.b",
                ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
                "ldr p\\n, [{predicates}, #\\n, mul vl]",
                ".endr",
                ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
                "ldr z\\n, [{vectors}, #\\n, mul vl]",
                ".endr",
                vectors = in(reg) vectors,
                predicates = in(reg) self.expected.predicates.as_ptr(),
                first_fault = in(reg) self.expected.first_fault.as_ptr(),
                options(nostack)
            );
        }
    }

    fn save(&mut self) {
        let vectors = self.found.vectors.as_mut_ptr();
        if !self.has_sve() {
            // SAFETY: writes within the array.
            unsafe {
                asm!(
                    ".arch_extension fp",
                    ".arch_extension simd",
                    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
                    "str q\\n, [{vectors}, #16 * \\n]",
                    ".endr",
                    vectors = in(reg) vectors,
                    options(nostack)
                );
            }
            return;
        }
        // SAFETY: as above; the arrays have room for the largest vectors there are.
        unsafe {
            asm!(
                ".arch_extension sve",
                ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
                "str z\\n, [{vectors}, #\\n, mul vl]",
                ".endr",
                ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
                "str p\\n, [{predicates}, #\\n, mul vl]",
                ".endr",
                "rdffr p0.b",
                "str p0, [{first_fault}]",
                "ldr p0, [{predicates}]",
                vectors = in(reg) vectors,
                predicates = in(reg) self.found.predicates.as_mut_ptr(),
                first_fault = in(reg) self.found.first_fault.as_mut_ptr(),
                options(nostack)
            );
        }
    }

    /// Compares, and puts right what is wrong.
    pub fn check(&mut self) {
        if self.has_sve() {
            let found = vector_size();
            if found != self.size {
                damage("sve", format_args!("expected_bytes={} found_bytes={found}", self.size));
                return;
            }
        }
        self.save();
        let mut wrong = false;
        let vectors = self.expected.vectors.chunks(self.size).zip(self.found.vectors.chunks(self.size));
        for (register, (expected, found)) in vectors.take(REGISTERS).enumerate() {
            wrong |= differs("simd", "v", register, &expected[..SIMD], &found[..SIMD]);
            wrong |= differs("sve", "z", register, &expected[SIMD..], &found[SIMD..]);
        }
        if self.has_sve() {
            let size = self.size / 8;
            let predicates = self.expected.predicates.chunks(size).zip(self.found.predicates.chunks(size));
            for (register, (expected, found)) in predicates.take(PREDICATES).enumerate() {
                wrong |= differs("sve", "p", register, expected, found);
            }
            wrong |= differs("sve", "ffr", 0, &self.expected.first_fault[..size], &self.found.first_fault[..size]);
        }
        for (name, expected, found) in
            [("fpcr", CONTROL, read_register!("S3_3_C4_C4_0")), ("fpsr", STATUS, read_register!("S3_3_C4_C4_1"))]
        {
            if expected != found {
                wrong = true;
                damage("simd", format_args!("name={name} expected={expected:#x} found={found:#x}"));
            }
        }
        if wrong {
            self.load();
        }
    }

    /// Changes the last bit of a register, or of what SVE adds to it: for the self-test.
    pub fn strike(&mut self, sve: bool) {
        let last = 5 * self.size + if sve { self.size } else { SIMD } - 1;
        self.expected.vectors[last] ^= 0x10;
        self.load();
        self.expected.vectors[last] ^= 0x10;
    }
}

fn differs(what: &str, name: &str, register: usize, expected: &[u8], found: &[u8]) -> bool {
    let Some(byte) = expected.iter().zip(found).position(|(expected, found)| expected != found) else { return false };
    let (expected, found) = (expected[byte], found[byte]);
    damage(what, format_args!("name={name}{register} byte={byte} expected={expected:#04x} found={found:#04x}"));
    true
}

fn has_sve() -> bool {
    read_register!("id_aa64pfr0_el1") >> 32 & 0xf != 0
}

/// The size of a vector in bytes.
fn vector_size() -> usize {
    let size: usize;
    // SAFETY: only asks.
    unsafe { asm!(".arch_extension sve", "rdvl {}, #1", out(reg) size, options(nostack)) };
    size.min(LARGEST)
}
