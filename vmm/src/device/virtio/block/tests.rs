//! Requests through a queue, as a driver makes them, and as no driver should.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Duration;

use proptest::prelude::*;
use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::request::ZEROES_SECTORS_MAX;
use super::*;
use crate::device::virtio::Notifier;
use crate::device::virtio::worker::Work;

const SIZE: u64 = 1 << 20;
const MEMORY: usize = 4 << 20;
/// Behind the queue.
const HEADERS: u64 = 0x10_0000;
const STATUSES: u64 = 0x18_0000;
const DATA: u64 = 0x20_0000;
const UNANSWERED: u8 = 0xee;

struct Told(Sender<u16>);

impl Notifier for Told {
    fn queue_used(&self, queue: u16) {
        let _ = self.0.send(queue);
    }

    fn config_changed(&self) {}
}

/// A driver, its memory, and a disk of 1 MiB that holds sevens.
struct Bench {
    memory: GuestMemoryMmap,
    file: NamedTempFile,
    config: BlockConfig,
    descriptors: Vec<RawDescriptor>,
    requests: u64,
    /// Whether io_uring is used, or one system call after the other.
    ring: bool,
}

impl Bench {
    fn new() -> Self {
        let file = NamedTempFile::new().unwrap();
        file.as_file().write_all_at(&vec![7; SIZE as usize], 0).unwrap();
        let config =
            BlockConfig { path: file.path().to_owned(), readonly: false, id: Some("name".to_owned()), direct: false };
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        Self { memory, file, config, descriptors: Vec::new(), requests: 0, ring: true }
    }

    /// The same disk, and a driver that has done nothing yet.
    fn with_fresh_memory(self) -> Self {
        let Self { file, config, ring, .. } = self;
        Self { file, config, ring, ..Self::new() }
    }

    fn chain(&mut self, parts: &[(u64, u32, u32)]) {
        for (index, (address, length, flags)) in parts.iter().enumerate() {
            let last = index + 1 == parts.len();
            let flags = if last { *flags } else { flags | VRING_DESC_F_NEXT };
            let next = self.descriptors.len() as u16 + 1;
            self.descriptors.push(RawDescriptor::from(Descriptor::new(*address, *length, flags as u16, next)));
        }
    }

    /// Makes a request in the usual three parts available and gives its number.
    fn request(&mut self, kind: u32, sector: u64, data: (u64, u32, u32)) -> u64 {
        let number = self.requests;
        self.requests += 1;
        let (header, status) = (HEADERS + number * 16, STATUSES + number);
        self.memory.write_obj(kind, GuestAddress(header)).unwrap();
        self.memory.write_obj(sector, GuestAddress(header + 8)).unwrap();
        self.memory.write_obj(UNANSWERED, GuestAddress(status)).unwrap();
        let parts = [(header, 16, 0), data, (status, 1, VRING_DESC_F_WRITE)];
        // A driver has no empty buffers.
        let parts: Vec<_> = parts.into_iter().filter(|(_, length, _)| *length > 0).collect();
        self.chain(&parts);
        number
    }

    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u64 {
        let mut at = DATA;
        for (sector, sectors, flags) in ranges {
            self.memory.write_obj(*sector, GuestAddress(at)).unwrap();
            self.memory.write_obj(*sectors, GuestAddress(at + 8)).unwrap();
            self.memory.write_obj(*flags, GuestAddress(at + 12)).unwrap();
            at += 16;
        }
        self.request(kind, 0, (DATA, ranges.len() as u32 * 16, 0))
    }

    fn activation(&self) -> (Activation, Receiver<u16>) {
        let mock = MockSplitQueue::create(&self.memory, GuestAddress(0), QUEUE_SIZE);
        mock.add_desc_chains(&self.descriptors, 0).unwrap();
        let queue: Queue = mock.create_queue().unwrap();
        let (told, heard) = mpsc::channel();
        let kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let queues = vec![ActiveQueue { queue, kick }];
        let features = 1 << VIRTIO_BLK_F_FLUSH;
        (Activation { memory: self.memory.clone(), features, queues, notifier: Arc::new(Told(told)) }, heard)
    }

