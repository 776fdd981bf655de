//! Machines without a program: their state is written through KVM, taken, put back into a second machine around the same RAM, and
//! compared. They need a host's KVM, so they are run in the lab's host: `vmm`'s unit tests with `--ignored`.

use kho_abi::document::aarch64::{GicV1, PlatformV1, VcpuV1};
use kvm_bindings::{KVM_CAP_ARM_INJECT_SERROR_ESR, kvm_msi, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::gic::Gic;
use super::ioctl::{self, Attribute, Attributes};
use super::processor::Processor;
use super::registers::{self, core, system};
use super::{counter, its};

const RAM: u64 = 0x4000_0000;
const RAM_SIZE: usize = 2 << 20;
const CPUS: u32 = 3;

/// Where the machine's tables are in RAM.
const COMMANDS: u64 = RAM + 0x1_0000;
const DEVICES: u64 = RAM + 0x2_0000;
const COLLECTIONS: u64 = RAM + 0x3_0000;
const TRANSLATIONS: u64 = RAM + 0x4_0000;
const PROPERTIES: u64 = RAM + 0x5_0000;
/// One for each vCPU, aligned to 64 KiB.
const PENDING: u64 = RAM + 0x10_0000;
const PENDING_SIZE: u64 = 0x1_0000;

/// The first number of an LPI.
const LPI: u32 = 8192;
const DEVICE: u32 = 5;

/// RAM that every machine of a test is around, and that none of them gives back.
#[derive(Clone, Copy)]
struct Ram(u64);

impl Ram {
    fn new() -> Self {
        let zeroed = vec![0_u64; (RAM_SIZE + 0x1000) / 8].leak();
        Self((zeroed.as_mut_ptr() as u64).next_multiple_of(0x1000))
    }

    fn bytes(&self, at: u64, count: usize) -> &'static mut [u8] {
        assert!(at >= RAM && at - RAM + count as u64 <= RAM_SIZE as u64);
        // SAFETY: the range is within the memory above, which is never freed. KVM writes to it too, but only in an ioctl of this
        // thread, and no slice is held across one.
        unsafe { std::slice::from_raw_parts_mut((self.0 + at - RAM) as *mut u8, count) }
    }
}

struct Machine {
    vm: VmFd,
    gic: Gic,
    vcpus: Vec<(VcpuFd, Processor)>,
}

/// What a document says of such a machine.
#[derive(Clone, Debug, PartialEq)]
struct State {
    platform: PlatformV1,
    vcpus: Vec<VcpuV1>,
}

impl Machine {
    fn new(ram: Ram, offset: u64, states: Option<&[VcpuV1]>) -> Self {
        let vm = Kvm::new().unwrap().create_vm().unwrap();
        let slot = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: RAM,
            memory_size: RAM_SIZE as u64,
            userspace_addr: ram.0,
        };
        // SAFETY: the memory is never freed.
        unsafe { vm.set_user_memory_region(slot) }.unwrap();
        let gic = Gic::new(&vm, CPUS).unwrap();
        let state = |id: u32| states.map(|states| &states[id as usize]);
        let vcpus: Vec<_> = (0..CPUS)
            .map(|id| {
                let vcpu = vm.create_vcpu(id.into()).unwrap();
                let processor = Processor::new(&vm, &vcpu, id, state(id)).unwrap();
                (vcpu, processor)
            })
            .collect();
        gic.init().unwrap();
        for (id, (vcpu, processor)) in (0..).zip(&vcpus) {
            processor.connect(vcpu, state(id)).unwrap();
        }
        counter::set_offset(&vm, offset).unwrap();
        Self { vm, gic, vcpus }
    }

    fn mpidrs(&self) -> Vec<u64> {
        self.vcpus.iter().map(|(vcpu, processor)| processor.mpidr(vcpu).unwrap()).collect()
    }

    fn save(&self) -> State {
        let vcpus = self.vcpus.iter().map(|(vcpu, processor)| processor.save(vcpu).unwrap()).collect();
        let gic = self.gic.save(&self.mpidrs()).unwrap();
        State { platform: PlatformV1 { gic, ..PlatformV1::default() }, vcpus }
    }

    /// A second machine that takes over, as the next kernel's would.
    fn restored(ram: Ram, offset: u64, state: &State) -> Self {
        let machine = Self::new(ram, offset, Some(&state.vcpus));
        for ((vcpu, processor), state) in machine.vcpus.iter().zip(&state.vcpus) {
            processor.restore(vcpu, state).unwrap();
        }
        machine.gic.restore(&state.platform.gic, &machine.mpidrs()).unwrap();
        machine
    }

    /// A state of the GIC with some registers of the distributor and of each redistributor changed.
    fn with_interrupts(&self, ram: Ram, change: impl Fn(&mut GicV1)) -> Self {
        let mut state = self.save();
        change(&mut state.platform.gic);
        Self::restored(ram, 0, &state)
    }
}

