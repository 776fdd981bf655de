//! Trees under a good checksum that say what cannot be true: refused, with the path of the node that says it.

use kho_abi::document::device::SERIAL_BACKLOG_MAX;
use kho_abi::document::index::IndexV2;
use kho_abi::document::machine::{MachineV3, RAM_RANGES_MAX, VCPUS_MAX};
use kho_abi::document::memory::RamRangeV1;
use kho_abi::document::node::Node;
use kho_abi::document::record::{from_node, to_node};
use kho_abi::document::vcpu::VcpuState;
use kho_abi::document::{DecodeError, DocumentError, Problem, fdt, header};
use vm_fdt::{FdtReserveEntry, FdtWriter};

use crate::sample;

/// What may be absent without harm.
const OPTIONAL: [&str; 4] = ["sregs2", "tsc-offset", "pmu-interrupt", "stolen-time"];
/// Text and bytes that are as long as an integer is.
const NO_INTEGERS: [&str; 2] = ["architecture", "mp-state"];

fn root() -> Node {
    to_node("", &sample::machine())
}

/// A machine of each architecture.
fn roots() -> [Node; 2] {
    [root(), to_node("", &sample::aarch64_machine())]
}

/// What a reader says of `root` when it comes as a sealed document; the same as when it comes as a tree.
fn error(root: &Node) -> DecodeError {
    let sealed = header::seal(&fdt::write(root).unwrap()).unwrap();
    let Err(DocumentError::Body(error)) = MachineV3::from_bytes(&sealed) else { panic!("accepted: {root:?}") };
    assert_eq!(from_node::<MachineV3>(root).unwrap_err(), error);
    error
}

fn at<'a>(root: &'a mut Node, path: &str) -> &'a mut Node {
    path.split('/')
        .filter(|name| !name.is_empty())
        .fold(root, |node, name| node.children.iter_mut().find(|child| child.name == name).unwrap())
}

/// Asserts that a machine with one change is refused at `path` with `problem`.
fn refused(change: impl FnOnce(&mut Node), path: &str, problem: &str) {
    refused_in(root(), change, path, problem);
}

fn refused_in(mut root: Node, change: impl FnOnce(&mut Node), path: &str, problem: &str) {
    change(&mut root);
    assert_eq!(error(&root).to_string(), format!("{path}: {problem}"));
}

fn set(path: &str, name: &str, value: impl Into<Vec<u8>>) -> impl FnOnce(&mut Node) {
    move |root| {
        at(root, path).properties.insert(name.into(), value.into());
    }
}

/// The paths of all nodes.
fn paths(node: &Node, path: &str, found: &mut Vec<String>) {
    found.push(if path.is_empty() { "/".into() } else { path.into() });
    for child in &node.children {
        paths(child, &format!("{path}/{}", child.name), found);
    }
}

/// Every node of a machine of each architecture, with its path.
fn all_paths() -> Vec<(Node, String)> {
    let mut all = vec![];
    for (root, count) in roots().into_iter().zip([17, 21]) {
        let mut found = vec![];
        paths(&root, "", &mut found);
        assert_eq!(found.len(), count);
        all.extend(found.into_iter().map(|path| (root.clone(), path)));
    }
    all
}

