//! The device tree that tells the guest what its machine consists of.
//!
//! Names and properties are those of the kernel's bindings (`Documentation/devicetree/bindings`).

use rustix::rand::{GetRandomFlags, getrandom};
use vm_fdt::{Error, FdtWriter};

use super::super::boot::BootError;
use super::RAM_START;
use super::boot::Machine;
use super::gic::{DISTRIBUTOR, DISTRIBUTOR_SIZE, REDISTRIBUTOR_SIZE, REDISTRIBUTORS};
use super::its;
use super::platform::{Platform, RTC, RTC_INTERRUPT, SERIAL, SERIAL_INTERRUPT};
use crate::device::virtio::mmio;

/// What the tree is made from.
pub struct Tree<'a> {
    /// RAM in bytes.
    pub ram: u64,
    /// Its processors and interrupt controller.
    pub machine: &'a Machine<'a>,
    /// The kernel's command line.
    pub append: &'a str,
    /// The initrd's address and size.
    pub initrd: Option<(u64, u64)>,
    /// How many virtio devices there are.
    pub slots: usize,
}

const GIC_PHANDLE: u32 = 1;
const ITS_PHANDLE: u32 = 2;
const CLOCK_PHANDLE: u32 = 3;
/// The first vCPU's; those of the others follow.
const CPU_PHANDLES: u32 = 0x100;

/// Kinds of interrupts in an `interrupts` property, …
const SHARED: u32 = 0;
const PRIVATE: u32 = 1;
/// … and how they are signalled.
const EDGE_RISING: u32 = 1;
const LEVEL_HIGH: u32 = 4;
const LEVEL_LOW: u32 = 8;

/// The number of the first interrupt that belongs to one vCPU and is no message between them; properties count from it.
const FIRST_PRIVATE: u32 = 16;

/// The architected timers' private interrupts: of secure EL1 (that no guest has), EL1, the virtual one, and EL2.
const TIMERS: [u32; 4] = [13, 14, 11, 10];

/// A device's registers take a page, so that the guest can map it alone.
const PAGE: u64 = 0x1000;
/// The affinity fields of an MPIDR.
const AFFINITY: u64 = 0xff_00ff_ffff;

/// Makes the tree.
pub fn build(tree: &Tree<'_>) -> Result<Vec<u8>, BootError> {
    let mut seed = [0; 64];
    getrandom(&mut seed, GetRandomFlags::empty()).map_err(|errno| BootError::Parameters(Box::new(errno)))?;
    write(tree, &seed).map_err(|error| BootError::Parameters(error.to_string().into()))
}

fn write(tree: &Tree<'_>, seed: &[u8; 64]) -> Result<Vec<u8>, Error> {
    let mut fdt = FdtWriter::new()?;
    let root = fdt.begin_node("")?;
    fdt.property_string("compatible", "linux,dummy-virt")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_u32("interrupt-parent", GIC_PHANDLE)?;
    chosen(&mut fdt, tree, seed)?;
    let memory = fdt.begin_node(&format!("memory@{RAM_START:x}"))?;
    fdt.property_string("device_type", "memory")?;
    fdt.property_array_u64("reg", &[RAM_START, tree.ram])?;
    fdt.end_node(memory)?;
    cpus(&mut fdt, tree.machine.mpidrs)?;
    gic(&mut fdt, tree.machine)?;
    let timer = fdt.begin_node("timer")?;
    fdt.property_string("compatible", "arm,armv8-timer")?;
    fdt.property_array_u32("interrupts", &TIMERS.map(|timer| [PRIVATE, timer, LEVEL_LOW]).concat())?;
    fdt.property_null("always-on")?;
    fdt.end_node(timer)?;
    if let Some(interrupt) = tree.machine.pmu_interrupt {
        let pmu = fdt.begin_node("pmu")?;
        fdt.property_string("compatible", "arm,armv8-pmuv3")?;
        fdt.property_array_u32("interrupts", &[PRIVATE, interrupt - FIRST_PRIVATE, LEVEL_HIGH])?;
        fdt.end_node(pmu)?;
    }
    devices(&mut fdt)?;
    for slot in 0..tree.slots {
        virtio(&mut fdt, slot)?;
    }
    fdt.end_node(root)?;
    fdt.finish()
}

