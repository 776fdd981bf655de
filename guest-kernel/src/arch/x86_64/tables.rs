//! GDT, TSS and IDT. Every vector has a stack of its own from the TSS, so that the interrupted code's stack pointer may hold any
//! value at all: it is one of the registers to be watched.

use core::arch::{asm, global_asm};
use core::ptr;

use guest_kernel::options::MOST_CPUS;

use super::{boot, interrupts, number};
use crate::irq_cell::IrqCell;

const CODE: u16 = 8;
const TSS_SELECTOR: u16 = 24;
const VECTORS: usize = 256;
const STACKS: usize = 6;
const STACK: usize = 16 << 10;

/// Null, code, data, and room for the TSS.
#[repr(C, align(16))]
struct Gdt([u64; 5]);

/// The first three entries are as the boot code has them.
static GDTS: [IrqCell<Gdt>; MOST_CPUS] = [const { IrqCell::new(Gdt([0, boot::CODE, boot::DATA, 0, 0])) }; MOST_CPUS];

#[repr(C, packed(4))]
struct Tss {
    reserved: u32,
    privileged_stacks: [u64; 3],
    reserved_too: u64,
    stacks: [u64; 7],
    reserved_more: u64,
    reserved_last: u16,
    port_map: u16,
}

static TSSES: [IrqCell<Tss>; MOST_CPUS] = [const {
    IrqCell::new(Tss {
        reserved: 0,
        privileged_stacks: [0; 3],
        reserved_too: 0,
        stacks: [0; 7],
        reserved_more: 0,
        reserved_last: 0,
        port_map: size_of::<Tss>() as u16,
    })
}; MOST_CPUS];

/// The size of all of a CPU's stacks for interrupts.
pub const ALL_STACKS: usize = STACKS * STACK;

#[repr(C, align(16))]
struct Stacks([u8; ALL_STACKS]);
static INTERRUPT_STACKS: IrqCell<Stacks> = IrqCell::new(Stacks([0; ALL_STACKS]));

#[repr(C, align(16))]
struct Idt([[u64; 2]; VECTORS]);
static IDT: IrqCell<Idt> = IrqCell::new(Idt([[0; 2]; VECTORS]));

// One stub per vector, 16 bytes apart: an error code where the CPU pushes none, the vector, and on to what all share.
global_asm!(
    ".pushsection .text",
    ".balign 16",
    "interrupt_stubs:",
    ".set vector, 0",
    ".rept 256",
    ".balign 16",
    ".if (vector != 8) && (vector < 10 || vector > 14) && (vector != 17) && (vector != 21) && (vector != 29) && (vector != 30)",
    ".byte 0x6a, 0", // push 0
    ".endif",
    ".byte 0x68", // push the vector
    ".long vector",
    "jmp interrupt_common",
    ".set vector, vector + 1",
    ".endr",
    "interrupt_common:",
    "push rax",
    "push rcx",
    "push rdx",
    "push rbx",
    "push rbp",
    "push rsi",
    "push rdi",
    "push r8",
    "push r9",
    "push r10",
    "push r11",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "cld",
    "mov rdi, rsp",
    "mov rbx, rsp",
    "and rsp, -16",
    "call {handle}",
    "mov rsp, rbx",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop r11",
    "pop r10",
    "pop r9",
    "pop r8",
    "pop rdi",
    "pop rsi",
    "pop rbp",
    "pop rbx",
    "pop rdx",
    "pop rcx",
    "pop rax",
    "add rsp, 16",
    "iretq",
    ".popsection",
    handle = sym interrupts::handle,
);

unsafe extern "C" {
    #[link_name = "interrupt_stubs"]
    static STUBS: [[u8; 16]; VECTORS];
}

/// What the stubs leave on the stack.
#[repr(C)]
pub struct Frame {
    pub r15_to_rcx: [u64; 14],
    pub rax: u64,
    pub vector: u64,
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub flags: u64,
    pub rsp: u64,
    pub ss: u64,
}

#[repr(C, packed)]
struct TablePointer {
    limit: u16,
    base: u64,
}

/// Fills the first CPU's tables, and those that all share, and loads them.
pub fn load() {
    IDT.with(|idt| {
        let stubs = (&raw const STUBS).addr() as u64;
        for (vector, gate) in idt.0.iter_mut().enumerate() {
            *gate = interrupt_gate(stubs + vector as u64 * 16, stack_of(vector));
        }
    });
    load_own(INTERRUPT_STACKS.with(|stacks| stacks.0.as_ptr().addr() as u64));
}

/// Fills this CPU's tables and loads them. Its stacks for interrupts are at this address.
pub fn load_own(stacks: u64) {
    let tss = TSSES[number()].with(|tss| {
        let ends = (1..).map(|index| stacks + index * STACK as u64);
        let mut entries = [0; 7];
        for (entry, end) in entries.iter_mut().zip(ends).take(STACKS) {
            *entry = end;
        }
        tss.stacks = entries;
        ptr::from_mut(tss).addr() as u64
    });
    let gdt = GDTS[number()].with(|gdt| {
        let limit = (size_of::<Tss>() - 1) as u64;
        gdt.0[3] = limit | (tss & 0x00ff_ffff) << 16 | 0x89 << 40 | (tss >> 24 & 0xff) << 56;
        gdt.0[4] = tss >> 32;
        TablePointer { limit: (size_of::<Gdt>() - 1) as u16, base: ptr::from_mut(gdt).addr() as u64 }
    });
    let idt = TablePointer { limit: (size_of::<Idt>() - 1) as u16, base: (&raw const IDT).addr() as u64 };
    // SAFETY: the table has the descriptors that are in use at the same places, and lives for ever.
    unsafe { asm!("lgdt [{}]", in(reg) &raw const gdt, options(nostack)) };
    // SAFETY: the descriptor was filled in above.
    unsafe { asm!("ltr {:x}", in(reg) TSS_SELECTOR, options(nostack)) };
    // SAFETY: every gate leads to a stub, on a stack that exists.
    unsafe { asm!("lidt [{}]", in(reg) &raw const idt, options(nostack)) };
}

/// Which stack of the TSS a vector runs on: those that may come in the midst of another have their own.
const fn stack_of(vector: usize) -> u64 {
    match vector {
        1 => 3,
        2 => 4,
        8 => 5,
        18 => 6,
        0..32 => 2,
        _ => 1,
    }
}

/// An interrupt gate: it enters with interrupts off.
const fn interrupt_gate(target: u64, stack: u64) -> [u64; 2] {
    let low = (target & 0xffff) | (CODE as u64) << 16 | stack << 32 | 0x8e << 40 | (target >> 16 & 0xffff) << 48;
    [low, target >> 32]
}

/// Makes every further exception a triple fault, and raises one.
pub fn triple_fault() {
    let none = TablePointer { limit: 0, base: 0 };
    // SAFETY: nothing is to be handled any more.
    unsafe { asm!("lidt [{}]", "int3", in(reg) &raw const none, options(nostack)) };
}