    fn work(&self, activation: Activation) -> BlockWork {
        let Block { image, id, running: _ } = Block::new(&self.config).unwrap();
        let Activation { memory, features: _, mut queues, notifier } = activation;
        // Where a build machine has no io_uring, the one way is tested twice.
        let ring = if self.ring { Ring::new(image.clone()).ok() } else { None };
        BlockWork { image, id, memory, active: queues.remove(0), notifier, write_through: false, ring }
    }

    /// Has all requests done in this thread.
    fn serve(&self) {
        let (activation, _heard) = self.activation();
        let mut work = self.work(activation);
        // One call does no more than a batch.
        for _ in 0..=self.descriptors.len() / 16 {
            work.begin();
        }
        work.finish();
    }

    fn status(&self, number: u64) -> u32 {
        u32::from(self.memory.read_obj::<u8>(GuestAddress(STATUSES + number)).unwrap())
    }

    fn used(&self, entry: u64) -> (u32, u32) {
        let mock = MockSplitQueue::create(&self.memory, GuestAddress(0), QUEUE_SIZE);
        let at = mock.used_addr().0 + 4 + entry * 8;
        let read = |at| self.memory.read_obj::<u32>(GuestAddress(at)).unwrap();
        (read(at), read(at + 4))
    }

    fn fill(&self, at: u64, length: usize, byte: u8) {
        self.memory.write_slice(&vec![byte; length], GuestAddress(at)).unwrap();
    }

    fn bytes(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(self.file.path()).unwrap()
    }
}

#[test]
fn what_is_written_is_read_back_and_lies_in_the_image() {
    for ring in [false, true] {
        // At an odd address direct I/O has to copy.
        for (direct, odd) in [(false, 0), (false, 1), (true, 0), (true, 1)] {
            let mut bench = Bench::new();
            (bench.ring, bench.config.direct) = (ring, direct);
            bench.fill(DATA + odd, 8192, 0x5a);
            bench.request(VIRTIO_BLK_T_OUT, 3, (DATA + odd, 8192, 0));
            bench.request(VIRTIO_BLK_T_FLUSH, 0, (0, 0, 0));
            // Not every file system of a build machine has direct I/O.
            if direct && Block::new(&bench.config).is_err() {
                continue;
            }
            bench.serve();
            assert_eq!([0, 1].map(|number| bench.status(number)), [VIRTIO_BLK_S_OK; 2]);
            // A write writes the status alone; a read the data, too.
            assert_eq!([0, 1].map(|entry| bench.used(entry).1), [1, 1]);
            let content = bench.content();
            assert!(content[3 * 512..][..8192].iter().all(|byte| *byte == 0x5a));
            assert_eq!(content.iter().filter(|byte| **byte == 0x5a).count(), 8192);
            // Only now, as requests that are in flight together are done in any order.
            let mut bench = bench.with_fresh_memory();
            bench.request(VIRTIO_BLK_T_IN, 2, (DATA + odd, 1024, VRING_DESC_F_WRITE));
            bench.serve();
            assert_eq!((bench.status(0), bench.used(0)), (VIRTIO_BLK_S_OK, (0, 1025)));
            let read = bench.bytes(DATA + odd, 1024);
            assert!(read[..512].iter().all(|byte| *byte == 7) && read[512..].iter().all(|byte| *byte == 0x5a));
        }
    }
}

#[test]
fn header_data_and_status_may_be_cut_anywhere() {
    let mut bench = Bench::new();
    bench.fill(DATA, 1024, 0x5a);
    bench.memory.write_obj(VIRTIO_BLK_T_OUT, GuestAddress(DATA - 16)).unwrap();
    bench.memory.write_obj(4_u64, GuestAddress(DATA - 8)).unwrap();
    bench.chain(&[
        (DATA - 16, 3, 0),
        (DATA - 13, 13 + 100, 0),
        (DATA + 100, 924, 0),
        (DATA + 0x1000, 1, VRING_DESC_F_WRITE),
    ]);
    bench.serve();
    assert_eq!(bench.bytes(DATA + 0x1000, 1), [0]);
    assert!(bench.content()[4 * 512..][..1024].iter().all(|byte| *byte == 0x5a));
}

