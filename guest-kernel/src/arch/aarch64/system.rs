//! System registers: those that are given a value of ours, those that only have to keep theirs, and those that say what the CPU is.

use super::cpu::{read_register, write_register};
use super::{memory, number};
use crate::console::damage;

/// A system register.
struct Register {
    name: &'static str,
    read: fn() -> u64,
    write: fn(u64),
    /// None: it keeps what it has.
    value: Option<u64>,
    /// Whether this CPU has it.
    present: fn() -> bool,
}

macro_rules! register {
    ($name:literal) => {
        register!($name, $name, None, || true)
    };
    ($name:literal, $value:expr) => {
        register!($name, $name, Some($value), || true)
    };
    ($name:literal, $encoding:literal, $value:expr, $present:expr) => {
        Register {
            name: $name,
            read: || read_register!($encoding),
            write: |value| write_register!($encoding, value),
            value: $value,
            present: $present,
        }
    };
}

/// What ESR_EL1 and FAR_EL1 hold: expected exceptions put it back.
pub const SYNDROME: u64 = 0x5600_1234;
/// See [`SYNDROME`].
pub const FAULT_ADDRESS: u64 = 0x7ead_beef_1230;
const TPIDR_EL1: usize = 2;

static REGISTERS: [Register; 38] = [
    register!("tpidr_el0", 0x5a5a_1234_5678_9abc),
    register!("tpidrro_el0", 0x1357_9bdf_0246_8ace),
    register!("tpidr_el1", 0xc001_d00d_f00d_0123),
    register!("contextidr_el1", 0x7ab5_c0de),
    register!("mair_el1", memory::ATTRIBUTES),
    register!("amair_el1", 0x0123_4567_89ab_cdef),
    register!("afsr0_el1", 0x1234_5678),
    register!("afsr1_el1", 0x8765_4321),
    register!("esr_el1", SYNDROME),
    register!("far_el1", FAULT_ADDRESS),
    register!("par_el1", 0x0000_0012_3456_7000),
    // Walks through it are switched off.
    register!("ttbr1_el1", 0x00c3_0000_7654_3000),
    // What EL0 may do with timers; nothing runs there.
    register!("cntkctl_el1", 0x2a3),
    // The second level's data cache, should there be one: the description below is of it.
    register!("csselr_el1", 2),
    register!("ccsidr_el1", "S3_1_C0_C0_0", None, || true),
    register!("sctlr_el1"),
    register!("tcr_el1"),
    register!("ttbr0_el1"),
    register!("vbar_el1"),
    register!("cpacr_el1"),
    register!("cntfrq_el0"),
    register!("zcr_el1", "S3_0_C1_C2_0", None, || field("S3_0_C0_C4_0", 32)),
    register!("scxtnum_el0", "S3_3_C13_C0_7", Some(0x5c5c_0123), has_context_numbers),
    register!("scxtnum_el1", "S3_0_C13_C0_7", Some(0xc5c5_3210), has_context_numbers),
    register!("tcr2_el1", "S3_0_C2_C0_3", None, || field("S3_0_C0_C7_3", 0)),
    // Permission indirection is not switched on, so any value does.
    register!("pire0_el1", "S3_0_C10_C2_2", Some(0x0123_0456_0123_0456), || field("S3_0_C0_C7_3", 8)),
    register!("pir_el1", "S3_0_C10_C2_3", Some(0x6543_2106_5432_1065), || field("S3_0_C0_C7_3", 8)),
    register!("por_el1", "S3_0_C10_C2_4", Some(0x7654_3210_7654_3210), || field("S3_0_C0_C7_3", 16)),
    // Neither is pointer authentication.
    register!("apiakeylo_el1", "S3_0_C2_C1_0", Some(0x0101_0101_a5a5_0001), has_pointer_authentication),
    register!("apiakeyhi_el1", "S3_0_C2_C1_1", Some(0x0101_0101_a5a5_0002), has_pointer_authentication),
    register!("apibkeylo_el1", "S3_0_C2_C1_2", Some(0x0101_0101_a5a5_0003), has_pointer_authentication),
    register!("apibkeyhi_el1", "S3_0_C2_C1_3", Some(0x0101_0101_a5a5_0004), has_pointer_authentication),
    register!("apdakeylo_el1", "S3_0_C2_C2_0", Some(0x0101_0101_a5a5_0005), has_pointer_authentication),
    register!("apdakeyhi_el1", "S3_0_C2_C2_1", Some(0x0101_0101_a5a5_0006), has_pointer_authentication),
    register!("apdbkeylo_el1", "S3_0_C2_C2_2", Some(0x0101_0101_a5a5_0007), has_pointer_authentication),
    register!("apdbkeyhi_el1", "S3_0_C2_C2_3", Some(0x0101_0101_a5a5_0008), has_pointer_authentication),
    register!("apgakeylo_el1", "S3_0_C2_C3_0", Some(0x0101_0101_a5a5_0009), has_pointer_authentication),
    register!("apgakeyhi_el1", "S3_0_C2_C3_1", Some(0x0101_0101_a5a5_000a), has_pointer_authentication),
];

