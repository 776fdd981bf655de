//! x87, SSE, AVX and what else of the extended state the CPU has. The kernel is built without any of these registers, so they
//! keep their values through all it does, and are only ever compared.

use core::arch::asm;

use guest_kernel::pattern::scramble;

use super::{cpu, cpuid, number};
use crate::console::damage;

/// x87, SSE, AVX, and the three parts of AVX-512.
const WANTED: u64 = 0b1110_0111;
/// The largest area those have.
const SIZE: usize = 4096;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const CR4_OSXSAVE: u64 = 1 << 18;

/// As FXSAVE and XSAVE write it.
#[repr(C, align(64))]
struct Area([u8; SIZE]);

/// A part of the area that is to stay as it is.
#[derive(Clone, Copy)]
struct Part {
    name: &'static str,
    offset: usize,
    size: usize,
}

/// The live state, as it was loaded.
pub struct Vectors {
    /// Which parts XSAVE handles; 0 where the CPU only has FXSAVE.
    enabled: u64,
    expected: Area,
    found: Area,
    parts: [Part; 20],
    count: usize,
}

impl Vectors {
    /// Switches the registers on and loads them.
    pub fn new() -> Self {
        let has_xsave = cpuid::has_xsave();
        let bits = CR4_OSFXSR | CR4_OSXMMEXCPT | if has_xsave { CR4_OSXSAVE } else { 0 };
        cpu::write_cr4(cpu::read_cr4() | bits);
        let mut enabled = 0;
        if has_xsave {
            enabled = cpuid::extended_state() & WANTED;
            // The parts of AVX-512 come together or not at all.
            if enabled >> 5 != 0b111 {
                enabled &= 0b111;
            }
            cpu::write_xcr0(enabled);
        }
        let mut vectors = Vectors {
            enabled,
            expected: Area([0; SIZE]),
            found: Area([0; SIZE]),
            parts: [Part { name: "", offset: 0, size: 0 }; 20],
            count: 0,
        };
        vectors.fill();
        vectors.load();
        vectors
    }

    /// Whether a part is there.
    pub fn has(&self, bit: u32) -> bool {
        self.enabled & 1 << bit != 0
    }

    fn add(&mut self, name: &'static str, offset: usize, size: usize) {
        if offset + size <= SIZE && self.count < self.parts.len() {
            self.parts[self.count] = Part { name, offset, size };
            self.count += 1;
        }
    }

    fn fill(&mut self) {
        self.add("x87-control", 0, 2);
        self.add("x87-status", 2, 2);
        self.add("x87-tag", 4, 1);
        for register in 0..8 {
            self.add("x87", 32 + 16 * register, 10);
        }
        self.add("mxcsr", 24, 4);
        self.add("xmm", 160, 256);
        for (bit, name) in [(2, "ymm"), (5, "opmask"), (6, "zmm-upper"), (7, "zmm-high")] {
            if self.has(bit) {
                let (size, offset) = cpuid::extended_part(bit);
                self.add(name, offset, size);
            }
        }
        let own = (number() as u64) << 32;
        for (index, byte) in self.expected.0.iter_mut().enumerate() {
            let kept =
                self.parts[..self.count].iter().any(|part| (part.offset..part.offset + part.size).contains(&index));
            *byte = if kept { scramble(index as u64 | own) as u8 } else { 0 };
        }
        self.expected.0[..5].copy_from_slice(&[
            0x7f, 0x0e, // all exceptions masked, double precision, towards zero
            0x00, 0x1d, // the top is register 3, and some condition bits
            0xff, // all registers in use
        ]);
        self.expected.0[24..28].copy_from_slice(&0x0000_7f80u32.to_le_bytes()); // exceptions masked, towards zero
        self.expected.0[512..520].copy_from_slice(&self.enabled.to_le_bytes());
    }

    fn load(&self) {
        let area = self.expected.0.as_ptr();
        if self.enabled == 0 {
            // SAFETY: a valid area; the kernel itself uses none of these registers.
            unsafe { asm!("fxrstor64 [{}]", in(reg) area, options(nostack)) };
        } else {
            // SAFETY: as above, and the parts are those enabled.
            unsafe {
                asm!("xrstor64 [{}]", in(reg) area, in("eax") self.enabled as u32, in("edx") 0, options(nostack))
            };
        }
    }

    fn save(&mut self) {
        let area = self.found.0.as_mut_ptr();
        if self.enabled == 0 {
            // SAFETY: writes 512 bytes of the area.
            unsafe { asm!("fxsave64 [{}]", in(reg) area, options(nostack)) };
        } else {
            // SAFETY: the area is as large as the parts enabled need, which `add` has seen to.
            unsafe { asm!("xsave64 [{}]", in(reg) area, in("eax") self.enabled as u32, in("edx") 0, options(nostack)) };
        }
    }

    /// Compares, and puts right what is wrong.
    pub fn check(&mut self) {
        self.save();
        let mut wrong = false;
        for part in &self.parts[..self.count] {
            let place = part.offset..part.offset + part.size;
            let (expected, found) = (&self.expected.0[place.clone()], &self.found.0[place]);
            if let Some(index) = expected.iter().zip(found).position(|(expected, found)| expected != found) {
                wrong = true;
                damage(
                    part.name,
                    format_args!(
                        "offset={} byte={index} expected={:#04x} found={:#04x}",
                        part.offset, expected[index], found[index]
                    ),
                );
            }
        }
        if wrong {
            self.load();
        }
    }

    /// Changes one bit of a part: for the self-test.
    pub fn strike(&mut self, name: &str) {
        let Some(part) = self.parts[..self.count].iter().find(|part| part.name == name).copied() else { return };
        let last = part.offset + part.size - 1;
        self.expected.0[last] ^= 0x10;
        self.load();
        self.expected.0[last] ^= 0x10;
    }
}
