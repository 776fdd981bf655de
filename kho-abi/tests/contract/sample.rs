//! Fixed values: the ones in the golden files, and a small machine for tests that take every byte apart.

use kho_abi::document::aarch64;
use kho_abi::document::device::{RtcV1, SerialV1, SerialV2};
use kho_abi::document::index::{ClockV1, IndexEntryV2, IndexV2};
use kho_abi::document::machine::{ConfigV2, MachineV3};
use kho_abi::document::memory::RamRangeV1;
use kho_abi::document::platform::PlatformState;
use kho_abi::document::timeline::{Phase, TimelineV3};
use kho_abi::document::vcpu::VcpuState;
use kho_abi::document::virtio::{BlockV1, ImageKind, QueueV1, RngV1, VirtioMmioV1, VirtioState};
use kho_abi::document::x86_64::{NAME, PlatformV1, VcpuV1};

/// The value in `vm-v2-x86_64.bin`: every field set, every optional one once there and once not. Never change it.
pub fn machine() -> MachineV3 {
    machine_with(&|length, seed| (0..length).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)).collect())
}

/// The same machine with one vCPU and payloads of a few bytes.
pub fn small_machine() -> MachineV3 {
    let mut machine = machine_with(&|_, seed| vec![seed, !seed, 0]);
    machine.vcpus.truncate(1);
    machine.config.cpus = 1;
    machine
}

fn machine_with(bytes: &dyn Fn(usize, u8) -> Vec<u8>) -> MachineV3 {
    let vcpu = |id: u32| VcpuV1 {
        id,
        cpuid: bytes(3 * 40, 1),
        regs: bytes(144, 2),
        sregs: bytes(312, 3),
        sregs2: (id == 0).then(|| bytes(320, 4)),
        xsave: bytes(4096, 5),
        xcrs: bytes(392, 6),
        debug_registers: bytes(128, 7),
        lapic: bytes(1024, 8),
        mp_state: bytes(4, 9),
        events: bytes(64, 10),
        msrs: vec![(0x10, 0x1122_3344_5566_7788), (0xc000_0081, 1 << 63), (0x4b56_4d02, 0)],
        tsc_khz: 2_893_432,
        tsc_offset: (id == 0).then_some(u64::MAX - 41),
    };
    MachineV3 {
        name: "golden-1".into(),
        architecture: NAME.into(),
        generation: 7,
        paused: false,
        config: ConfigV2 {
            cpus: 2,
            memory: 0xe000_0000,
            serial: "file=/var/log/golden.log".into(),
            devices: devices(),
        },
        ram: vec![
            RamRangeV1 { gpa: 0, size: 0xc000_0000, token: 0x100, offset: 0 },
            RamRangeV1 { gpa: 0x1_0000_0000, size: 0x2000_0000, token: 0x100, offset: 0xc000_0000 },
        ],
        platform: PlatformState::X86_64(PlatformV1 {
            pic_master: bytes(16, 11),
            pic_slave: bytes(16, 12),
            ioapic: bytes(216, 13),
            pit2: bytes(112, 14),
            clock_ns: 123_456_789_012,
            counter: 0x0102_0304_0506_0708,
        }),
        vcpus: vec![VcpuState::X86_64(Box::new(vcpu(0))), VcpuState::X86_64(Box::new(vcpu(1)))],
        serial: SerialV1 {
            baud_divisor_low: 0x0c,
            baud_divisor_high: 1,
            interrupt_enable: 5,
            interrupt_identification: 0xc1,
            line_control: 3,
            line_status: 0x61,
            modem_control: 0x0b,
            modem_status: 0xb0,
            scratch: 0x5a,
            in_buffer: b"typed ahead\n".to_vec(),
        }
        .into(),
        virtio: virtio(),
    }
}

fn devices() -> Vec<String> {
    vec!["rng".into(), "block:/var/lib/golden.img,readonly".into()]
}

/// A device that is in use, and one that no driver has found yet.
fn virtio() -> Vec<VirtioMmioV1> {
    let block = BlockV1 {
        kind: ImageKind::File,
        device_major: 259,
        device_minor: 3,
        inode: 0x0102_0304_0506_0708,
        size: 512 << 20,
    };
    vec![
        VirtioMmioV1 {
            device_features_select: 1,
            driver_features_select: 1,
            driver_features: 1 << 32,
            queue_select: 0,
            status: 0xf,
            interrupt_status: 1,
            config_generation: 2,
            queues: vec![QueueV1 {
                size: 64,
                ready: true,
                descriptor_table: 0x4321_0000,
                available_ring: 0x4321_1000,
                used_ring: 0x4321_2000,
                next_available: 0xfffe,
                next_used: 0xfffd,
            }],
            device: VirtioState::Rng(RngV1),
        },
        VirtioMmioV1 {
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            status: 0,
            interrupt_status: 0,
            config_generation: 0,
            queues: vec![QueueV1::default()],
            device: VirtioState::Block(block),
        },
    ]
}

/// The value in `vm-v2-serial-v2.bin`: the same with output that waits for a reader. Never change it.
pub fn machine_with_backlog() -> MachineV3 {
    let machine = machine();
    let serial = SerialV2 { backlog: b"login: ".to_vec(), dropped: 0x0102_0304_0506, ..machine.serial };
    MachineV3 { serial, ..machine }
}

/// The same, paused by its operator: the value in `vm-v3-*.bin`. Never change it.
pub fn paused(machine: MachineV3) -> MachineV3 {
    MachineV3 { paused: true, ..machine }
}

