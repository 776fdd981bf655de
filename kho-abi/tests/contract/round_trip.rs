//! Random values, written and read back.

use std::collections::BTreeSet;

use kho_abi::document::aarch64;
use kho_abi::document::device::{RtcV1, SerialV1, SerialV2};
use kho_abi::document::index::{ClockV1, IndexEntryV2, IndexV2};
use kho_abi::document::machine::{ConfigV2, MachineV3};
use kho_abi::document::memory::RamRangeV1;
use kho_abi::document::node::Node;
use kho_abi::document::platform::PlatformState;
use kho_abi::document::record::{from_node, to_node};
use kho_abi::document::timeline::{Phase, TimelineV3};
use kho_abi::document::vcpu::VcpuState;
use kho_abi::document::virtio::{NetV1, QueueV1, RngV1, VirtioMmioV1, VirtioState};
use kho_abi::document::x86_64::{NAME, PlatformV1, VcpuV1};
use kho_abi::document::{EncodeError, fdt, header};
use kho_abi::{names, tokens};
use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;

use crate::{TREES, cases};

fn payload() -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..80)
}

fn text() -> impl Strategy<Value = String> {
    vec(any::<char>().prop_filter("a NUL ends text", |letter| *letter != '\0'), 0..12)
        .prop_map(|letters| letters.into_iter().collect())
}

fn letters(alphabet: &'static [u8], length: impl Into<prop::collection::SizeRange>) -> impl Strategy<Value = String> {
    vec(prop::sample::select(alphabet), length).prop_map(|bytes| bytes.into_iter().map(char::from).collect())
}

fn node_name() -> impl Strategy<Value = String> {
    let address = option::of(letters(b"0123456789abcdef-_.,+Z", 1..20));
    (letters(b"abcxyzABCXYZ", 1..2), letters(b"abc012,._+-", 0..31), address).prop_map(|(first, rest, address)| {
        match address {
            Some(address) => format!("{first}{rest}@{address}"),
            None => first + &rest,
        }
    })
}

fn node(name: String, properties: Vec<(String, Vec<u8>)>, children: Vec<Node>) -> Node {
    let mut seen = BTreeSet::new();
    let children = children.into_iter().filter(|child| seen.insert(child.name.clone())).collect();
    Node { name, properties: properties.into_iter().collect(), children }
}

fn tree() -> impl Strategy<Value = Node> {
    let properties = || {
        btree_map(letters(b"abcXYZ012,._+-", 1..32), payload(), 0..4)
            .prop_map(|properties| properties.into_iter().collect::<Vec<_>>())
    };
    let leaf = (node_name(), properties()).prop_map(|(name, properties)| node(name, properties, vec![]));
    leaf.prop_recursive(8, 60, 5, move |inner| {
        (node_name(), properties(), vec(inner, 0..5))
            .prop_map(|(name, properties, children)| node(name, properties, children))
    })
    .prop_map(|root| Node { name: String::new(), ..root })
}

prop_compose! {
    fn vcpu()(
        (cpuid, regs, sregs, sregs2, xsave) in (payload(), payload(), payload(), option::of(payload()), payload()),
        (xcrs, debug_registers, lapic, mp_state, events) in (payload(), payload(), payload(), payload(), payload()),
        msrs in vec(any::<(u32, u64)>(), 0..10),
        tsc_khz: u32,
        tsc_offset: Option<u64>,
    ) -> VcpuV1 {
        let id = 0;
        VcpuV1 { id, cpuid, regs, sregs, sregs2, xsave, xcrs, debug_registers, lapic, mp_state, events, msrs, tsc_khz, tsc_offset }
    }
}

prop_compose! {
    fn platform()(
        pic_master in payload(), pic_slave in payload(), ioapic in payload(), pit2 in payload(),
        clock_ns: u64, counter: u64,
    ) -> PlatformV1 {
        PlatformV1 { pic_master, pic_slave, ioapic, pit2, clock_ns, counter }
    }
}

/// Entries with distinct numbers.
fn entries<T: Arbitrary>() -> impl Strategy<Value = Vec<(u32, T)>> {
    btree_map(any::<u32>(), any::<T>(), 0..8).prop_map(|entries| entries.into_iter().collect())
}

/// Registers of every size, with distinct numbers.
fn registers() -> impl Strategy<Value = Vec<(u64, Vec<u8>)>> {
    let register = (0..=8_u64, any::<u32>(), any::<u8>());
    vec(register, 0..10).prop_map(|registers| {
        let mut seen = BTreeSet::new();
        registers
            .into_iter()
            .map(|(power, number, value)| (6 << 60 | power << 52 | u64::from(number), vec![value; 1 << power]))
            .filter(|(number, _)| seen.insert(*number))
            .collect()
    })
}

prop_compose! {
    fn aarch64_vcpu()(
        features: u32, registers in registers(), mp_state in payload(), events in payload(),
        virtual_timer_interrupt: u32, physical_timer_interrupt: u32, pmu_interrupt: Option<u32>, stolen_time: Option<u64>,
    ) -> aarch64::VcpuV1 {
        let id = 0;
        aarch64::VcpuV1 { id, features, registers, mp_state, events, virtual_timer_interrupt, physical_timer_interrupt,
                          pmu_interrupt, stolen_time }
    }
}

