//! The contracts of a live update: what kho-vmm leaves in memory for the next kernel's user space, and how both ask the
//! kernel to carry it.
//!
//! A VM is its RAM, which is preserved as it is, and a **document**: one value that says where that RAM belongs and
//! holds every vCPU and device. The document is written by one program, under one kernel, and read by another, under
//! another, possibly years younger or older. So nothing here depends on the machine it runs on: there is no KVM, no
//! operating system, no `unsafe` and no condition on the architecture, and any program reads any machine's document.
//!
//! | module | holds |
//! |---|---|
//! | [`document`] | the document and the index: records, tree, seal |
//! | [`kernel`] | what the kernel itself hands over: its tree, its map of preserved memory, its sessions and files |
//! | [`names`], [`tokens`] | what both sides must know beforehand: names of sessions and nodes, numbers of files |
//! | [`uapi`] | `/dev/liveupdate`: request numbers and structs |
//!
//! # Format
//! A document is a [header](document::header) of 32 bytes, little-endian, and a [tree](document::fdt) behind it:
//!
//! ```text
//! 0         8        12         16       24         32
//! "KHOVMDOC" version  reserved   length   CRC-64/XZ  flattened device tree ... zeros up to the file's end
//! ```
//!
//! The tree is a flattened device tree as any, version 17, integers big-endian, text ended by a NUL; `dtc -I dtb` reads
//! it once the header is cut off. Every record says in `compatible` what it is and in which version:
//!
//! ```text
//! / {                                  compatible = "kho-vmm,vm-v3"   name, architecture, generation, paused
//!     config { }                       what the operator asked for
//!     memory { range@0 { } ... }       gpa, size, token and offset of each RAM range
//!     platform { }                     interrupt controllers, timers, clock
//!     vcpus { vcpu@0 { } ... }         raw KVM structs under their names, MSRs as pairs
//!     devices { serial@3f8 { }         its registers, or those in port { } with output that waits; each virtio device:
//!               virtio@0 { queue@0 { } ... device { } } ... }
//! };
//! / {                                  compatible = "kho-vmm,index-v2"   generation, kernel
//!     timeline { }                     the host's marks
//!     clock { }                        its wall clock, with the counter at the same moment
//!     vms { vm@NAME { marks { } } }    session, tokens and sizes of each VM
//! };
//! ```
//!
//! # Rules
//! - A document is checked in this order: size, magic, version, length, checksum, what is behind it, form of the tree,
//!   content. Nothing is looked at before what precedes it is known to be good.
//! - Reading is strict: what is missing, unknown, twice there, or of another size is an error that names the node.
//! - A layout never changes under the same `compatible`. A new one gets a new name and a new golden file.
//! - A writer refuses what a reader would refuse, while the guest can still run on.
//! - Nothing is trusted. Whatever can be known to be wrong without a host is refused here.
//!
//! # Example
//! A record, written, sealed, carried, and read:
//!
//! ```
//! use kho_abi::document::node::Node;
//! use kho_abi::document::record::{Reader, Record, from_node, to_node};
//! use kho_abi::document::{DecodeError, fdt, header};
//!
//! #[derive(Debug, PartialEq)]
//! struct RtcV1 {
//!     offset_ns: u64,
//!     registers: Vec<u8>,
//! }
//!
//! impl Record for RtcV1 {
//!     const COMPATIBLE: &'static str = "kho-vmm,rtc-v1";
//!
//!     fn encode(&self, node: Node) -> Node {
//!         let Self { offset_ns, registers } = self;
//!         node.with_u64("offset-ns", *offset_ns).with_bytes("registers", registers.as_slice())
//!     }
//!
//!     fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
//!         Ok(Self { offset_ns: reader.u64("offset-ns")?, registers: reader.bytes("registers")? })
//!     }
//! }
//!
//! let rtc = RtcV1 { offset_ns: 1_000_000, registers: vec![0x26, 0x02, 0x80] };
//! let tree = Node::new("").with_child(to_node("rtc@70", &rtc));
//! let mut file = header::seal(&fdt::write(&tree)?)?;
//! file.resize(4096, 0); // the file that carries it is larger
//!
//! let mut tree = fdt::read(header::open(&file)?)?;
//! assert_eq!(from_node::<RtcV1>(&tree.children[0])?, rtc);
//!
//! // A newer writer's state would be lost: refused, not ignored.
//! tree.children[0].properties.insert("alarm".into(), vec![1]);
//! let error = from_node::<RtcV1>(&tree.children[0]).unwrap_err();
//! assert_eq!(error.to_string(), r#"/rtc@70: property "alarm" is unknown"#);
//!
//! // So is a single bit that has changed on the way.
//! file[100] ^= 1;
//! assert!(header::open(&file).is_err());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod document;
pub mod kernel;
pub mod names;
pub mod tokens;
pub mod uapi;