#[test]
fn image_is_named_to_the_guest() {
    let mut bench = Bench::new();
    bench.request(VIRTIO_BLK_T_GET_ID, 0, (DATA, 20, VRING_DESC_F_WRITE));
    bench.request(VIRTIO_BLK_T_GET_ID, 0, (DATA + 0x100, 2, VRING_DESC_F_WRITE));
    bench.serve();
    assert_eq!(bench.bytes(DATA, 20), *b"name\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(bench.bytes(DATA + 0x100, 3), *b"na\0");
}

#[test]
fn zeroes_and_discards_stay_within_their_ranges() {
    let mut bench = Bench::new();
    let zeroes = bench.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(1, 1, 0), (8, 16, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)]);
    bench.serve();
    assert_eq!(bench.status(zeroes), VIRTIO_BLK_S_OK);
    let content = bench.content();
    let zero = |sector: usize| sector == 1 || (8..24).contains(&sector);
    for (sector, bytes) in content.chunks(512).enumerate() {
        assert_eq!(bytes.iter().all(|byte| *byte == 0), zero(sector), "{sector}");
    }
    let mut bench = Bench::new();
    let discard = bench.ranges(VIRTIO_BLK_T_DISCARD, &[(8, 16, 0)]);
    bench.serve();
    assert_eq!(bench.status(discard), VIRTIO_BLK_S_OK);
    assert!(bench.content()[24 * 512..].iter().chain(&bench.content()[..8 * 512]).all(|byte| *byte == 7));
}

#[test]
fn what_lies_outside_or_makes_no_sense_fails_and_changes_nothing() {
    let mut bench = Bench::new();
    let end = SIZE / 512;
    let ram = MEMORY as u64;
    let write = VRING_DESC_F_WRITE;
    for (sector, data) in [
        (end, (DATA, 512, 0)),
        (end - 1, (DATA, 1024, 0)),
        (u64::MAX, (DATA, 512, 0)),
        (u64::MAX / 512, (DATA, 512, 0)),
        (u64::MAX / 512 + 1, (DATA, 512, 0)),
        (0, (DATA, 511, 0)),
        (0, (ram - 256, 512, 0)),
        (0, (u64::MAX - 10, 512, 0)),
        (0, (DATA, u32::MAX - 511, 0)),
    ] {
        bench.request(VIRTIO_BLK_T_OUT, sector, data);
        bench.request(VIRTIO_BLK_T_IN, sector, (data.0, data.1, write));
    }
    bench.serve();
    for number in 0..bench.requests {
        assert_eq!(bench.status(number), VIRTIO_BLK_S_IOERR, "{number}");
    }
    assert!(bench.content().iter().all(|byte| *byte == 7));
    let too_many = ZEROES_SECTORS_MAX + 1;
    for ranges in [&[(end, 1, 0)][..], &[(0, 1, 2)], &[(0, too_many, 0)], &[(u64::MAX, 1, 0)], &[(0, 1, 0); 17], &[]] {
        let mut bench = Bench::new();
        let number = bench.ranges(VIRTIO_BLK_T_WRITE_ZEROES, ranges);
        bench.serve();
        assert_eq!(bench.status(number), VIRTIO_BLK_S_IOERR, "{ranges:?}");
        assert!(bench.content().iter().all(|byte| *byte == 7));
    }
}

#[test]
fn unknown_requests_are_told_apart_from_failed_ones() {
    let mut bench = Bench::new();
    let unknown = bench.request(0x1234, 0, (DATA, 512, 0));
    let reserved = bench.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 1, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)]);
    bench.chain(&[(HEADERS, 15, 0), (STATUSES + 100, 1, VRING_DESC_F_WRITE)]);
    bench.chain(&[(HEADERS, 16, 0)]);
    bench.chain(&[(STATUSES + 101, 1, VRING_DESC_F_WRITE), (HEADERS, 16, 0)]);
    bench.serve();
    assert_eq!([unknown, reserved].map(|number| bench.status(number)), [VIRTIO_BLK_S_UNSUPP; 2]);
    assert_eq!([100, 101].map(|number| bench.status(number)), [VIRTIO_BLK_S_IOERR; 2]);
    assert_eq!(bench.used(3).1, 0, "without a place for the status");
}

