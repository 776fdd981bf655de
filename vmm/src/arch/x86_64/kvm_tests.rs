//! vCPUs without a program, wherever a freeze may find one: brought there through KVM, taken, put back into a second machine, and
//! compared. They need a host's KVM, so they are run in the lab's host: `vmm`'s unit tests with `--ignored`.

use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use kho_abi::document::vcpu::VcpuState;
use kho_abi::document::vcpu::x86_64::VcpuV1;
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED,
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, KVM_X86_SHADOW_INT_MOV_SS, KVM_X86_SHADOW_INT_STI,
    kvm_mp_state, kvm_msi, kvm_regs, kvm_sregs, kvm_userspace_memory_region, kvm_vcpu_events,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::super::payload_struct;
use super::platform::Platform;
use super::vcpu::VcpuArch;
use crate::bus::{Bus, BusDevice, Request};
use crate::vcpu::{Buses, OnEnding, Vcpu, VcpuHandle};
use crate::vm::Ending;

const CPUS: u32 = 2;
/// The vCPU that things are done to: a secondary one.
const SECOND: usize = 1;

/// What a message to a LAPIC is (Intel SDM, volume 3, "Message Data Register Format").
const NMI: u32 = 4 << 8;
const INIT: u32 = 5 << 8;
const STARTUP: u32 = 6 << 8;

struct Machine {
    vm: VmFd,
    vcpus: Vec<(VcpuFd, VcpuArch)>,
}

impl Machine {
    fn new(states: Option<&[VcpuState]>) -> Self {
        let kvm = Kvm::new().unwrap();
        let vm = kvm.create_vm().unwrap();
        let _platform = Platform::new(&kvm, &vm, CPUS).unwrap();
        let vcpus = (0..CPUS).map(|id| {
            let vcpu = vm.create_vcpu(id.into()).unwrap();
            let state = states.map(|states| &states[id as usize]);
            let arch = VcpuArch::new(&kvm, &vm, &vcpu, (id, CPUS), state).unwrap();
            (vcpu, arch)
        });
        let vcpus: Vec<_> = vcpus.collect();
        // KVM looks at which LAPICs there are when one is written to, as by a guest that starts.
        let (second, _) = &vcpus[SECOND];
        second.set_lapic(&second.get_lapic().unwrap()).unwrap();
        Self { vm, vcpus }
    }

    fn second(&self) -> &VcpuFd {
        &self.vcpus[SECOND].0
    }

    /// Sends the second vCPU's LAPIC a message, as the first one would, or a device.
    fn send(&self, data: u32) {
        let message = kvm_msi { address_lo: 0xfee0_0000 | (SECOND as u32) << 12, data, ..Default::default() };
        assert!(self.vm.signal_msi(message).unwrap() > 0);
    }

    fn save(&self) -> Vec<VcpuState> {
        self.vcpus.iter().map(|(vcpu, arch)| arch.save(vcpu).unwrap()).collect()
    }

    /// A second machine that takes over, as the next kernel's would. That it has read back what it has written is part of it.
    fn restored(states: &[VcpuState]) -> Self {
        let machine = Self::new(Some(states));
        for ((vcpu, arch), state) in machine.vcpus.iter().zip(states) {
            arch.restore(vcpu, state).unwrap();
        }
        machine
    }
}

fn second(states: &[VcpuState]) -> &VcpuV1 {
    match &states[SECOND] {
        VcpuState::X86_64(state) => state,
        VcpuState::Aarch64(_) => unreachable!(),
    }
}

fn events(states: &[VcpuState]) -> kvm_vcpu_events {
    payload_struct("the pending events", &second(states).events).unwrap()
}

fn mp_state(states: &[VcpuState]) -> u32 {
    payload_struct::<kvm_mp_state>("the MP state", &second(states).mp_state).unwrap().mp_state
}

