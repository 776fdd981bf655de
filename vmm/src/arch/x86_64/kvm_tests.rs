//! vCPUs without a program, wherever a freeze may find one: brought there through KVM, taken, put back into a second machine, and
//! compared. They need a host's KVM, so they are run in the lab's host: `vmm`'s unit tests with `--ignored`.

use kho_abi::document::vcpu::VcpuState;
use kho_abi::document::vcpu::x86_64::VcpuV1;
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED,
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, KVM_X86_SHADOW_INT_MOV_SS, KVM_X86_SHADOW_INT_STI,
    kvm_mp_state, kvm_msi, kvm_sregs, kvm_vcpu_events,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::super::payload_struct;
use super::platform::Platform;
use super::vcpu::VcpuArch;

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