#[test]
fn readonly_disk_is_not_written_to() {
    let mut bench = Bench::new();
    bench.config.readonly = true;
    for kind in [VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        bench.request(kind, 0, (DATA, 512, 0));
    }
    bench.request(VIRTIO_BLK_T_IN, 0, (DATA, 512, VRING_DESC_F_WRITE));
    bench.request(VIRTIO_BLK_T_FLUSH, 0, (0, 0, 0));
    bench.serve();
    assert_eq!([0, 1, 2].map(|number| bench.status(number)), [VIRTIO_BLK_S_IOERR; 3]);
    assert_eq!([3, 4].map(|number| bench.status(number)), [VIRTIO_BLK_S_OK; 2]);
    assert_eq!(bench.bytes(DATA, 512), [7; 512]);
    let features = Block::new(&bench.config).unwrap().features();
    let has = |bit: u32| features & (1 << bit) != 0;
    assert!(has(VIRTIO_BLK_F_RO) && has(VIRTIO_BLK_F_FLUSH) && !has(VIRTIO_BLK_F_DISCARD));
}

#[test]
fn thread_does_more_than_a_batch_tells_the_driver_and_gives_the_queue_back() {
    let mut bench = Bench::new();
    for _ in 0..50 {
        bench.request(VIRTIO_BLK_T_IN, 0, (DATA, 512, VRING_DESC_F_WRITE));
    }
    let mut disk = Block::new(&bench.config).unwrap();
    let (activation, heard) = bench.activation();
    disk.start(activation).unwrap();
    for _ in 0..50 {
        assert_eq!(heard.recv_timeout(Duration::from_secs(20)), Ok(0));
    }
    let queues = disk.stop();
    assert_eq!(queues.len(), 1);
    assert_eq!((queues[0].queue.next_avail(), queues[0].queue.next_used()), (50, 50));
    assert!((0..50).all(|number| bench.status(number) == VIRTIO_BLK_S_OK));
    disk.flush().unwrap();
    assert!(disk.stop().is_empty());
}

#[test]
fn stopped_disk_has_nothing_in_flight_and_goes_on_with_what_was_left_in_the_queue() {
    for ring in [false, true] {
        let mut bench = Bench::new();
        bench.ring = ring;
        for _ in 0..80 {
            bench.request(VIRTIO_BLK_T_OUT, 0, (DATA, 4096, 0));
        }
        let (activation, heard) = bench.activation();
        let mut work = bench.work(activation);
        // One batch is taken off the queue; the rest waits for whoever has the queue next.
        work.begin();
        work.finish();
        let queue = &work.active.queue;
        assert_eq!((queue.next_avail(), queue.next_used(), heard.try_iter().count()), (16, 16, 16));
        // It has asked to be called again, and the call survives in the queue's eventfd.
        assert_eq!(work.active.kick.read().unwrap(), 1);
        let BlockWork { image, id, memory, active, notifier, write_through, ring: _ } = work;
        let ring = if ring { Ring::new(image.clone()).ok() } else { None };
        let mut work = BlockWork { image, id, memory, active, notifier, write_through, ring };
        for _ in 0..80 / 16 {
            work.begin();
        }
        work.finish();
        assert_eq!(work.active.queue.next_used(), 80);
        assert!((0..80).all(|number| bench.status(number) == VIRTIO_BLK_S_OK));
    }
}

#[test]
fn disk_without_a_cache_that_the_driver_knows_of_answers_all_the_same() {
    let mut bench = Bench::new();
    bench.request(VIRTIO_BLK_T_OUT, 0, (DATA, 4096, 0));
    bench.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(8, 8, 0)]);
    let (activation, _heard) = bench.activation();
    let mut work = bench.work(activation);
    work.write_through = true;
    work.begin();
    work.finish();
    assert_eq!([0, 1].map(|number| bench.status(number)), [VIRTIO_BLK_S_OK; 2]);
}