fn field(identification: &str, shift: u32) -> bool {
    let value = match identification {
        "S3_0_C0_C4_0" => read_register!("S3_0_C0_C4_0"),
        _ => read_register!("S3_0_C0_C7_3"),
    };
    value >> shift & 0xf != 0
}

fn has_context_numbers() -> bool {
    let (first, second) = (read_register!("S3_0_C0_C4_0"), read_register!("S3_0_C0_C4_1"));
    first >> 56 & 0xf >= 2 || second >> 32 & 0xf != 0
}

fn has_pointer_authentication() -> bool {
    let (first, second) = (read_register!("S3_0_C0_C6_1"), read_register!("S3_0_C0_C6_2"));
    first >> 4 & 0xff != 0 || second >> 12 & 0xf != 0
}

/// How a value differs on this CPU, so that none is taken for another's. Translation is the same on all.
fn own(register: &Register) -> u64 {
    let differs =
        register.name.starts_with("tpidr") || register.name.starts_with("ap") || register.name == "contextidr_el1";
    if differs { (number() as u64) << 16 } else { 0 }
}

type Row = [fn() -> u64; 8];

/// The identification registers with this CRm, of which those that are not assigned read as zero.
macro_rules! row {
    ($row:literal) => {
        [
            || read_register!(concat!("S3_0_C0_C", $row, "_0")),
            || read_register!(concat!("S3_0_C0_C", $row, "_1")),
            || read_register!(concat!("S3_0_C0_C", $row, "_2")),
            || read_register!(concat!("S3_0_C0_C", $row, "_3")),
            || read_register!(concat!("S3_0_C0_C", $row, "_4")),
            || read_register!(concat!("S3_0_C0_C", $row, "_5")),
            || read_register!(concat!("S3_0_C0_C", $row, "_6")),
            || read_register!(concat!("S3_0_C0_C", $row, "_7")),
        ]
    };
}

static IDENTIFICATION: [Row; 8] = [
    [
        || read_register!("midr_el1"),
        || read_register!("mpidr_el1"),
        || read_register!("revidr_el1"),
        || read_register!("aidr_el1"),
        || read_register!("ctr_el0"),
        || read_register!("dczid_el0"),
        || read_register!("clidr_el1"),
        || read_register!("oslsr_el1"),
    ],
    row!("1"),
    row!("2"),
    row!("3"),
    row!("4"),
    row!("5"),
    row!("6"),
    row!("7"),
];
const FIRST_NAMES: [&str; 8] = ["midr", "mpidr", "revidr", "aidr", "ctr", "dczid", "clidr", "oslsr"];

/// All of it as it was at the start.
pub struct System {
    registers: [Option<u64>; REGISTERS.len()],
    identification: [[u64; 8]; IDENTIFICATION.len()],
}

impl System {
    /// In how many parts [`System::check_identification`] is done.
    pub const ROWS: usize = IDENTIFICATION.len();

    /// Sets all and remembers it.
    pub fn new() -> Self {
        let mut registers = [None; REGISTERS.len()];
        for (known, register) in registers.iter_mut().zip(&REGISTERS) {
            if (register.present)() {
                if let Some(value) = register.value {
                    (register.write)(value ^ own(register));
                }
                // A CPU may keep fewer bits than were written; it has to keep those.
                *known = Some((register.read)());
            }
        }
        System { registers, identification: IDENTIFICATION.map(|row| row.map(|read| read())) }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.registers.iter().flatten().count()
    }

    /// Registers; what is wrong is put right where it can be.
    pub fn check(&mut self) {
        for (expected, register) in self.registers.iter_mut().zip(&REGISTERS) {
            let Some(expected) = expected else { continue };
            let found = (register.read)();
            if found != *expected {
                damage("sysreg", format_args!("name={} expected={expected:#018x} found={found:#018x}", register.name));
                match register.value {
                    Some(_) => (register.write)(*expected),
                    None => *expected = found,
                }
            }
        }
    }

    /// One row of those that say what the CPU is; what was found is expected from then on.
    pub fn check_identification(&mut self, row: usize) {
        for (column, (expected, read)) in self.identification[row].iter_mut().zip(&IDENTIFICATION[row]).enumerate() {
            let found = read();
            if found != *expected {
                let values = format_args!("expected={expected:#018x} found={found:#018x}");
                match row {
                    0 => damage("cpuid", format_args!("name={} {values}", FIRST_NAMES[column])),
                    _ => damage("cpuid", format_args!("name=S3_0_C0_C{row}_{column} {values}")),
                }
                *expected = found;
            }
        }
    }

    /// Changes a register: for the self-test.
    pub fn strike() {
        (REGISTERS[TPIDR_EL1].write)(0);
    }

    /// Pretends that the CPU was another: for the self-test.
    pub fn strike_identification(&mut self) {
        self.identification[4][0] ^= 1 << 20;
    }
}

/// Puts back what an expected exception has changed.
pub fn restore_syndrome() {
    write_register!("esr_el1", SYNDROME);
    write_register!("far_el1", FAULT_ADDRESS);
}
