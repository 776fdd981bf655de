//! The ACPI tables of a guest: hardware-reduced, so that there is no more hardware in them than there is in the machine: the
//! interrupt controllers, the serial port, power-off and reset.

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::super::boot::BootError;
use super::platform::{POWER_PORT, Platform, SERIAL_INTERRUPT, SERIAL_PORT, VIRTIO_INTERRUPTS};
use super::power;
use crate::device::serial;
use crate::device::virtio::mmio;

const OEM: [u8; 6] = *b"KHOVMM";
const OEM_TABLE: [u8; 8] = *b"KHOVMM  ";
const REVISION: u32 = 1;

/// What a PC has and this machine has not (ACPI 6.5, 5.2.9.3): there is nothing to look for, which takes a guest seconds.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_CLOCK: u16 = 1 << 5;

const LAPIC_ADDRESS: u32 = 0xfee0_0000;
const IOAPIC_ADDRESS: u32 = 0xfec0_0000;

/// Where the tables lie: in the BIOS area, which guests search for the first of them.
pub const START: u64 = 0xe_0000;
/// Where the BIOS area ends.
const END: u64 = 0x10_0000;

/// Lays tables one behind the other.
struct Writer<'a> {
    memory: &'a GuestMemoryMmap,
    next: u64,
}

impl Writer<'_> {
    fn write(&mut self, table: &dyn Aml) -> Result<u64, BootError> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let address = self.next;
        self.next = (address + bytes.len() as u64).next_multiple_of(16);
        if self.next > END {
            return Err(BootError::NoRoom("the ACPI tables"));
        }
        self.memory.write_slice(&bytes, GuestAddress(address)).map_err(BootError::Memory)?;
        Ok(address)
    }
}

/// Writes the tables for `cpus` vCPUs and as many virtio devices as `slots` and returns the address of the root pointer.
pub fn write(memory: &GuestMemoryMmap, cpus: u32, slots: usize) -> Result<u64, BootError> {
    // The root pointer comes first, where a search finds it at once; its content is known last.
    let root = START;
    let mut writer = Writer { memory, next: root + 64 };
    let dsdt = writer.write(&dsdt(slots))?;

    let register =
        |offset: u64| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(POWER_PORT) + offset);
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_CLOCK).into();
    fadt.reset_reg = register(power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = register(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = register(power::SLEEP_STATUS);
    let fadt = writer.write(&fadt.finalize())?;

    let mut madt = MADT::new(OEM, OEM_TABLE, REVISION, LocalInterruptController::Address(LAPIC_ADDRESS));
    for id in 0..cpus {
        let id = u8::try_from(id).map_err(|_| BootError::NoRoom("more than 255 vCPUs without x2APIC"))?;
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    // Next to the 255 ids that LAPICs can have; nothing asks for it.
    madt.add_structure(IoApic::new(0, IOAPIC_ADDRESS, 0));
    let madt = writer.write(&madt)?;

    let mut xsdt = XSDT::new(OEM, OEM_TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = writer.write(&xsdt)?;
    writer.next = root;
    writer.write(&Rsdp::new(OEM, xsdt))
}

fn dsdt(slots: usize) -> Sdt {
    let mut bytes = Vec::new();
    let name = aml::EISAName::new("PNP0501");
    let ports = aml::IO::new(SERIAL_PORT, SERIAL_PORT, 0, serial::SIZE as u8);
    let interrupt = aml::Interrupt::new(true, true, false, false, SERIAL_INTERRUPT);
    aml::Device::new(
        "_SB_.COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &name),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(vec![&interrupt, &ports])),
        ],
    )
    .to_aml_bytes(&mut bytes);
    for (slot, interrupt) in VIRTIO_INTERRUPTS.iter().enumerate().take(slots) {
        write_virtio(slot, *interrupt, &mut bytes);
    }
    aml::Name::new("_S5_".into(), &aml::Package::new(vec![&power::SLEEP_TYPE_OFF])).to_aml_bytes(&mut bytes);
    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, REVISION);
    table.append_slice(&bytes);
    table
}

/// Declares the virtio-mmio device of a slot, by the name that Linux knows such devices by.
fn write_virtio(slot: usize, interrupt: u32, bytes: &mut Vec<u8>) {
    // The hole in which they lie ends at 4 GiB.
    let registers = aml::Memory32Fixed::new(true, Platform::virtio_address(slot) as u32, mmio::SIZE as u32);
    // An irqfd without a resample descriptor is a pulse.
    let interrupt = aml::Interrupt::new(true, true, false, false, interrupt);
    aml::Device::new(
        format!("_SB_.VR{slot:02X}").as_str().into(),
        vec![
            &aml::Name::new("_HID".into(), &"LNRO0005"),
            &aml::Name::new("_UID".into(), &slot),
            &aml::Name::new("_CCA".into(), &aml::ONE),
            &aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(vec![&registers, &interrupt])),
        ],
    )
    .to_aml_bytes(bytes);
}
