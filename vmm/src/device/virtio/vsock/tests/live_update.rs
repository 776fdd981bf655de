//! What becomes of connections in a pause, and in a live update.

use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use kho_abi::document::virtio::{RngV1, VirtioState, VsockV1};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::super::packet::Operation;
use super::super::work::News;
use super::super::{QUEUE_SIZES, Vsock};
use super::bench::{Bench, HOST_PORT};
use crate::config::vsock::VsockConfig;
use crate::device::virtio::mock::{RING_SIZE, Ring, Told, notifier, writable};
use crate::device::virtio::{Activation, VirtioDevice, VirtioError};

const SOON: Duration = Duration::from_secs(10);

#[test]
fn connections_go_on_after_a_pause() {
    let mut bench = Bench::new();
    let mut program = bench.open(5000);
    let mut bench = {
        program.write_all(b"before, ").unwrap();
        bench.offers(1, 3776);
        bench.pause()
    };
    program.write_all(b"after").unwrap();
    bench.drive();
    assert_eq!(bench.hears_data(), b"before, after");
    bench.sends(HOST_PORT, 5000, b"here, too");
    bench.expect(&mut program, b"here, too");
    let _other = bench.asks(5000, b"");
    bench.hears_one(Operation::Request);
}

#[test]
fn restored_guest_hears_that_its_connections_are_gone_before_anything_else() {
    let mut bench = Bench::with_news(News::GONE);
    bench.offers(8, 3776);
    // It had these in its queue when its host was replaced.
    bench.sends(HOST_PORT - 1, 5000, b"of an old connection");
    let _early = bench.asks(5000, b"");
    assert_eq!((bench.hears(), bench.rings[1].used().len()), (vec![], 0));
    bench.offers_events(8);
    assert_eq!(bench.rings[2].used().iter().map(|(_, written)| *written).collect::<Vec<_>>(), [4]);
    assert!(bench.heard.try_iter().any(|told| told == Told::Queue(2)));
    // Not before it has heard it, which it shows by offering the buffer again.
    bench.offers(1, 3776);
    assert_eq!(bench.hears(), []);
    bench.offers_events(1);
    let heard = bench.hears();
    let operations: Vec<u16> = heard.iter().map(|(header, _)| header.operation.get()).collect();
    assert_eq!(operations, [Operation::Reset as u16, Operation::Request as u16]);
    assert_eq!(bench.rings[2].used(), []);
}

#[test]
fn driver_that_never_shows_that_it_has_heard_is_not_waited_for_for_ever() {
    let mut bench = Bench::with_news(News::GONE);
    bench.offers(8, 3776);
    bench.offers_events(1);
    let _program = bench.asks(5000, b"");
    assert_eq!(bench.hears(), []);
    bench.work.expire();
    bench.await_event();
    bench.hears_one(Operation::Request);
}

#[test]
fn buffer_that_cannot_hold_the_news_is_given_back_and_the_next_one_is_used() {
    let mut bench = Bench::with_news(News::GONE);
    bench.rings[2].offer(&[writable(64, 3)]);
    bench.rings[2].offer(&[writable(u64::MAX, 4)]);
    bench.offers_events(1);
    assert_eq!(bench.rings[2].used().iter().map(|(_, written)| *written).collect::<Vec<_>>(), [0, 0, 4]);
}

struct Device {
    vsock: Vsock,
    memory: GuestMemoryMmap,
    rings: [Ring; 3],
    heard: Receiver<Told>,
}

impl Device {
    fn start(config: &VsockConfig, state: Option<&VirtioState>) -> Self {
        let mut vsock = Vsock::new(config).unwrap();
        if let Some(state) = state {
            vsock.restore(state).unwrap();
        }
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let mut rings =
            [0, 1, 2].map(|number| Ring::new(&memory, (number as u64 + 1) * RING_SIZE, QUEUE_SIZES[number]));
        for number in 0..8 {
            rings[0].offer(&[writable((1 << 20) + number * 4096, 4096)]);
        }
        rings[2].offer(&[writable(64, 4)]);
        let (notifier, heard) = notifier();
        let queues = rings.iter().map(Ring::active).collect();
        vsock.start(Activation { memory: memory.clone(), features: 0, queues, notifier }).unwrap();
        Self { vsock, memory, rings, heard }
    }