fn chosen(fdt: &mut FdtWriter, tree: &Tree<'_>, seed: &[u8; 64]) -> Result<(), Error> {
    let chosen = fdt.begin_node("chosen")?;
    fdt.property_string("bootargs", tree.append)?;
    fdt.property_string("stdout-path", &format!("/serial@{SERIAL:x}"))?;
    if let Some((address, size)) = tree.initrd {
        fdt.property_u64("linux,initrd-start", address)?;
        fdt.property_u64("linux,initrd-end", address + size)?;
    }
    let (address_space, pool) = seed.split_at(size_of::<u64>());
    fdt.property("kaslr-seed", address_space)?;
    fdt.property("rng-seed", pool)?;
    fdt.end_node(chosen)
}

fn cpus(fdt: &mut FdtWriter, mpidrs: &[u64]) -> Result<(), Error> {
    let cpus = fdt.begin_node("cpus")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 0)?;
    for (number, mpidr) in (0..).zip(mpidrs) {
        let affinity = mpidr & AFFINITY;
        let cpu = fdt.begin_node(&format!("cpu@{affinity:x}"))?;
        fdt.property_string("device_type", "cpu")?;
        fdt.property_string("compatible", "arm,armv8")?;
        fdt.property_string("enable-method", "psci")?;
        fdt.property_u64("reg", affinity)?;
        fdt.property_phandle(CPU_PHANDLES + number)?;
        fdt.end_node(cpu)?;
    }
    // One cluster of cores of one thread each.
    let map = fdt.begin_node("cpu-map")?;
    let cluster = fdt.begin_node("cluster0")?;
    for (number, _) in (0..).zip(mpidrs) {
        let core = fdt.begin_node(&format!("core{number}"))?;
        fdt.property_u32("cpu", CPU_PHANDLES + number)?;
        fdt.end_node(core)?;
    }
    fdt.end_node(cluster)?;
    fdt.end_node(map)?;
    fdt.end_node(cpus)?;
    let psci = fdt.begin_node("psci")?;
    fdt.property_string_list("compatible", vec!["arm,psci-1.0".into(), "arm,psci-0.2".into()])?;
    fdt.property_string("method", "hvc")?;
    fdt.end_node(psci)
}

fn gic(fdt: &mut FdtWriter, machine: &Machine<'_>) -> Result<(), Error> {
    let gic = fdt.begin_node(&format!("interrupt-controller@{DISTRIBUTOR:x}"))?;
    fdt.property_string("compatible", "arm,gic-v3")?;
    fdt.property_null("interrupt-controller")?;
    fdt.property_u32("#interrupt-cells", 3)?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_null("ranges")?;
    let redistributors = REDISTRIBUTOR_SIZE * machine.mpidrs.len() as u64;
    fdt.property_array_u64("reg", &[DISTRIBUTOR, DISTRIBUTOR_SIZE, REDISTRIBUTORS, redistributors])?;
    fdt.property_phandle(GIC_PHANDLE)?;
    if machine.has_its {
        let translation = fdt.begin_node(&format!("msi-controller@{:x}", its::ADDRESS))?;
        fdt.property_string("compatible", "arm,gic-v3-its")?;
        fdt.property_null("msi-controller")?;
        fdt.property_u32("#msi-cells", 1)?;
        fdt.property_array_u64("reg", &[its::ADDRESS, its::SIZE])?;
        fdt.property_phandle(ITS_PHANDLE)?;
        fdt.end_node(translation)?;
    }
    fdt.end_node(gic)
}