prop_compose! {
    fn redistributor()(registers in entries(), cpu_interface in entries(), lines: u32) -> aarch64::RedistributorV1 {
        aarch64::RedistributorV1 { mpidr: 0, registers, cpu_interface, lines }
    }
}

prop_compose! {
    fn aarch64_platform()(
        (counter_offset, counter, counter_frequency) in any::<(u64, u64, u64)>(),
        (distributor, lines) in (entries(), entries()),
        redistributors in vec(redistributor(), 4),
        its in option::of(entries()),
        (load, offset_seconds, match_value, interrupt_mask, interrupt) in any::<(u32, u64, u32, u32, u32)>(),
    ) -> aarch64::PlatformV1 {
        let redistributors = redistributors.into_iter().zip(1 << 31..)
            .map(|(redistributor, mpidr)| aarch64::RedistributorV1 { mpidr, ..redistributor })
            .collect();
        let its = its.map(|registers| aarch64::ItsV1 { registers });
        let gic = aarch64::GicV1 { distributor, lines, redistributors, its };
        let rtc = RtcV1 { load, offset_seconds, match_value, interrupt_mask, interrupt };
        aarch64::PlatformV1 { counter_offset, counter, counter_frequency, gic, rtc }
    }
}

prop_compose! {
    fn aarch64_machine()(
        machine in machine(),
        platform in aarch64_platform(),
        vcpus in vec(aarch64_vcpu(), 1..5),
        first in 0..10_000_u32,
    ) -> MachineV3 {
        let numbered = vcpus.into_iter().zip(first..);
        let vcpus: Vec<_> = numbered.map(|(vcpu, id)| VcpuState::Aarch64(Box::new(aarch64::VcpuV1 { id, ..vcpu }))).collect();
        let config = ConfigV2 { cpus: vcpus.len() as u32, ..machine.config };
        let mut platform = platform;
        platform.gic.redistributors.truncate(vcpus.len());
        let platform = PlatformState::Aarch64(platform);
        MachineV3 { architecture: aarch64::NAME.into(), config, platform, vcpus, ..machine }
    }
}

prop_compose! {
    fn serial()(
        registers: [u8; 9],
        in_buffer in payload(),
        backlog in payload(),
        dropped in prop_oneof![Just(0), any::<u64>()],
    ) -> SerialV2 {
        let [baud_divisor_low, baud_divisor_high, interrupt_enable, interrupt_identification, line_control,
             line_status, modem_control, modem_status, scratch] = registers;
        let port = SerialV1 { baud_divisor_low, baud_divisor_high, interrupt_enable, interrupt_identification, line_control,
                              line_status, modem_control, modem_status, scratch, in_buffer };
        SerialV2 { port, backlog, dropped }
    }
}

/// Ranges with random gaps and sizes, in files of their own or one behind the other in the same.
fn ram() -> impl Strategy<Value = Vec<RamRangeV1>> {
    vec((0..1_u64 << 20, 1..1_u64 << 20, any::<bool>()), 1..8).prop_map(|ranges| {
        let (mut gpa, mut token, mut offset) = (0, tokens::RAM_FIRST, 0);
        let mut ram = vec![];
        for (gap, pages, same_file) in ranges {
            if !same_file {
                (token, offset) = (token + 1, 0);
            }
            gpa += gap << 12;
            let size = pages << 12;
            ram.push(RamRangeV1 { gpa, size, token, offset });
            (gpa, offset) = (gpa + size, offset + size);
        }
        ram.reverse();
        ram
    })
}

prop_compose! {
    fn machine()(
        name in vm_name(),
        generation: u64,
        paused: bool,
        serial_config in text(),
        ram in ram(),
        platform in platform(),
        vcpus in vec(vcpu(), 1..4),
        serial in serial(),
        first in 0..10_000_u32,
        virtio in vec(virtio(), 0..3),
    ) -> MachineV3 {
        let memory = ram.iter().map(|range| range.size).sum();
        let numbered = vcpus.into_iter().zip(first..).map(|(vcpu, id)| VcpuState::X86_64(Box::new(VcpuV1 { id, ..vcpu })));
        let vcpus: Vec<_> = numbered.collect();
        let devices = virtio.iter().map(|_| serial_config.clone()).collect();
        let config = ConfigV2 { cpus: vcpus.len() as u32, memory, serial: serial_config, devices };
        let platform = PlatformState::X86_64(platform);
        MachineV3 { name, architecture: NAME.into(), generation, paused, config, ram, platform, vcpus, serial, virtio }
    }
}

prop_compose! {
    fn queue()(
        size: u16, ready: bool, next_available: u16, next_used: u16,
        (descriptor_table, available_ring, used_ring) in any::<(u64, u64, u64)>(),
    ) -> QueueV1 {
        QueueV1 { size, ready, descriptor_table, available_ring, used_ring, next_available, next_used }
    }
}