fn code_base(states: &[VcpuState]) -> u64 {
    payload_struct::<kvm_sregs>("the segment registers", &second(states).sregs).unwrap().cs.base
}

/// All of it that stands still.
fn assert_same(found: &[VcpuState], wanted: &[VcpuState]) {
    let still = |states: &[VcpuState]| {
        let VcpuV1 { regs, sregs, events, mp_state, lapic, .. } = second(states).clone();
        (regs, sregs, events, mp_state, lapic)
    };
    assert_eq!(still(found), still(wanted));
}

#[test]
#[ignore = "needs KVM; run in the lab's host"]
fn an_nmi_that_has_not_been_taken_is_still_to_come_and_not_twice() {
    let first = Machine::new(None);
    first.second().set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).unwrap();
    first.send(NMI);
    let states = first.save();
    assert_eq!(events(&states).nmi.pending, 1);
    let again = Machine::restored(&states).save();
    assert_same(&again, &states);
}

#[test]
#[ignore = "needs KVM; run in the lab's host"]
fn an_nmi_that_comes_in_the_handler_of_another_waits_for_its_end() {
    let first = Machine::new(None);
    let mut set = first.second().get_vcpu_events().unwrap();
    set.flags |= KVM_VCPUEVENT_VALID_NMI_PENDING;
    (set.nmi.pending, set.nmi.masked) = (1, 1);
    first.second().set_vcpu_events(&set).unwrap();
    let states = first.save();
    let found = events(&states);
    assert_eq!((found.nmi.pending, found.nmi.masked), (1, 1));
    let again = Machine::restored(&states).save();
    assert_same(&again, &states);
}

#[test]
#[ignore = "needs KVM; run in the lab's host"]
fn an_instruction_after_sti_is_still_not_interrupted() {
    let first = Machine::new(None);
    let mut set = first.second().get_vcpu_events().unwrap();
    set.flags |= KVM_VCPUEVENT_VALID_SHADOW;
    set.interrupt.shadow = KVM_X86_SHADOW_INT_STI as u8;
    first.second().set_vcpu_events(&set).unwrap();
    let states = first.save();
    // AMD's processors do not tell the two kinds apart.
    let shadow = u32::from(events(&states).interrupt.shadow);
    assert!(shadow & (KVM_X86_SHADOW_INT_STI | KVM_X86_SHADOW_INT_MOV_SS) != 0, "{shadow}");
    let again = Machine::restored(&states).save();
    assert_same(&again, &states);
}

#[test]
#[ignore = "needs KVM; run in the lab's host"]
fn a_halted_vcpu_stays_halted_and_one_that_waits_goes_on_waiting() {
    for state in [KVM_MP_STATE_HALTED, KVM_MP_STATE_UNINITIALIZED] {
        let first = Machine::new(None);
        first.second().set_mp_state(kvm_mp_state { mp_state: state }).unwrap();
        let states = first.save();
        assert_eq!(mp_state(&states), state);
        let again = Machine::restored(&states).save();
        assert_same(&again, &states);
    }
}

#[test]
#[ignore = "needs KVM; run in the lab's host"]
fn the_start_of_a_vcpu_may_begin_before_a_live_update_and_end_after_it() {
    // The first vCPU has sent INIT, and STARTUP only after the update.
    let first = Machine::new(None);
    first.send(INIT);
    let states = first.save();
    assert_eq!(mp_state(&states), KVM_MP_STATE_INIT_RECEIVED);
    let second = Machine::restored(&states);
    assert_same(&second.save(), &states);
    second.send(STARTUP | 0x9a);
    let started = second.save();
    assert_eq!((mp_state(&started), code_base(&started)), (KVM_MP_STATE_RUNNABLE, 0x9a000));

    // Both have been sent, and nothing has been done about them.
    let first = Machine::new(None);
    first.send(INIT);
    first.send(STARTUP | 0x9a);
    let states = first.save();
    let again = Machine::restored(&states).save();
    assert_same(&again, &states);
    assert_eq!((mp_state(&again), code_base(&again)), (KVM_MP_STATE_RUNNABLE, 0x9a000));
}