fn devices(fdt: &mut FdtWriter) -> Result<(), Error> {
    /// What divides down to the rates of a serial port; the port itself is as fast as the guest.
    const SERIAL_CLOCK: u32 = 1_843_200;
    let serial = fdt.begin_node(&format!("serial@{SERIAL:x}"))?;
    fdt.property_string("compatible", "ns16550a")?;
    fdt.property_array_u64("reg", &[SERIAL, PAGE])?;
    fdt.property_u32("clock-frequency", SERIAL_CLOCK)?;
    // An irqfd without a resample descriptor is a pulse.
    fdt.property_array_u32("interrupts", &[SHARED, SERIAL_INTERRUPT, EDGE_RISING])?;
    fdt.end_node(serial)?;
    let clock = fdt.begin_node("apb-pclk")?;
    fdt.property_string("compatible", "fixed-clock")?;
    fdt.property_u32("#clock-cells", 0)?;
    fdt.property_u32("clock-frequency", 24_000_000)?;
    fdt.property_string("clock-output-names", "clk24mhz")?;
    fdt.property_phandle(CLOCK_PHANDLE)?;
    fdt.end_node(clock)?;
    let rtc = fdt.begin_node(&format!("rtc@{RTC:x}"))?;
    fdt.property_string_list("compatible", vec!["arm,pl031".into(), "arm,primecell".into()])?;
    fdt.property_array_u64("reg", &[RTC, PAGE])?;
    fdt.property_array_u32("interrupts", &[SHARED, RTC_INTERRUPT, LEVEL_HIGH])?;
    fdt.property_u32("clocks", CLOCK_PHANDLE)?;
    fdt.property_string("clock-names", "apb_pclk")?;
    fdt.end_node(rtc)
}