fn virtio_device() -> impl Strategy<Value = VirtioState> {
    // A group's address, and nobody's, is none that a device can have.
    let mac = any::<[u8; 6]>().prop_map(|[first, rest @ ..]| {
        let [a, b, c, d, e] = rest;
        [first & 0xfc | 2, a, b, c, d, e]
    });
    let net = (mac, any::<bool>()).prop_map(|(mac, announce)| VirtioState::Net(NetV1 { mac, announce }));
    prop_oneof![Just(VirtioState::Rng(RngV1)), net]
}

prop_compose! {
    fn virtio()(
        (device_features_select, driver_features_select, queue_select) in any::<(u32, u32, u32)>(),
        (status, interrupt_status, config_generation) in any::<(u32, u32, u32)>(),
        driver_features: u64,
        queues in vec(queue(), 0..4),
        device in virtio_device(),
    ) -> VirtioMmioV1 {
        VirtioMmioV1 { device_features_select, driver_features_select, driver_features, queue_select, status,
                       interrupt_status, config_generation, queues, device }
    }
}

fn vm_name() -> impl Strategy<Value = String> {
    (letters(b"abcXYZ019", 1..2), letters(b"abcXYZ019_-", 0..48)).prop_map(|(first, rest)| first + &rest)
}

prop_compose! {
    fn timeline()(frequency_hz: u64, marks in vec((prop::sample::select(&Phase::ALL), any::<u64>()), 0..20)) -> TimelineV3 {
        let mut timeline = TimelineV3::new(frequency_hz);
        for (phase, counter) in marks {
            timeline.mark(phase, counter);
        }
        timeline
    }
}

prop_compose! {
    fn entry()(
        name in vm_name(),
        document_bytes in header::SIZE as u64..=header::CAP as u64,
        sizes in vec(1_u64.., 1..5),
        marks in timeline(),
        frames: Option<u64>,
        content: Option<u64>,
    ) -> IndexEntryV2 {
        let ram = sizes.into_iter().zip(tokens::RAM_FIRST..).map(|(size, token)| (token, size)).collect();
        let session = names::session_name(&name).unwrap();
        IndexEntryV2 { name, session, state_token: tokens::STATE, document_bytes, ram, marks, frames, content }
    }
}

prop_compose! {
    fn index()(
        generation: u64,
        kernel in text(),
        timeline in timeline(),
        clock: Option<(u64, u64)>,
        vms in vec(entry(), 0..6),
    ) -> IndexV2 {
        let clock = clock.map(|(counter, realtime_ns)| ClockV1 { counter, realtime_ns });
        let mut seen = BTreeSet::new();
        let vms = vms.into_iter().filter(|vm| seen.insert(vm.name.clone())).collect();
        IndexV2 { generation, kernel, timeline, clock, vms }
    }
}

proptest! {
    #![proptest_config(cases(TREES))]

    #[test]
    fn a_tree_is_read_as_it_was_written(root in tree()) {
        prop_assert_eq!(fdt::read(&fdt::write(&root).unwrap()).unwrap(), root);
    }

    #[test]
    fn a_machine_is_read_as_it_was_written(machine in machine()) {
        prop_assert_eq!(MachineV3::from_bytes(&machine.to_bytes().unwrap()).unwrap(), machine);
    }

    #[test]
    fn a_machine_of_aarch64_is_read_as_it_was_written(machine in aarch64_machine()) {
        prop_assert_eq!(MachineV3::from_bytes(&machine.to_bytes().unwrap()).unwrap(), machine);
    }

    #[test]
    fn an_index_is_read_as_it_was_written(index in index()) {
        prop_assert_eq!(IndexV2::from_bytes(&index.to_bytes().unwrap()).unwrap(), index);
    }

    #[test]
    fn a_timeline_is_read_as_it_was_written(timeline in timeline()) {
        prop_assert_eq!(from_node::<TimelineV3>(&to_node("timeline", &timeline)).unwrap(), timeline);
    }

    #[test]
    fn a_body_is_opened_as_it_was_sealed(body in vec(any::<u8>(), 0..500), zeros in 0..500_usize) {
        let mut sealed = header::seal(&body).unwrap();
        sealed.resize(sealed.len() + zeros, 0);
        prop_assert_eq!(header::open(&sealed).unwrap(), body);
    }
}

#[test]
fn text_with_a_nul_is_refused_before_it_is_written() {
    let mut machine = crate::sample::machine();
    machine.config.serial = "off\0".into();
    assert_eq!(machine.to_bytes().unwrap_err().to_string(), "/config: property \"serial\" is no text ended by a NUL");
}

#[test]
fn a_document_beyond_the_cap_is_refused_before_it_is_written() {
    let mut machine = crate::sample::machine();
    machine.serial.port.in_buffer = vec![1; header::CAP];
    assert!(matches!(machine.to_bytes(), Err(EncodeError::TooLarge { cap: header::CAP, .. })));
}
