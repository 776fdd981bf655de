//! The GIC's interrupt translation service. Its tables are the guest's, in guest RAM; what KVM has cached of them it writes back
//! there when asked to, in a layout that is a part of its interface.

use kho_abi::document::aarch64::ItsV1;
use kvm_bindings::{
    KVM_DEV_ARM_ITS_RESTORE_TABLES, KVM_DEV_ARM_ITS_SAVE_TABLES, KVM_DEV_ARM_VGIC_CTRL_INIT, KVM_DEV_ARM_VGIC_GRP_ADDR,
    KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_GRP_ITS_REGS, KVM_VGIC_ITS_ADDR_TYPE, kvm_create_device,
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS,
};
use kvm_ioctls::{DeviceFd, VmFd};

use super::super::ArchError;
use super::gic::Values;
use super::ioctl::{Attribute, Attributes};

/// Where the guest finds it.
pub const ADDRESS: u64 = 0x0808_0000;
/// How much of the guest's address space it takes.
pub const SIZE: u64 = 128 << 10;

const CTLR: u32 = 0x0;
const IIDR: u32 = 0x4;
const TYPER: u32 = 0x8;
const CBASER: u32 = 0x80;
const CWRITER: u32 = 0x88;
const CREADR: u32 = 0x90;
const BASER: u32 = 0x100;

/// All registers but TYPER, which cannot be written, and CTLR, in the order in which they are written.
fn registers() -> Vec<u32> {
    // CBASER first, as the kernel's documentation wants it: writing it sets CREADR to zero. IIDR before the tables' addresses: it
    // says in which layout the tables are, and with it how large an entry is.
    let mut registers = vec![CBASER, IIDR, CREADR, CWRITER];
    registers.extend((0..8).map(|table| BASER + table * 8));
    registers
}

/// A VM's translation service.
pub struct Its(DeviceFd);

/// Its state, checked and in order.
pub struct Plan {
    registers: Vec<(u32, u64)>,
    ctlr: (u32, u64),
}

impl Its {
    /// Makes one where the host offers it. Must come before the GIC is started, as the GIC tells the guest whether there is one.
    pub fn new(vm: &VmFd) -> Result<Option<Self>, ArchError> {
        let mut create = kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS, ..Default::default() };
        let device = match vm.create_device(&mut create) {
            Err(error) if error.errno() == libc::ENODEV => return Ok(None),
            created => created.map_err(ArchError::kvm("create an ITS"))?,
        };
        // The documentation has the address set between the redistributors and the ITS's registers in a restore: what matters is
        // that it is there before the registers.
        device
            .set_attribute(Attribute::new(KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_ITS_ADDR_TYPE), &ADDRESS)
            .map_err(ArchError::kvm(&format!("place the ITS at {ADDRESS:#x}")))?;
        Ok(Some(Self(device)))
    }

    /// Starts it.
    pub fn init(&self) -> Result<(), ArchError> {
        self.control(KVM_DEV_ARM_VGIC_CTRL_INIT, "start the ITS")
    }

    /// Takes the registers, and makes KVM write what it has cached of the tables into guest RAM.
    pub fn save(&self) -> Result<ItsV1, ArchError> {
        self.control(KVM_DEV_ARM_ITS_SAVE_TABLES, "write the ITS's tables into the guest's memory")?;
        let registers = registers().into_iter().chain([TYPER, CTLR]);
        let registers = registers.map(|register| Ok((register, self.read(register)?))).collect::<Result<_, _>>()?;
        Ok(ItsV1 { registers })
    }

    /// Checks a state without writing anything.
    pub fn plan(&self, state: &ItsV1) -> Result<Plan, ArchError> {
        let ItsV1 { registers: saved } = state;
        let order = registers();
        let mut values = Values { part: "the ITS".to_owned(), saved };
        let registers = values.of(&order)?;
        let (typer, ctlr) = (values.of(&[TYPER])?[0].1, values.of(&[CTLR])?[0]);
        values.are(order.len() + 2)?;
        let found = self.read(TYPER)?;
        if found != typer {
            return Err(ArchError::Unfit(format!("GITS_TYPER is {found:#x}, the guest knows {typer:#x}")));
        }
        Ok(Plan { registers, ctlr })
    }

    /// Puts the state back. The redistributors must have been put back before, and guest RAM.
    pub fn restore(&self, plan: Plan) -> Result<(), ArchError> {
        let Plan { registers, ctlr } = plan;
        for (register, value) in registers {
            // KVM does not take the reset value of an address as it is: it makes it one of cached memory.
            if self.read(register)? != value {
                self.write(register, value)?;
            }
        }
        self.control(KVM_DEV_ARM_ITS_RESTORE_TABLES, "read the ITS's tables from the guest's memory")?;
        // Last: it makes the ITS go on with the guest's commands, for which it needs its tables.
        self.write(ctlr.0, ctlr.1)
    }

    fn control(&self, what: u32, operation: &str) -> Result<(), ArchError> {
        self.0.request(Attribute::new(KVM_DEV_ARM_VGIC_GRP_CTRL, what)).map_err(ArchError::kvm(operation))
    }

    /// Reads a register.
    pub fn read(&self, register: u32) -> Result<u64, ArchError> {
        let read = self.0.attribute(Attribute::new(KVM_DEV_ARM_VGIC_GRP_ITS_REGS, register));
        read.map_err(ArchError::kvm(&format!("read {register:#x} of the ITS")))
    }

    /// Writes a register.
    pub fn write(&self, register: u32, value: u64) -> Result<(), ArchError> {
        let written = self.0.set_attribute(Attribute::new(KVM_DEV_ARM_VGIC_GRP_ITS_REGS, register), &value);
        written.map_err(ArchError::kvm(&format!("write {value:#x} to {register:#x} of the ITS")))
    }
}