fn virtio(fdt: &mut FdtWriter, slot: usize) -> Result<(), Error> {
    let address = Platform::virtio_address(slot);
    let node = fdt.begin_node(&format!("virtio_mmio@{address:x}"))?;
    fdt.property_string("compatible", "virtio,mmio")?;
    fdt.property_array_u64("reg", &[address, mmio::SIZE])?;
    fdt.property_array_u32("interrupts", &[SHARED, Platform::virtio_interrupt(slot), EDGE_RISING])?;
    fdt.property_null("dma-coherent")?;
    fdt.end_node(node)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::device::DEVICES_MAX;
    use dtoolkit::fdt::{Fdt, FdtNode};
    use dtoolkit::{Node as _, Property as _};
    use std::collections::BTreeMap;

    const MACHINE: Machine<'_> =
        Machine { mpidrs: &[0x8000_0000, 0x8000_0001], has_its: true, pmu_interrupt: Some(23) };

    /// Not the document's reader, which refuses names that no document has.
    struct Node {
        name: String,
        properties: BTreeMap<String, Vec<u8>>,
        children: Vec<Node>,
    }

    impl From<FdtNode<'_>> for Node {
        fn from(node: FdtNode<'_>) -> Self {
            Self {
                name: node.name().to_owned(),
                properties: node.properties().map(|found| (found.name().to_owned(), found.value().to_vec())).collect(),
                children: node.children().map(Self::from).collect(),
            }
        }
    }

    fn tree(machine: &Machine<'_>) -> Node {
        let initrd = Some((0x4300_0000, 0x1234));
        let tree = Tree { ram: 64 << 20, machine, append: "console=ttyS0", initrd, slots: DEVICES_MAX };
        Fdt::new(&build(&tree).unwrap()).unwrap().root().into()
    }

    fn child<'a>(node: &'a Node, name: &str) -> Option<&'a Node> {
        node.children.iter().find(|node| node.name == name)
    }

    fn cells(node: &Node, property: &str) -> Vec<u32> {
        let (cells, rest) = node.properties[property].as_chunks();
        assert!(rest.is_empty(), "{property}");
        cells.iter().map(|cell| u32::from_be_bytes(*cell)).collect()
    }

    /// Addresses and sizes of the registers of all devices, and of RAM.
    fn ranges(node: &Node) -> Vec<(u64, u64)> {
        let own = node.properties.get("reg").filter(|_| !node.name.starts_with("cpu@"));
        let cells = own.map(|_| cells(node, "reg")).unwrap_or_default();
        let number = |high: u32, low: u32| u64::from(high) << 32 | u64::from(low);
        let own = cells.as_chunks().0.iter().map(|&[a, b, c, d]| (number(a, b), number(c, d)));
        own.chain(node.children.iter().flat_map(ranges)).collect()
    }

    #[test]
    fn tree_names_what_the_guest_was_given() {
        let root = tree(&MACHINE);
        let chosen = child(&root, "chosen").unwrap();
        let property = |name: &str| chosen.properties[name].as_slice();
        assert_eq!(property("bootargs"), b"console=ttyS0\0");
        assert_eq!(property("linux,initrd-start"), 0x4300_0000u64.to_be_bytes());
        assert_eq!(property("linux,initrd-end"), 0x4300_1234u64.to_be_bytes());
        assert_eq!(property("rng-seed").len(), 56);
        // The bit that says that the format is the current one is no part of the affinity, by which PSCI names a vCPU.
        let cpus = child(&root, "cpus").unwrap();
        let (map, cpus): (Vec<_>, Vec<_>) = cpus.children.iter().partition(|node| node.name == "cpu-map");
        assert_eq!(cpus.iter().map(|cpu| cells(cpu, "reg")).collect::<Vec<_>>(), [[0, 0], [0, 1]]);
        // Each is a core of the one cluster.
        let cores = &child(map[0], "cluster0").unwrap().children;
        let handles =
            |nodes: &[&Node], property: &str| nodes.iter().map(|node| cells(node, property)).collect::<Vec<_>>();
        assert_eq!(handles(&cores.iter().collect::<Vec<_>>(), "cpu"), handles(&cpus, "phandle"));
    }

    #[test]
    fn interrupts_are_those_that_are_raised() {
        let root = tree(&MACHINE);
        let interrupts = |name: &str| cells(child(&root, name).unwrap(), "interrupts");
        // INTIDs 33 and 34, counted from 32; 23, counted from 16.
        assert_eq!(interrupts("serial@9000000"), [0, 1, 1]);
        assert_eq!(interrupts("rtc@9010000"), [0, 2, 4]);
        assert_eq!(interrupts("virtio_mmio@a000000"), [0, 16, 1]);
        assert_eq!(interrupts("virtio_mmio@a00f000"), [0, 31, 1]);
        assert_eq!(interrupts("pmu"), [1, 7, 4]);
        assert_eq!(interrupts("timer"), [1, 13, 8, 1, 14, 8, 1, 11, 8, 1, 10, 8]);
    }

    #[test]
    fn what_the_host_does_not_offer_is_not_in_the_tree() {
        let gic = |root: &Node| child(root, "interrupt-controller@8000000").unwrap().children.len();
        let full = tree(&MACHINE);
        assert_eq!((gic(&full), child(&full, "pmu").is_some()), (1, true));
        let bare = tree(&Machine { has_its: false, pmu_interrupt: None, ..MACHINE });
        assert_eq!((gic(&bare), child(&bare, "pmu").is_some()), (0, false));
    }

    #[test]
    fn no_two_devices_are_in_one_place() {
        // As many redistributors as fit between the translation service and the serial port.
        let mpidrs: Vec<u64> = (0..123).collect();
        let mut ranges = ranges(&tree(&Machine { mpidrs: &mpidrs, ..MACHINE }));
        ranges.sort_unstable();
        assert_eq!(ranges.len(), 6 + DEVICES_MAX);
        for pair in ranges.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:#x?}");
        }
    }

    #[test]
    fn no_two_guests_get_the_same_seed() {
        let machine = Machine { mpidrs: &[0], has_its: false, pmu_interrupt: None };
        let tree = Tree { ram: 64 << 20, machine: &machine, append: "", initrd: None, slots: 0 };
        assert_ne!(build(&tree).unwrap(), build(&tree).unwrap());
    }
}