#[test]
fn an_unknown_property_is_refused_in_every_node() {
    for (root, path) in all_paths() {
        refused_in(root, set(&path, "surplus", *b"x"), &path, r#"property "surplus" is unknown"#);
    }
}

#[test]
fn an_unknown_node_is_refused_in_every_node() {
    for (root, path) in all_paths() {
        let change = |root: &mut Node| at(root, &path).children.push(Node::new("surplus@1"));
        refused_in(root, change, &path, r#"node "surplus@1" is unknown"#);
    }
}

#[test]
fn a_missing_property_is_refused_in_every_node() {
    for (mut root, path) in all_paths() {
        let names: Vec<_> = at(&mut root, &path).properties.keys().cloned().collect();
        for name in names.iter().filter(|name| !OPTIONAL.contains(&name.as_str())) {
            let change = |root: &mut Node| drop(at(root, &path).properties.remove(name));
            refused_in(root.clone(), change, &path, &format!("property {name:?} is missing"));
        }
    }
}

#[test]
fn a_missing_node_is_refused_in_every_node() {
    for (root, path) in all_paths() {
        for index in 0..at(&mut root.clone(), &path).children.len() {
            let mut root = root.clone();
            let removed = at(&mut root, &path).children.remove(index);
            match removed.name.as_str() {
                // Whether there is one is for the host to judge.
                "its" => assert!(from_node::<MachineV3>(&root).is_ok()),
                // The group is there, but one of it is missing: who knows how many there must be says so.
                name if name.starts_with("redistributor@") => {
                    assert_eq!(error(&root).to_string(), "/: platform is not that of 2 vCPUs");
                }
                // So for queues: what the device is says how many it has.
                name if name.starts_with("queue@") => assert!(from_node::<MachineV3>(&root).is_ok()),
                name if name.starts_with("virtio@") => assert!(error(&root).path.starts_with("/devices")),
                name => assert_eq!(error(&root).path, path, "without {name}"),
            }
        }
    }
}

#[test]
fn an_integer_of_another_size_is_refused_in_every_node() {
    let mut integers = 0;
    for (mut root, path) in all_paths() {
        let properties = at(&mut root, &path).properties.clone();
        for (name, value) in &properties {
            let is_integer =
                !value.is_empty() && [1, 4, 8].contains(&value.len()) && !NO_INTEGERS.contains(&name.as_str());
            if !is_integer {
                continue;
            }
            integers += 1;
            for size in [0, value.len() - 1, value.len() + 1, value.len() * 2] {
                let problem = format!("property {name:?} has {size} bytes instead of {}", value.len());
                refused_in(root.clone(), set(&path, name, vec![0; size]), &path, &problem);
            }
        }
    }
    assert_eq!(integers, 28 + 39 + 2 * 32);
}

#[test]
fn another_version_is_refused_in_every_node() {
    for (mut changed, path) in all_paths() {
        let node = at(&mut changed, &path);
        let Some(compatible) = node.properties.get_mut("compatible") else { continue };
        let expected = String::from_utf8(compatible[..compatible.len() - 1].to_vec()).unwrap();
        let found = format!("{}-v9", expected.rsplit_once("-v").unwrap().0);
        *compatible = format!("{found}\0").into_bytes();
        // Where a record of either architecture can stand, both are named.
        let error = error(&changed);
        let Problem::Incompatible { expected: named, found: stated } = error.problem else { panic!("{error}") };
        assert!(named.split(" or ").any(|name| name == expected), "{named}");
        assert_eq!((error.path, stated), (path, found));
    }
}

#[test]
fn registers_that_contradict_themselves_are_refused() {
    let [_, root] = roots();
    let vcpu = "/vcpus/vcpu@1";
    let refused =
        |value: Vec<u8>, problem: &str| refused_in(root.clone(), set(vcpu, "registers", value), vcpu, problem);
    let number = |number: u64| number.to_be_bytes().to_vec();
    refused(vec![0; 7], "registers ends within a number");
    refused(number(0x6030_0000_0010_0000), "registers ends within the value of 0x6030000000100000");
    refused([number(3 << 52), vec![0; 7]].concat(), "registers ends within the value of 0x30000000000000");
    refused(number(9 << 52), "registers has 0x90000000000000, larger than any register");
    let one = [number(2 << 52 | 5), vec![0; 4]].concat();
    refused([one.clone(), one].concat(), "registers has 0x20000000000005 twice");
    let distributor = set("/platform/gic", "distributor", [[0; 8], [0; 8]].concat());
    refused_in(root.clone(), distributor, "/platform/gic", "distributor has 0x0 twice");
    let its = set("/platform/gic/its", "registers", [[1; 12], [1; 12]].concat());
    refused_in(root.clone(), its, "/platform/gic/its", "registers has 0x1010101 twice");
    let redistributor = "/platform/gic/redistributor@80000001";
    let other = set(redistributor, "mpidr", 7_u64.to_be_bytes());
    refused_in(root.clone(), other, redistributor, "mpidr is not the one in the node's name");
}

#[test]
fn a_machine_of_two_architectures_is_refused() {
    let [x86_64, aarch64] = roots();
    let exchanged = |path: &'static str| {
        let mut other = aarch64.clone();
        let node = at(&mut other, path).clone();
        move |root: &mut Node| *at(root, path) = node
    };
    refused_in(x86_64.clone(), exchanged("/platform"), "/", "platform is of aarch64, not x86_64");
    refused_in(x86_64.clone(), exchanged("/vcpus"), "/vcpus", "vCPU 0 is of aarch64, not x86_64");
}

#[test]
fn text_must_be_ended_by_its_only_nul() {
    for value in [&b""[..], b"golden", b"gol\0den\0", b"golden\0\0", b"gold\xffen\0"] {
        refused(set("/", "name", value), "/", r#"property "name" is no text ended by a NUL"#);
    }
}

#[test]
fn a_list_with_half_an_entry_is_refused() {
    refused(set("/vcpus/vcpu@0", "msrs", [0; 25]), "/vcpus/vcpu@0", r#"property "msrs" has 25 bytes instead of 12"#);
}

#[test]
fn a_name_that_no_vm_has_is_refused() {
    refused(set("/", "name", *b"../escape\0"), "/", "name cannot be a VM's");
}

#[test]
fn a_foreign_architecture_is_refused() {
    refused(set("/", "architecture", *b"riscv64\0"), "/", "platform is of x86_64, not riscv64");
}

#[test]
fn a_node_whose_name_belies_its_content_is_refused() {
    let range = "/memory/range@0";
    refused(set(range, "gpa", 0x1000_u64.to_be_bytes()), range, "gpa is not the one in the node's name");
    let vcpu = "/vcpus/vcpu@1";
    refused(set(vcpu, "id", 0_u32.to_be_bytes()), vcpu, "id is not the one in the node's name");
    let twice = |root: &mut Node| {
        let mut again = at(root, vcpu).clone();
        again.name = "vcpu@01".into();
        *at(root, "/vcpus/vcpu@0") = again;
    };
    refused(twice, "/vcpus/vcpu@01", "id is not the one in the node's name");
}

#[test]
fn more_or_fewer_vcpus_than_asked_for_are_refused() {
    refused(set("/config", "cpus", 3_u32.to_be_bytes()), "/vcpus", "vCPUs are 2, 3 were asked for");
    refused(|root| at(root, "/vcpus").children.clear(), "/vcpus", "vCPUs are 0, 2 were asked for");
}

#[test]
fn more_fewer_or_otherwise_numbered_devices_than_asked_for_are_refused() {
    refused(set("/config", "devices", *b"rng\0"), "/devices", "virtio devices are 2, 1 were asked for");
    refused(set("/config", "devices", *b""), "/devices", "virtio devices are 2, 0 were asked for");
    let renamed = |path: &'static str, name: &'static str| move |root: &mut Node| at(root, path).name = name.into();
    let number = |number: u32| format!("number is not {number}, which comes next");
    refused(renamed("/devices/virtio@1", "virtio@2"), "/devices/virtio@2", &number(1));
    refused(renamed("/devices/virtio@0/queue@0", "queue@00"), "/devices/virtio@0/queue@00", &number(0));
}

#[test]
fn device_words_and_queue_numbers_that_cannot_be_are_refused() {
    refused(set("/config", "devices", *b"rng"), "/config", r#"property "devices" is no text ended by a NUL"#);
    let queue = "/devices/virtio@0/queue@0";
    refused(set(queue, "ready", [2]), queue, "ready is 2, neither 0 nor 1");
    let large = 0x1_0000_u32.to_be_bytes();
    refused(set(queue, "next-used", large), queue, "next-used is 65536, more than 16 bits can hold");
}

/// A machine with this RAM, which asks for as much as there is.
fn with_ram(ram: &[(u64, u64, u64, u64)]) -> impl FnOnce(&mut Node) + use<> {
    let mut machine = sample::machine();
    machine.ram = ram.iter().map(|&(gpa, size, token, offset)| RamRangeV1 { gpa, size, token, offset }).collect();
    machine.config.memory = machine.ram.iter().fold(0, |sum, range| sum.wrapping_add(range.size));
    move |root| *root = to_node("", &machine)
}

#[test]
fn ram_that_is_no_whole_pages_is_refused() {
    let ram = |gpa, size, offset| with_ram(&[(gpa, size, 0x100, offset)]);
    refused(ram(0x800, 0x1000, 0), "/memory/range@800", "gpa is 0x800, no multiple of a page");
    refused(ram(0, 0x1001, 0), "/memory/range@0", "size is 0x1001, no multiple of a page");
    refused(ram(0, 0x1000, 1), "/memory/range@0", "offset is 0x1, no multiple of a page");
    refused(ram(0, 0, 0), "/memory/range@0", "size is zero");
}

#[test]
fn ram_that_overflows_is_refused() {
    let last = !0xfff;
    let overflow = "size reaches beyond the last address";
    refused(with_ram(&[(last, 0x1000, 0x100, 0)]), "/memory/range@fffffffffffff000", overflow);
    refused(with_ram(&[(0, 0x1000, 0x100, last)]), "/memory/range@0", overflow);
    let sum = "RAM does not add up to the 0x0 bytes asked for";
    refused(with_ram(&[]), "/memory", sum);
    let wrong = set("/config", "memory", 0x1000_u64.to_be_bytes());
    refused(wrong, "/memory", "RAM does not add up to the 0x1000 bytes asked for");
}

#[test]
fn ram_that_overlaps_is_refused() {
    let guest = with_ram(&[(0x4000, 0x2000, 0x101, 0), (0, 0x5000, 0x100, 0)]);
    refused(guest, "/memory", "RAM at 0x0 overlaps that at 0x4000");
    let file = with_ram(&[(0, 0x2000, 0x100, 0), (0x8000, 0x2000, 0x100, 0x1000)]);
    refused(file, "/memory", "RAM uses file 0x100 twice at 0x1000");
}

#[test]
fn ram_in_a_file_that_is_none_is_refused() {
    let problem = "token is 1, which is never guest memory";
    refused(with_ram(&[(0, 0x1000, 1, 0)]), "/memory/range@0", problem);
}

#[test]
fn too_many_ranges_and_vcpus_are_refused() {
    let ram: Vec<_> = (0..=RAM_RANGES_MAX as u64).map(|n| (n << 13, 0x1000, 0x100, n << 12)).collect();
    refused(with_ram(&ram), "/memory", "more than 64 RAM ranges");
    let mut machine = sample::small_machine();
    let VcpuState::X86_64(vcpu) = machine.vcpus[0].clone() else { panic!("the sample is of x86_64") };
    let numbered = |id| {
        let mut vcpu = vcpu.clone();
        vcpu.id = id;
        VcpuState::X86_64(vcpu)
    };
    machine.vcpus = (0..=VCPUS_MAX as u32).map(numbered).collect();
    machine.config.cpus = machine.vcpus.len() as u32;
    refused(|root| *root = to_node("", &machine), "/vcpus", "more than 1024 vCPUs");
}

#[test]
fn a_node_that_occurs_twice_is_refused_before_and_after_it_is_written() {
    for (mut root, path) in all_paths() {
        let node = at(&mut root, &path);
        let Some(child) = node.children.first().cloned() else { continue };
        let problem = Problem::DuplicateNode { name: child.name.clone() };
        node.children.push(child);
        let expected = DecodeError { path, problem };
        assert_eq!(fdt::write(&root), Err(expected.clone().into()));
        assert_eq!(from_node::<MachineV3>(&root), Err(expected));
    }
}

/// A tree written by hand, with what [`fdt::write`] would not write.
fn by_hand(write: impl FnOnce(&mut FdtWriter) -> Result<(), vm_fdt::Error>) -> String {
    let mut writer = FdtWriter::new().unwrap();
    let root = writer.begin_node("").unwrap();
    write(&mut writer).unwrap();
    writer.end_node(root).unwrap();
    fdt::read(&writer.finish().unwrap()).unwrap_err().to_string()
}

#[test]
fn duplicates_in_the_bytes_are_refused() {
    let properties = by_hand(|writer| {
        let child = writer.begin_node("child")?;
        writer.property_u32("same", 1)?;
        writer.property_u32("same", 2)?;
        writer.end_node(child)
    });
    assert_eq!(properties, r#"/child: property "same" occurs twice"#);
    let nodes = by_hand(|writer| {
        for _ in 0..2 {
            let child = writer.begin_node("same@1")?;
            writer.end_node(child)?;
        }
        Ok(())
    });
    assert_eq!(nodes, r#"/: node "same@1" occurs twice"#);
}

#[test]
fn names_that_are_never_written_are_refused() {
    assert_eq!(
        by_hand(|writer| writer.property_u32("#address-cells", 1)),
        r##"/: "#address-cells" cannot be a name here"##
    );
    let long = format!("vm@{}", "x".repeat(64));
    let child = by_hand(|writer| {
        let child = writer.begin_node(&long)?;
        writer.end_node(child)
    });
    assert_eq!(child, format!("/: {long:?} cannot be a name here"));
}

#[test]
fn depth_and_number_of_nodes_are_limited_both_ways() {
    let nested = |depth: usize| {
        let leaf = Node::new("leaf");
        let chain = (2..depth).fold(leaf, |child, _| Node::new("inner").with_child(child));
        Node::new("").with_child(chain)
    };
    assert!(fdt::read(&fdt::write(&nested(fdt::MAX_DEPTH)).unwrap()).is_ok());
    assert!(fdt::write(&nested(fdt::MAX_DEPTH + 1)).is_err());
    let deep = by_hand(|writer| {
        let open = (0..fdt::MAX_DEPTH).map(|_| writer.begin_node("n")).collect::<Result<Vec<_>, _>>()?;
        open.into_iter().rev().try_for_each(|node| writer.end_node(node))
    });
    assert_eq!(deep, "/: nodes are nested more than 16 deep");

    let wide = |count: usize| Node::new("").with_children((1..count).map(|n| Node::new(format!("n{n}"))));
    assert!(fdt::read(&fdt::write(&wide(fdt::MAX_NODES)).unwrap()).is_ok());
    assert!(fdt::write(&wide(fdt::MAX_NODES + 1)).is_err());
    let many = by_hand(|writer| {
        (0..fdt::MAX_NODES).try_for_each(|n| {
            let node = writer.begin_node(&format!("n{n}"))?;
            writer.end_node(node)
        })
    });
    assert_eq!(many, "/: more than 4096 nodes");
}

#[test]
fn a_tree_of_another_form_is_refused() {
    let reserved = FdtWriter::new_with_mem_reserv(&[FdtReserveEntry::new(0x1000, 0x1000).unwrap()]);
    let mut writer = reserved.unwrap();
    let root = writer.begin_node("").unwrap();
    writer.end_node(root).unwrap();
    let error = fdt::read(&writer.finish().unwrap()).unwrap_err().to_string();
    assert_eq!(error, "/: not a well-formed tree: the structure block is not where it must be (at byte 8)");

    let bytes = fdt::write(&Node::new("").with_u8("p", 1)).unwrap();
    let structure = 56;
    assert_eq!(bytes[structure..structure + 4], [0, 0, 0, 1]);
    // Root, empty name, property, length, name: then the value and its padding, end of node, end.
    for (offset, reason) in [
        (0, "the magic is wrong"),
        (4, "the total size is not that of the bytes"),
        (12, "the strings block does not follow the structure block"),
        (16, "the reservation block does not follow the header"),
        (20, "the version is not 17"),
        (24, "the last compatible version is not 16"),
        (28, "the boot CPU is not 0"),
        (32, "the strings block does not end the tree"),
        (36, "the strings block does not follow the structure block"),
        (40, "there are memory reservations"),
        (structure + 20 + 3, "the padding is not zero"),
        (structure + 16, "a property's name is outside the strings block"),
        (structure + 12, "the structure block is cut short"),
        (structure + 24, "this is no token that can stand here"),
        (structure + 28, "the root is not followed by the end of the structure block"),
    ] {
        let mut wrong = bytes.clone();
        wrong[offset] ^= 0x40;
        let error = fdt::read(&wrong).unwrap_err().to_string();
        assert!(error.contains(reason), "byte {offset}: {error}");
    }
}

#[test]
fn an_index_that_leads_astray_is_refused() {
    let refused = |change: &dyn Fn(&mut IndexV2), expected: &str| {
        let mut index = sample::index();
        change(&mut index);
        assert_eq!(index.to_bytes().unwrap_err().to_string(), expected);
        let sealed = header::seal_as(header::Kind::Index, &fdt::write(&to_node("", &index)).unwrap()).unwrap();
        assert_eq!(IndexV2::from_bytes(&sealed).unwrap_err().to_string(), expected);
    };
    let vm = "/vms/vm@golden-1";
    let session = "session is not the one of a VM of this name";
    refused(&|index| index.vms[0].session = "kho-vmm.other".into(), &format!("{vm}: {session}"));
    refused(&|index| index.vms[0].session = "kho-vmm".into(), &format!("{vm}: {session}"));
    refused(&|index| index.vms[0].document_bytes = 0, &format!("{vm}: document-bytes is 0, no document's"));
    refused(
        &|index| index.vms[0].document_bytes = 4 << 20 | 1,
        &format!("{vm}: document-bytes is 4194305, no document's"),
    );
    refused(&|index| index.vms[0].ram.clear(), &format!("{vm}: ram has 0 files"));
    refused(&|index| index.vms[0].ram = vec![(0x100, 1); 65], &format!("{vm}: ram has 65 files"));
    refused(&|index| index.vms[0].ram[0].1 = 0, &format!("{vm}: ram has file 0x100 of size zero"));
    let token = |token: u64| format!("{vm}: ram has token {token:#x} twice, or where no memory can be");
    refused(&|index| index.vms[0].ram = vec![(0x100, 1); 2], &token(0x100));
    refused(&|index| index.vms[0].ram[0].0 = 1, &token(1));
    refused(&|index| index.vms[0].state_token = 0x100, &token(0x100));
}

#[test]
fn an_index_of_the_previous_version_with_a_clock_is_refused() {
    let mut root = to_node("", &sample::index());
    root = root.with_str("compatible", "kho-vmm,index-v1");
    let sealed = header::seal_as(header::Kind::Index, &fdt::write(&root).unwrap()).unwrap();
    assert_eq!(IndexV2::from_bytes(&sealed).unwrap_err().to_string(), r#"/: node "clock" is unknown"#);
}

#[test]
fn a_serial_port_with_more_output_than_is_kept_is_refused() {
    let mut machine = sample::machine_with_backlog();
    machine.serial.backlog = vec![b'x'; SERIAL_BACKLOG_MAX];
    assert_eq!(MachineV3::from_bytes(&machine.to_bytes().unwrap()).unwrap(), machine);
    machine.serial.backlog.push(b'y');
    let expected = "/devices/serial@3f8: backlog is 65537 bytes, more than are kept";
    assert_eq!(machine.to_bytes().unwrap_err().to_string(), expected);
}

#[test]
fn two_vms_of_one_name_are_refused() {
    let mut index = sample::index();
    index.vms[1] = index.vms[0].clone();
    assert_eq!(index.to_bytes().unwrap_err().to_string(), r#"/vms: node "vm@golden-1" occurs twice"#);
}
