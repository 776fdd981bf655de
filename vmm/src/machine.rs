//! A machine: KVM's VM, its RAM, its platform, its devices. `Machine::new` is the only way one is built, for a cold start as for a
//! restore.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kho_abi::document::machine::MachineV3;
use kho_abi::document::vcpu::VcpuState;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{IoEventAddress, Kvm, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::{self, ArchError, BootError, Platform, VcpuArch};
use crate::bus::Bus;
use crate::config::device::DeviceConfig;
use crate::config::{ConfigError, MachineConfig, VmConfig};
use crate::device::serial::{Serial, SerialError, SerialInput};
use crate::device::virtio::balloon;
use crate::device::virtio::mmio::{self, InterruptRegisters, Transport};
use crate::device::virtio::{Devices, VirtioDevice, VirtioError};
use crate::device::{self, Gate};
use crate::memory::{MemoryError, Ram};
use crate::persist;
use crate::vcpu::{self, Buses, Vcpu, VcpuError};

/// Why a machine cannot be built, saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Its shape is impossible.
    #[error("the VM cannot be built as asked")]
    Config(#[from] ConfigError),
    /// /dev/kvm cannot be opened.
    #[error("cannot open /dev/kvm: does this host have KVM, and may this user use it?")]
    Open(#[source] kvm_ioctls::Error),
    /// KVM, or the state handed over.
    #[error("cannot build or restore the VM")]
    Arch(#[from] ArchError),
    /// RAM.
    #[error("cannot give the VM its memory")]
    Memory(#[from] MemoryError),
    /// The serial port.
    #[error("cannot build the VM's devices")]
    Serial(#[from] SerialError),
    /// A virtio device.
    #[error("the VM's devices cannot be what they are to be")]
    Device(#[from] VirtioError),
    /// A vCPU.
    #[error("cannot restore the VM")]
    Vcpu(#[from] VcpuError),
    /// The event loop.
    #[error("cannot start the VM's device thread")]
    EventLoop(#[source] std::io::Error),
    /// An eventfd.
    #[error("cannot create an eventfd")]
    EventFd(#[source] std::io::Error),
    /// The kernel.
    #[error("cannot boot the guest")]
    Boot(#[from] BootError),
}

/// What a machine is built of beside its RAM: a shape that is possible, and its devices with what they need of this host open. It can
/// be there before RAM is, which in a restore may take long to arrive.
pub struct Parts {
    config: MachineConfig,
    devices: Devices,
}

impl Parts {
    /// Opens what the devices need.
    pub fn open(config: MachineConfig) -> Result<Self, MachineError> {
        config.validate()?;
        let devices = Devices::open(&config.devices)?;
        Ok(Self { config, devices })
    }
}

/// A machine without its vCPUs.
pub struct Machine {
    config: MachineConfig,
    vm: VmFd,
    ram: Ram,
    platform: Platform,
    serial: Arc<Mutex<Serial>>,
    serial_dropped: Arc<AtomicU64>,
    virtio: Vec<Arc<Mutex<Transport>>>,
    balloon: Arc<balloon::Control>,
    gate: Arc<Gate>,
    buses: Buses,
}

impl Machine {
    /// Builds a machine around its RAM, with vCPUs that nobody runs yet. In a restore the vCPUs' states say what the guest
    /// knows of its processors; all other state is put back by [`Self::restore`].
    pub fn new(parts: Parts, ram: Ram, states: Option<&[VcpuState]>) -> Result<(Self, Vec<Vcpu>), MachineError> {
        let Parts { config, devices } = parts;
        let kvm = Kvm::new().map_err(MachineError::Open)?;
        let end = ram.ranges().iter().map(|range| range.gpa + range.size).max().unwrap_or(0);
        let vm = arch::create_vm(&kvm, end)?;
        let mut platform = Platform::new(&kvm, &vm, config.cpus)?;
        for (slot, (range, userspace_addr)) in ram.host_addresses().enumerate() {
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: range.gpa,
                memory_size: range.size,
                userspace_addr,
            };
            // SAFETY: the range is a part of `ram`'s mapping, which is never unmapped.
            unsafe { vm.set_user_memory_region(region) }.map_err(ArchError::kvm("give the VM its memory"))?;
        }
        let mut vcpus = Vec::new();
        for id in 0..config.cpus {
            let fd = vm.create_vcpu(id.into()).map_err(ArchError::kvm("create a vCPU"))?;
            let state = states.and_then(|states| states.get(id as usize));
            let arch = VcpuArch::new(&kvm, &vm, &fd, (id, config.cpus), state)?;
            vcpus.push(Vcpu { id, fd, arch });
        }
        platform.complete(&vcpus, states)?;
        let interrupt = EventFd::new(libc::EFD_NONBLOCK).map_err(MachineError::EventFd)?;
        platform.connect_serial(&vm, &interrupt)?;
        let serial = Serial::new(&config.serial, interrupt)?;
        let serial_dropped = serial.dropped();
        let serial = Arc::new(Mutex::new(serial));
        let (mut ports, mut memory) = (Bus::default(), Bus::default());
        platform.place_devices(&mut ports, &mut memory, serial.clone());
        let balloon = Arc::new(balloon::Control::new(ram.discards()).map_err(MachineError::EventFd)?);
        let devices = devices.complete(&balloon).enumerate();
        let virtio = devices.map(|(slot, device)| place_virtio(&vm, &platform, &mut memory, slot, device, &ram));
        let virtio = virtio.collect::<Result<_, MachineError>>()?;
        let buses = Buses { ports: Arc::new(ports), memory: Arc::new(memory) };
        let gate = Arc::new(Gate::default());
        Ok((Self { config, vm, ram, platform, serial, serial_dropped, virtio, balloon, gate, buses }, vcpus))
    }

    /// Loads a kernel and points the first vCPU at it.
    pub fn boot(&self, config: &VmConfig, vcpus: &[Vcpu]) -> Result<(), MachineError> {
        self.platform.boot(&self.ram.guest, config, vcpus)
    }

    /// Puts back what a document holds, in an order that is safe: what vCPUs share and depend on, the vCPUs, what depends on them,
    /// the devices that interrupt them.
    /// `frequency` is the raw counter's in Hz.
    pub fn restore(&mut self, vcpus: &mut [Vcpu], document: &MachineV3, frequency: u64) -> Result<(), MachineError> {
        let MachineV3 {
            name: _,
            architecture: _,
            generation: _,
            paused: _,
            config: _,
            ram: _,
            platform,
            vcpus: states,
            serial,
            virtio,
        } = document;
        self.platform.restore_before_vcpus(&self.vm, platform, frequency)?;
        vcpu::restore_all(vcpus, states)?;
        self.platform.restore_after_vcpus(platform)?;
        self.serial.lock().unwrap_or_else(PoisonError::into_inner).restore(serial)?;
        for (mut transport, state) in self.transports().zip(virtio) {
            transport.restore(state)?;
        }
        Ok(())
    }

    fn transports(&self) -> impl Iterator<Item = MutexGuard<'_, Transport>> {
        self.virtio.iter().map(|transport| transport.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Lets the virtio devices work for the first time in this process. As they write to the guest's memory, they must not do so
    /// before the guest itself may run.
    pub fn start_virtio(&self, restored: bool) {
        for mut transport in self.transports() {
            if restored { transport.resume_restored() } else { transport.resume() }
        }
    }

    /// Makes durable what would be lost with the host's kernel, while the guest and its devices may go on, so that little is left
    /// to be done once they stand still.
    pub fn flush_devices(&self) -> Result<(), MachineError> {
        self.transports().try_for_each(|mut transport| transport.flush())?;
        Ok(())
    }

    /// Starts what brings the outside world to the devices.
    pub fn start_devices(&self) -> Result<(), MachineError> {
        let input = SerialInput::new(self.serial.clone(), &self.config.serial)?;
        device::start_event_loop(self.gate.clone(), input).map_err(MachineError::EventLoop)
    }

    /// Lets nothing more from outside reach the devices, lets them finish what is in flight, and makes durable what would be lost.
    /// The vCPUs must stand still.
    pub fn pause_devices(&self) -> Result<(), MachineError> {
        self.gate.close();
        for mut transport in self.transports() {
            transport.pause();
        }
        self.flush_devices()
    }

    /// Lets the devices work, and the outside world reach them, again.
    pub fn resume_devices(&self) {
        for mut transport in self.transports() {
            transport.resume();
        }
        self.gate.open();
    }

    /// The document of this machine. vCPUs and devices must stand still.
    pub fn save(&self, generation: u64, paused: bool, vcpus: Vec<VcpuState>) -> Result<MachineV3, MachineError> {
        Ok(MachineV3 {
            name: self.config.name.clone(),
            architecture: arch::NAME.to_owned(),
            generation,
            paused,
            config: persist::config_record(&self.config),
            ram: self.ram.ranges().to_vec(),
            platform: self.platform.save(&self.vm)?,
            vcpus,
            serial: self.serial.lock().unwrap_or_else(PoisonError::into_inner).save(),
            virtio: self.transports().map(|transport| transport.save()).collect(),
        })
    }

    /// How many bytes of the serial port's output nobody will read. Waits for nothing, as whoever has the port may.
    pub fn serial_dropped(&self) -> u64 {
        self.serial_dropped.load(Ordering::Relaxed)
    }

    /// What it was built from.
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// Its RAM.
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// Its balloon, if it has one.
    pub fn balloon(&self) -> Option<&balloon::Control> {
        self.config.devices.contains(&DeviceConfig::Balloon).then_some(&*self.balloon)
    }

    /// Where its vCPUs find devices.
    pub fn buses(&self) -> Buses {
        self.buses.clone()
    }

    /// Another handle to the memfd of its RAM.
    pub fn ram_file(&self) -> Result<OwnedFd, MachineError> {
        let duplicate = self.ram.file().try_clone_to_owned();
        Ok(duplicate.map_err(|source| MemoryError::System { operation: "duplicate the memfd's descriptor", source })?)
    }
}

/// Puts a virtio device where the guest expects that of its slot.
fn place_virtio(
    vm: &VmFd,
    platform: &Platform,
    bus: &mut Bus,
    slot: usize,
    device: Box<dyn VirtioDevice>,
    ram: &Ram,
) -> Result<Arc<Mutex<Transport>>, MachineError> {
    let interrupt = EventFd::new(libc::EFD_NONBLOCK).map_err(MachineError::EventFd)?;
    let transport = Transport::new(device, ram.guest.clone(), interrupt).map_err(MachineError::EventFd)?;
    platform.connect_virtio(vm, transport.interrupt_line(), slot)?;
    let address = Platform::virtio_address(slot);
    for (number, kick) in (0_u32..).zip(transport.kicks()) {
        vm.register_ioevent(kick, &IoEventAddress::Mmio(address + mmio::NOTIFY), number)
            .map_err(ArchError::kvm("connect a virtio device's queue"))?;
    }
    // Before the other registers, which the bus would find at the same addresses.
    let interrupt = transport.interrupt_registers();
    bus.insert(address + InterruptRegisters::OFFSET, InterruptRegisters::SIZE, Arc::new(Mutex::new(interrupt)));
    let transport = Arc::new(Mutex::new(transport));
    bus.insert(address, mmio::SIZE, transport.clone());
    Ok(transport)
}