/// The value in `vm-v2-aarch64.bin`: every field set, every optional one once there and once not. Never change it.
pub fn aarch64_machine() -> MachineV3 {
    let bytes = |length: u8, seed: u8| (0..length).map(|at| at.wrapping_mul(29).wrapping_add(seed)).collect::<Vec<_>>();
    let vcpu = |id: u32| aarch64::VcpuV1 {
        id,
        features: if id == 0 { 0b1100 } else { 0b101 },
        // A core register, one of SIMD, one of 32 bits, two system registers and one of the firmware.
        registers: vec![
            (0x6030_0000_0010_0000, bytes(8, 1)),
            (0x6040_0000_0010_0054, bytes(16, 2)),
            (0x6020_0000_0010_00d4, bytes(4, 3)),
            (0x6030_0000_0013_c020, bytes(8, 4)),
            (0x6030_0000_0013_df1a, bytes(8, 5)),
            (0x6030_0000_0014_0000, bytes(8, 6)),
            (0x6060_0000_0015_ffff, bytes(64, 7)),
        ],
        mp_state: bytes(4, 8),
        events: bytes(64, 9),
        virtual_timer_interrupt: 27,
        physical_timer_interrupt: 30,
        pmu_interrupt: (id == 0).then_some(23),
        stolen_time: (id == 0).then_some(0x7fff_0040),
    };
    let redistributor = |mpidr: u64| aarch64::RedistributorV1 {
        mpidr,
        registers: vec![(0x0, 7), (0x70, 0x4005_018f), (0x1_0200, 0x0801_0002), (0x1_0300, 1 << 27)],
        cpu_interface: vec![(0xc665, 7), (0xc664, 0x400), (0xc230, 0xf0), (0xc648, 1 << 16)],
        lines: 1 << 27,
    };
    MachineV3 {
        name: "golden-2".into(),
        architecture: aarch64::NAME.into(),
        config: ConfigV2 {
            cpus: 2,
            memory: 0xe000_0000,
            serial: "file=/var/log/golden.log".into(),
            devices: devices(),
        },
        ram: vec![RamRangeV1 { gpa: 0x4000_0000, size: 0xe000_0000, token: 0x100, offset: 0 }],
        platform: PlatformState::Aarch64(aarch64::PlatformV1 {
            counter_offset: 0x0102_0304_0506_0708,
            counter: 0x1112_1314_1516_1718,
            counter_frequency: 62_500_000,
            gic: aarch64::GicV1 {
                distributor: vec![(0x8, 0x4b00_243b), (0x0, 0x52), (0x104, 0xff), (0x6108, 1), (0x610c, 0)],
                lines: vec![(32, 8), (64, 0), (96, 1 << 31)],
                redistributors: vec![redistributor(0x8000_0000), redistributor(0x8000_0001)],
                its: Some(aarch64::ItsV1 {
                    registers: vec![
                        (0x80, 0x9800_0000_4001_0000),
                        (0x4, 0x4b00_043b),
                        (0x88, 0xc0),
                        (0x0, 0x8000_0001),
                    ],
                }),
            },
            rtc: RtcV1 {
                load: 1_795_000_000,
                offset_seconds: (-3_600_i64).cast_unsigned(),
                match_value: 1_795_000_060,
                interrupt_mask: 1,
                interrupt: 1,
            },
        }),
        vcpus: vec![VcpuState::Aarch64(Box::new(vcpu(0))), VcpuState::Aarch64(Box::new(vcpu(1)))],
        ..machine()
    }
}

/// The value in `index-v1.bin`, of which it is a part: the same without the clock, which there was none of.
pub fn before_clock(index: IndexV2) -> IndexV2 {
    IndexV2 { clock: None, ..index }
}

/// The value in `index-v2.bin`. Never change it.
pub fn index() -> IndexV2 {
    let mut timeline = TimelineV3::new(2_893_432_000);
    timeline.mark(Phase::UpdateStarted, 1_000_000_000_000);
    timeline.mark(Phase::ImageLoaded, 1_000_500_000_000);
    timeline.mark(Phase::RebootCalled, 1_002_000_000_000);
    let mut marks = TimelineV3::new(2_893_432_000);
    marks.mark(Phase::PauseAsked, 1_001_000_000_000);
    marks.mark(Phase::VcpusStopped, 1_001_100_000_000);
    IndexV2 {
        generation: 3,
        kernel: "7.2.9-kho-vmm".into(),
        timeline,
        clock: Some(ClockV1 { counter: 1_002_000_000_123, realtime_ns: 1_795_570_000_123_456_789 }),
        vms: vec![
            IndexEntryV2 {
                name: "golden-1".into(),
                session: "kho-vmm.golden-1".into(),
                state_token: 1,
                document_bytes: 14_336,
                ram: vec![(0x100, 0xe000_0000)],
                marks,
                frames: None,
                content: None,
            },
            IndexEntryV2 {
                name: "A_second-VM_whose-name_takes-all-48-characters-0".into(),
                session: "kho-vmm.A_second-VM_whose-name_takes-all-48-characters-0".into(),
                state_token: 1,
                document_bytes: 9_000,
                ram: vec![(0x100, 0x4000_0000), (0x101, 0x1000)],
                marks: TimelineV3::default(),
                frames: None,
                content: None,
            },
        ],
    }
}

/// The value in `index-v2-timeline-v2.bin`. Never change it.
pub fn index_with_devices_stopped() -> IndexV2 {
    let mut index = index();
    index.vms[0].marks.mark(Phase::DevicesStopped, 1_001_150_000_000);
    index
}

/// The value in `index-v2-entry-v2.bin`. Never change it.
pub fn index_with_checksums() -> IndexV2 {
    let mut index = index_with_devices_stopped();
    let vm = &mut index.vms[0];
    vm.frames = Some(0x0123_4567_89ab_cdef);
    vm.content = Some(0xfedc_ba98_7654_3210);
    vm.marks.mark(Phase::MemoryDigested, 1_001_180_000_000);
    index
}