/// Where what a guest does by itself is seen: who writes there powers off.
const BUTTON: u64 = 0x2_0000;

struct Button;

impl BusDevice for Button {
    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}

    fn write(&mut self, _offset: u64, _data: &[u8]) -> Option<Request> {
        Some(Request::PowerOff)
    }
}

/// How a guest ends whose exception handler begins with the button, and whose stack is in the segment that begins there.
fn ending_with_stack_at(base: u64) -> Ending {
    const CODE: u64 = 0x1000;
    const HANDLER: u16 = 0x1100;
    const STACK: u64 = 0x8000;
    const GENERAL_PROTECTION: u64 = 13;
    const SIZE: u64 = 0x1_0000;
    let ram = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), SIZE as usize)]).unwrap();
    let poke = |address: u64, bytes: &[u8]| ram.write_slice(bytes, GuestAddress(address)).unwrap();
    // mov ecx, 0xdeadbeef; wrmsr: there is no such register.
    poke(CODE, &[0x66, 0xb9, 0xef, 0xbe, 0xad, 0xde, 0x0f, 0x30]);
    // mov ax, 0x2000; mov ds, ax; mov [0], al: the button.
    poke(HANDLER.into(), &[0xb8, 0x00, 0x20, 0x8e, 0xd8, 0xa2, 0x00, 0x00]);
    // The table of interrupt vectors has an offset, and a segment, which is zero.
    poke(GENERAL_PROTECTION * 4, &HANDLER.to_le_bytes());

    let Machine { vm, vcpus } = Machine::new(None);
    let userspace_addr = ram.get_host_address(GuestAddress(0)).unwrap() as u64;
    let region = kvm_userspace_memory_region { memory_size: SIZE, userspace_addr, ..Default::default() };
    // SAFETY: the memory is there until the end, when the vCPU has left the guest.
    unsafe { vm.set_user_memory_region(region) }.unwrap();
    let (fd, arch) = vcpus.into_iter().next().unwrap();
    let mut sregs = fd.get_sregs().unwrap();
    for (segment, base) in [(&mut sregs.cs, 0), (&mut sregs.ss, base)] {
        (segment.base, segment.selector) = (base, (base >> 4) as u16);
    }
    fd.set_sregs(&sregs).unwrap();
    fd.set_regs(&kvm_regs { rip: CODE, rsp: STACK, rflags: 2, ..Default::default() }).unwrap();

    let mut memory = Bus::default();
    memory.insert(BUTTON, 1, Arc::new(Mutex::new(Button)));
    let buses = Buses { ports: Arc::default(), memory: Arc::new(memory) };
    let (tell, endings) = mpsc::channel();
    let on_ending: OnEnding = Arc::new(move |ending| tell.send(ending).unwrap());
    let vcpu = VcpuHandle::start(Vcpu { id: 0, fd, arch }, buses, on_ending).unwrap();
    vcpu.run(false, None).unwrap();
    let ending = endings.recv_timeout(Duration::from_secs(30));
    vcpu.ask_to_pause().unwrap();
    drop(vcpu.await_pause());
    ending.unwrap()
}

#[test]
#[ignore = "needs KVM; run in the lab's host"]
fn a_handler_of_an_exception_may_begin_with_an_access_to_a_device() {
    assert_eq!(ending_with_stack_at(0), Ending::PowerOff);
}

#[test]
#[ignore = "needs KVM; run in the lab's host"]
fn a_guest_whose_stack_is_no_memory_when_it_needs_it_for_an_exception_ends() {
    let ending = ending_with_stack_at(BUTTON);
    assert!(matches!(&ending, Ending::Failed(reason) if reason.contains("in the delivery of an event")), "{ending:?}");
}