fn set(registers: &mut [(u32, u32)], offset: u32, value: u32) {
    registers.iter_mut().find(|(register, _)| *register == offset).unwrap().1 = value;
}

#[test]
#[ignore = "needs KVM; run in the lab's host"]
fn an_untouched_machine_is_restored_as_it_was() {
    let ram = Ram::new();
    let state = Machine::new(ram, 0, None).save();
    assert_eq!(state.platform.gic.redistributors.len(), CPUS as usize);
    let again = Machine::restored(ram, 0, &state).save();
    assert_eq!(again, state);
}

#[test]
#[ignore = "needs KVM; run in the lab's host"]
fn interrupts_of_every_kind_are_restored_at_every_redistributor() {
    const PRIVATE: u32 = 0x1_0000;
    let ram = Ram::new();
    let first = Machine::new(ram, 0, None);
    let mpidrs = first.mpidrs();
    let second = first.with_interrupts(ram, |gic| {
        set(&mut gic.distributor, 0x0, 0x52); // CTLR: group 1, affinity routing, one security state
        set(&mut gic.distributor, 0x84, u32::MAX); // SPIs 32 to 63 in group 1
        set(&mut gic.distributor, 0x104, 0x0000_00ff); // enabled
        set(&mut gic.distributor, 0x204, 0x0001_0006); // pending, one of them disabled
        set(&mut gic.distributor, 0x308, 0x8000_0001); // active: 64 and 95
        set(&mut gic.distributor, 0x420, 0xa0b0_c0d0); // priorities of 32 to 35
        set(&mut gic.distributor, 0xc08, 0x0000_000a); // 33 and 32 are edges
        set(&mut gic.distributor, 0x6000 + 8 * 33, mpidrs[2] as u32 & 0xff_ffff); // 33 goes to the third vCPU
        gic.lines[0].1 = 0x0000_0008; // the line of 35 is up
        for (nth, redistributor) in (1..).zip(&mut gic.redistributors) {
            let registers = &mut redistributor.registers;
            set(registers, 0x14, 0); // WAKER: awake
            set(registers, PRIVATE + 0x80, u32::MAX);
            set(registers, PRIVATE + 0x100, 0x0800_ffff);
            set(registers, PRIVATE + 0x200, 0x1_0000 | nth); // SGIs and PPI 16 pending
            set(registers, PRIVATE + 0x300, nth << 4); // SGIs active
            set(registers, PRIVATE + 0x400, 0x1020_3040 + (nth << 3));
            redistributor.lines = 1 << 20;
        }
    });
    let state = second.save();
    let distributor = |offset: u32| state.platform.gic.distributor.iter().find(|(at, _)| *at == offset).unwrap().1;
    assert_eq!(distributor(0x104), 0xff);
    assert_eq!(distributor(0x204), 0x0001_0006);
    assert_eq!(distributor(0x308), 0x8000_0001);
    assert_eq!(distributor(0x6000 + 8 * 33), mpidrs[2] as u32 & 0xff_ffff);
    assert_eq!(state.platform.gic.lines[0], (32, 8));
    for (nth, redistributor) in (1..).zip(&state.platform.gic.redistributors) {
        let register = |offset: u32| redistributor.registers.iter().find(|(at, _)| *at == offset).unwrap().1;
        assert_eq!(register(PRIVATE + 0x200), 0x1_0000 | nth);
        assert_eq!(register(PRIVATE + 0x300), nth << 4);
        assert_eq!(redistributor.lines, 1 << 20);
    }
    assert_eq!(Machine::restored(ram, 0, &state).save(), state);
}