    /// The operation and the host's port of the first packet.
    fn first_packet(&self) -> (u16, u32) {
        let port = self.memory.read_obj(GuestAddress((1 << 20) + 16)).unwrap();
        (self.memory.read_obj(GuestAddress((1 << 20) + 30)).unwrap(), port)
    }
}

#[test]
fn thread_serves_programs_and_its_successor_goes_on_with_the_ports() {
    let folder = tempfile::tempdir().unwrap();
    let config = VsockConfig { cid: 7, socket: folder.path().join("vsock") };
    let mut device = Device::start(&config, None);
    let mut cid = [0; 8];
    device.vsock.read_config(0, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), 7);
    let mut program = std::os::unix::net::UnixStream::connect(&config.socket).unwrap();
    program.write_all(b"CONNECT 1\n").unwrap();
    assert_eq!(device.heard.recv_timeout(SOON), Ok(Told::Queue(0)));
    assert_eq!(device.first_packet(), (Operation::Request as u16, HOST_PORT));
    assert_eq!(device.vsock.stop().len(), 3);
    let state = device.vsock.save();
    assert_eq!(state, VirtioState::Vsock(VsockV1 { cid: 7, next_port: HOST_PORT + 1 }));
    // As the kernel would.
    drop(device);
    assert_eq!(program.read(&mut [0; 8]).unwrap(), 0);
    // What is left is a file that nobody listens at.
    let mode = std::fs::metadata(&config.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let mut device = Device::start(&config, Some(&state));
    assert_eq!(device.heard.recv_timeout(SOON), Ok(Told::Queue(2)));
    assert_eq!(device.rings[2].used().len(), 1);
    // A reset by the driver, after which there is nothing to hear.
    assert_eq!(device.vsock.stop().len(), 3);
    device.vsock.reset();
    drop(device.rings);
    assert_eq!(device.vsock.save(), state);
}

#[test]
fn state_of_another_guest_or_device_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let config = VsockConfig { cid: 7, socket: folder.path().join("vsock") };
    let mut vsock = Vsock::new(&config).unwrap();
    for state in [VirtioState::Vsock(VsockV1 { cid: 8, next_port: HOST_PORT }), VirtioState::Rng(RngV1)] {
        assert!(matches!(vsock.restore(&state), Err(VirtioError::Unfit { .. })));
    }
}

#[test]
fn socket_is_taken_over_from_the_dead_only_and_its_folder_must_be_there() {
    let folder = tempfile::tempdir().unwrap();
    let config = VsockConfig { cid: 3, socket: folder.path().join("deep/vsock") };
    let refused = |part: &str| match Vsock::new(&config).map(drop) {
        Err(VirtioError::Unfit { reason, .. }) => assert!(reason.contains(part), "{reason}"),
        other => panic!("{other:?}"),
    };
    refused("mkdir");
    std::fs::create_dir(folder.path().join("deep")).unwrap();
    std::fs::write(&config.socket, "not yours").unwrap();
    refused("no socket");
    assert_eq!(std::fs::read(&config.socket).unwrap(), b"not yours");
    std::fs::remove_file(&config.socket).unwrap();
    let other = UnixListener::bind(&config.socket).unwrap();
    refused("another process listens");
    drop(other);
    let vsock = Vsock::new(&config).unwrap();
    refused("another process listens");
    drop(vsock);
    Vsock::new(&config).unwrap();
    assert!(std::fs::metadata(&config.socket).unwrap().file_type().is_socket());
}