#[test]
fn queue_that_is_not_set_up_comes_back_as_it_was() {
    let bench = Bench::new();
    let mut disk = Block::new(&bench.config).unwrap();
    let (mut activation, _heard) = bench.activation();
    activation.queues[0].queue.set_ready(false);
    disk.start(activation).unwrap();
    assert_eq!(disk.stop().len(), 1);
}

#[test]
fn configuration_space_has_the_capacity_and_an_end() {
    let bench = Bench::new();
    let disk = Block::new(&bench.config).unwrap();
    let read = |offset, length| {
        let mut data = vec![0xaa; length];
        disk.read_config(offset, &mut data);
        data
    };
    assert_eq!(read(0, 8), (SIZE / 512).to_le_bytes());
    assert_eq!(read(20, 4), 512_u32.to_le_bytes());
    assert_eq!(read(59, 3), [0, 0xaa, 0xaa]);
    assert_eq!(read(u64::MAX, 1), [0xaa]);
}

#[test]
fn disk_that_is_another_after_an_update_is_refused() {
    let (first, second) = (Bench::new(), Bench::new());
    let state = Block::new(&first.config).unwrap().save();
    Block::new(&first.config).unwrap().restore(&state).unwrap();
    assert!(Block::new(&second.config).unwrap().restore(&state).is_err());
}

prop_compose! {
    /// Something near what a driver writes: addresses around the ends of RAM and in the queue itself, any flags, any next.
    fn descriptor()(
        address in prop_oneof![
            Just(HEADERS), Just(DATA), 0..MEMORY as u64, (MEMORY as u64 - 600)..(MEMORY as u64 + 600), any::<u64>()
        ],
        length in prop_oneof![Just(16_u32), Just(1), Just(512), 0..2000_u32, any::<u32>()],
        flags in 0..8_u16,
        next in prop_oneof![0..16_u16, any::<u16>()],
    ) -> RawDescriptor {
        RawDescriptor::from(Descriptor::new(address, length, flags, next))
    }
}

proptest! {
    #[test]
    fn no_descriptors_bring_the_disk_down_or_change_its_size(
        descriptors in prop::collection::vec(descriptor(), 1..16),
        heads in prop::collection::vec(0..20_u16, 1..16),
        kind in 0..16_u32,
        sector in prop_oneof![0..SIZE / 512 + 2, any::<u64>()],
        (direct, ring) in any::<(bool, bool)>(),
    ) {
        let mut bench = Bench::new();
        bench.ring = ring;
        bench.config.direct = direct && Block::new(&BlockConfig { direct, ..bench.config.clone() }).is_ok();
        bench.memory.write_obj(kind, GuestAddress(HEADERS)).unwrap();
        bench.memory.write_obj(sector, GuestAddress(HEADERS + 8)).unwrap();
        bench.descriptors = descriptors;
        let (activation, _heard) = bench.activation();
        let mock = MockSplitQueue::create(&bench.memory, GuestAddress(0), QUEUE_SIZE);
        for (index, head) in heads.iter().enumerate() {
            bench.memory.write_obj(*head, GuestAddress(mock.avail_addr().0 + 4 + index as u64 * 2)).unwrap();
        }
        bench.memory.write_obj(heads.len() as u16, GuestAddress(mock.avail_addr().0 + 2)).unwrap();
        let mut work = bench.work(activation);
        work.begin();
        work.finish();
        prop_assert_eq!(bench.file.as_file().metadata().unwrap().len(), SIZE);
    }

    #[test]
    fn no_ring_brings_the_disk_down(index in any::<u16>(), ring in prop::collection::vec(any::<u16>(), 1..64)) {
        let bench = Bench::new();
        let (activation, _heard) = bench.activation();
        let mock = MockSplitQueue::create(&bench.memory, GuestAddress(0), QUEUE_SIZE);
        for (place, entry) in ring.iter().enumerate() {
            bench.memory.write_obj(*entry, GuestAddress(mock.avail_addr().0 + 4 + place as u64 * 2)).unwrap();
        }
        bench.memory.write_obj(index, GuestAddress(mock.avail_addr().0 + 2)).unwrap();
        let mut disk = Block::new(&bench.config).unwrap();
        disk.start(activation).unwrap();
        prop_assert_eq!(disk.stop().len(), 1);
    }
}