#[test]
#[ignore = "needs KVM; run in the lab's host"]
fn cpu_interfaces_are_restored_each_with_its_own() {
    const PMR: u32 = 0xc230;
    const AP1R0: u32 = 0xc648;
    let ram = Ram::new();
    let first = Machine::new(ram, 0, None);
    let second = first.with_interrupts(ram, |gic| {
        for (nth, redistributor) in (1_u64..).zip(&mut gic.redistributors) {
            for (register, value) in &mut redistributor.cpu_interface {
                match *register {
                    PMR => *value = 0xf0 - nth * 0x10,
                    AP1R0 => *value = 1 << (nth * 4),
                    _ => {}
                }
            }
        }
    });
    let state = second.save();
    for (nth, redistributor) in (1_u64..).zip(&state.platform.gic.redistributors) {
        assert!(redistributor.cpu_interface.contains(&(PMR, 0xf0 - nth * 0x10)));
        assert!(redistributor.cpu_interface.contains(&(AP1R0, 1 << (nth * 4))));
    }
    assert_eq!(Machine::restored(ram, 0, &state).save(), state);
}

/// A command of the ITS.
fn command(words: [u64; 4]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[test]
#[ignore = "needs KVM; run in the lab's host"]
fn lpis_are_flushed_into_ram_and_found_there() {
    const VALID: u64 = 1 << 63;
    // How the tables are cached, as KVM makes it where it is told something else.
    const CACHED: u32 = 0x180;
    const ITS_CACHED: u64 = 0x3 << 59;
    const ITS_CTLR: u32 = 0x0;
    let ram = Ram::new();
    let first = Machine::new(ram, 0, None);
    assert!(first.gic.has_its(), "the lab's host offers an ITS");
    // Of three LPIs the second is disabled. (A priority, and the bit that enables.)
    ram.bytes(PROPERTIES, 3).copy_from_slice(&[0xa1, 0xa0, 0xa1]);
    // Two collections, of the second and the third vCPU; a device with three events.
    let to = |vcpu: u64| vcpu << 16;
    let mut commands = Vec::new();
    commands.extend(command([0x9, 0, VALID | to(1) | 1, 0])); // MAPC 1
    commands.extend(command([0x9, 0, VALID | to(2) | 2, 0])); // MAPC 2
    commands.extend(command([u64::from(DEVICE) << 32 | 0x8, 3, VALID | TRANSLATIONS, 0])); // MAPD, four bits of event
    for (event, collection) in [(0, 1), (1, 1), (2, 2)] {
        let lpi = u64::from(LPI) + event;
        commands.extend(command([u64::from(DEVICE) << 32 | 0xa, lpi << 32 | event, collection, 0])); // MAPTI
    }
    ram.bytes(COMMANDS, commands.len()).copy_from_slice(&commands);

    let second = first.with_interrupts(ram, |gic| {
        set(&mut gic.distributor, 0x0, 0x52);
        for (nth, redistributor) in (0..).zip(&mut gic.redistributors) {
            let registers = &mut redistributor.registers;
            set(registers, 0x70, PROPERTIES as u32 | CACHED | 0xf); // PROPBASER: 16 bits of number
            set(registers, 0x78, (PENDING + nth * PENDING_SIZE) as u32 | CACHED);
            set(registers, 0x0, 1 | 6); // CTLR: LPIs on; the other bits tell what KVM can do
            set(registers, 0x14, 0);
        }
        for (register, value) in &mut gic.its.as_mut().unwrap().registers {
            match *register {
                0x80 => *value = VALID | ITS_CACHED | COMMANDS, // CBASER: one page
                0x100 => *value |= VALID | DEVICES,             // BASER0 is of devices
                0x108 => *value |= VALID | COLLECTIONS,         // BASER1 is of collections
                _ => {}
            }
        }
    });
    let its = second.gic.its().unwrap();
    // Enabled first: KVM looks at what is new when the write pointer moves.
    its.write(ITS_CTLR, 1).unwrap();
    its.write(0x88, commands.len() as u64).unwrap();
    assert_eq!(its.read(0x90).unwrap(), commands.len() as u64, "not all commands were carried out");
    for event in 0..3 {
        let message = kvm_msi {
            address_lo: its::ADDRESS as u32 + 0x1_0040,
            data: event,
            flags: 1, // with the device's number
            devid: DEVICE,
            ..Default::default()
        };
        assert_eq!(second.vm.signal_msi(message).unwrap(), 1, "event {event} leads nowhere");
    }

    let state = second.save();
    let tables = |at: u64, count: usize| ram.bytes(at, count).to_vec();
    let pending = |vcpu: u64| ram.bytes(PENDING + vcpu * PENDING_SIZE + u64::from(LPI) / 8, 1)[0];
    assert_eq!([pending(0), pending(1), pending(2)], [0, 0b011, 0b100]);
    let (devices, collections) = (tables(DEVICES, 128), tables(COLLECTIONS, 64));
    let translations = tables(TRANSLATIONS, 64);
    assert!(devices.iter().chain(&translations).any(|&byte| byte != 0));

    let third = Machine::restored(ram, 0, &state);
    // What the third machine knows it knows by itself: with all tables wiped it writes the same ones again.
    for at in [DEVICES, COLLECTIONS, TRANSLATIONS] {
        ram.bytes(at, 128).fill(0);
    }
    for vcpu in 0..3 {
        ram.bytes(PENDING + vcpu * PENDING_SIZE, 2048).fill(0);
    }
    let again = third.save();
    assert_eq!([pending(0), pending(1), pending(2)], [0, 0b011, 0b100]);
    assert_eq!((tables(DEVICES, 128), tables(COLLECTIONS, 64)), (devices, collections));
    assert_eq!(tables(TRANSLATIONS, 64), translations);
    assert_eq!(again, state);
}

#[test]
#[ignore = "needs KVM; run in the lab's host"]
fn registers_of_every_kind_are_restored_at_every_vcpu() {
    let ram = Ram::new();
    let first = Machine::new(ram, 0, None);
    let has_syndrome = first.vm.check_extension_raw(KVM_CAP_ARM_INJECT_SERROR_ESR.into()) > 0;
    let patterns = |id: u64| {
        [
            (core(0), 0x0101_0101_0101_0101 * (id + 1)),        // X0
            (core(60), 0xffff_0000_0000_0000 + id),             // X30
            (core(62), 0x4123_4560 + id * 16),                  // SP_EL0
            (core(64), 0x4008_0000 + id * 4),                   // PC
            (core(66), 0x3c5),                                  // PSTATE
            (core(68), 0x4222_0000 + id * 16),                  // SP_EL1
            (core(70), 0x4001_0000 + id * 4),                   // ELR_EL1
            (system(3, 0, 1, 0, 0), 0x30d0_0800),               // SCTLR_EL1
            (system(3, 0, 2, 0, 0), 0x4100_0000 + (id << 12)),  // TTBR0_EL1
            (system(3, 0, 2, 0, 2), 0x19),                      // TCR_EL1
            (system(3, 0, 10, 2, 0), 0xff44_0c04_00ff ^ id),    // MAIR_EL1
            (system(3, 0, 12, 0, 0), 0x4008_0800 + (id << 11)), // VBAR_EL1
            (system(3, 0, 13, 0, 1), 7 + id),                   // CONTEXTIDR_EL1
            (system(3, 0, 13, 0, 4), u64::MAX - id),            // TPIDR_EL1
            (system(3, 3, 13, 0, 2), 0x1234 + id),              // TPIDR_EL0
            (system(3, 3, 13, 0, 3), 0x5678 + id),              // TPIDRRO_EL0
            (system(2, 0, 0, 0, 4), 0x4009_0000 + id * 4),      // DBGBVR0_EL1
            (system(2, 0, 0, 0, 5), 0x1e5),                     // DBGBCR0_EL1
            (system(2, 0, 0, 0, 6), 0x400a_0000 + id * 8),      // DBGWVR0_EL1
            (system(2, 0, 0, 0, 7), 0x1ff5),                    // DBGWCR0_EL1
            (system(3, 3, 14, 0, 2), u64::MAX / 2 + id),        // CNTV_CVAL_EL0, by KVM's number for it
            (system(3, 3, 14, 3, 1), 1),                        // CNTV_CTL_EL0: on
            (system(3, 3, 14, 2, 2), u64::MAX / 3 + id),        // CNTP_CVAL_EL0
            (system(3, 3, 14, 2, 1), 3),                        // CNTP_CTL_EL0: on, masked
        ]
    };
    for (id, (vcpu, _)) in (0..).zip(&first.vcpus) {
        for (number, value) in patterns(id) {
            vcpu.set_one_reg(number, &value.to_le_bytes()).unwrap();
        }
        // The vectors V0 to V31.
        for index in 0..32_u64 {
            let vector = 0x6040_0000_0010_0000 | (0x54 + index * 4);
            let value = [id as u8 + 1, index as u8].repeat(8);
            vcpu.set_one_reg(vector, &value).unwrap();
        }
        // An SError that waits until the guest no longer masks it, with a syndrome where the host can give it one.
        let mut events = ioctl::events(vcpu).unwrap();
        (events[0], events[1]) = if has_syndrome { (0x0101, 0x1_0000 + id) } else { (1, 0) };
        ioctl::set_events(vcpu, &events).unwrap();
    }
    let state = first.save();
    for (id, vcpu) in (0..).zip(&state.vcpus) {
        for (number, value) in patterns(id) {
            let saved = vcpu.registers.iter().find(|(saved, _)| *saved == number);
            assert_eq!(saved.unwrap().1, value.to_le_bytes(), "{}", registers::name(number));
        }
        assert_eq!(vcpu.events[..2], [1, u8::from(has_syndrome)]);
    }
    let second = Machine::restored(ram, 0, &state).save();
    assert_eq!(second, state);
}

#[test]
#[ignore = "needs KVM; run in the lab's host"]
fn both_counters_go_on_without_a_step_and_their_difference_stays() {
    const VIRTUAL: u64 = system(3, 3, 14, 3, 2);
    const PHYSICAL: u64 = system(3, 3, 14, 0, 1);
    let ram = Ram::new();
    let offset = 0x1234_5678;
    let read = |machine: &Machine, number: u64| registers::read_u64(&machine.vcpus[0].0, number).unwrap();
    let first = Machine::new(ram, offset, None);
    let (virtual_before, physical_before) = (read(&first, VIRTUAL), read(&first, PHYSICAL));
    let state = first.save();
    assert!(
        state.vcpus.iter().flat_map(|vcpu| &vcpu.registers).all(|(number, _)| ![VIRTUAL, PHYSICAL].contains(number)),
        "a counter travels as a value"
    );
    let second = Machine::restored(ram, offset, &state);
    let virtual_first = read(&second, VIRTUAL);
    let physical = read(&second, PHYSICAL);
    let virtual_last = read(&second, VIRTUAL);
    assert!(virtual_before <= physical_before && physical_before <= virtual_first);
    assert!(virtual_first <= physical && physical <= virtual_last, "the counters differ by more than the time between");
    // A value that is written later does not move them.
    second.vcpus[0].0.set_one_reg(VIRTUAL, &0_u64.to_le_bytes()).unwrap();
    assert!(read(&second, VIRTUAL) >= virtual_last);
}

#[test]
#[ignore = "needs KVM; run in the lab's host"]
fn vcpus_but_the_first_wait_and_go_on_waiting() {
    let ram = Ram::new();
    let state = Machine::new(ram, 0, None).save();
    let stopped = kvm_bindings::KVM_MP_STATE_STOPPED.to_le_bytes();
    let waits: Vec<_> = state.vcpus.iter().map(|vcpu| vcpu.mp_state == stopped).collect();
    assert_eq!(waits, [false, true, true]);
    let mut running = state.clone();
    running.vcpus[1].mp_state.clone_from(&state.vcpus[0].mp_state);
    let again = Machine::restored(ram, 0, &running).save();
    assert_eq!(again.vcpus[1].mp_state, state.vcpus[0].mp_state);
    assert_eq!(again.vcpus[2].mp_state, stopped);
}

/// What a host that lacks something says of a vCPU that has it.
fn refusal(change: impl FnOnce(&mut VcpuV1)) -> String {
    let mut state = Machine::new(Ram::new(), 0, None).save().vcpus.remove(0);
    change(&mut state);
    let vm = Kvm::new().unwrap().create_vm().unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    Processor::new(&vm, &vcpu, 0, Some(&state)).unwrap_err().to_string()
}

#[test]
#[ignore = "needs KVM; run in the lab's host"]
fn what_the_host_lacks_is_refused_by_name() {
    let unknown = refusal(|vcpu| vcpu.features |= 1 << 30);
    assert_eq!(unknown, "this host's KVM does not offer vCPU features 0x40000000");

    // Every field at its largest: no processor can do all that.
    let mmfr2 = system(3, 0, 0, 7, 2);
    let identity = refusal(|vcpu| {
        let register = vcpu.registers.iter_mut().find(|(number, _)| *number == mmfr2).unwrap();
        register.1 = vec![0x11; 8];
    });
    assert!(identity.contains("ID_AA64MMFR2_EL1 0x1111111111111111 (this host's is 0x"), "{identity}");

    // One that no KVM has yet.
    let lost = refusal(|vcpu| vcpu.registers.push((system(3, 7, 15, 15, 7), vec![1; 8])));
    assert_eq!(lost, "this host's KVM does not offer what the guest has in use: S3_7_C15_C15_7");
}

#[test]
#[ignore = "needs KVM; run in the lab's host"]
fn a_gic_that_knows_another_is_refused_before_anything_is_written() {
    let ram = Ram::new();
    let machine = Machine::new(ram, 0, None);
    let state = machine.save().platform.gic;
    let refused = |change: &dyn Fn(&mut GicV1), reason: &str| {
        let mut changed = state.clone();
        set(&mut changed.distributor, 0x104, 0xff);
        change(&mut changed);
        let error = machine.gic.restore(&changed, &machine.mpidrs()).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
        assert_eq!(machine.save().platform.gic, state);
    };
    refused(&|gic| set(&mut gic.distributor, 0x4, 0), "0x4 of the distributor is");
    refused(&|gic| gic.distributor.truncate(9), "of the distributor is missing");
    refused(&|gic| gic.distributor.push((0xe000, 0)), "the distributor has");
    refused(&|gic| drop(gic.redistributors.pop()), "2 redistributors for 3 vCPUs");
    refused(&|gic| gic.redistributors[2].mpidr = 0x8000_0007, "no redistributor for the vCPU with MPIDR");
    refused(&|gic| set(&mut gic.redistributors[1].registers, 0xc, 0xff), "0xc of the redistributor of");
    refused(&|gic| gic.its = None, "knows of no ITS");
    refused(&|gic| gic.its.as_mut().unwrap().registers.truncate(9), "of the ITS is missing");
}

#[test]
#[ignore = "needs KVM; run in the lab's host"]
fn where_stolen_time_is_told_is_restored() {
    const STOLEN_TIME: Attribute = Attribute { group: 2, number: 0 };
    let ram = Ram::new();
    let machine = Machine::new(ram, 0, None);
    if !machine.vcpus[0].0.has_attribute(STOLEN_TIME) {
        // A kernel without CONFIG_SCHED_INFO has none; then the state says so.
        assert!(machine.save().vcpus.iter().all(|vcpu| vcpu.stolen_time.is_none()));
        return;
    }
    let address = |id: u64| RAM + 0x8_0000 + id * 64;
    for (id, (vcpu, _)) in (0..).zip(&machine.vcpus) {
        vcpu.set_attribute(STOLEN_TIME, &address(id)).unwrap();
    }
    let state = machine.save();
    assert!((0..).zip(&state.vcpus).all(|(id, vcpu)| vcpu.stolen_time == Some(address(id))));
    assert_eq!(Machine::restored(ram, 0, &state).save(), state);
}
