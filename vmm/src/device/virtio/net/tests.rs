//! Frames between a driver and something that stands for a tap, and what no driver should do.

use std::os::unix::net::UnixDatagram;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{Epoll, EventSet};

use super::announce::WAITS;
use super::work::FRAME_MAX;
use super::*;
use crate::device::virtio::mock::{Part, RING_SIZE, Ring, Told, notifier, readable, writable};
use crate::device::virtio::worker::Work;

const MEMORY: usize = 8 << 20;
const DATA: u64 = 4 << 20;
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const SOON: Duration = Duration::from_secs(10);

struct Bench {
    memory: GuestMemoryMmap,
    net: Net,
    network: UnixDatagram,
    rings: [Ring; 3],
    heard: Receiver<Told>,
    notifier: Arc<dyn Notifier>,
}

impl Bench {
    fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let (tap, network) = Tap::mock();
        network.set_nonblocking(true).unwrap();
        let mac = MacAddress([2, 0, 0, 0, 0, 1]);
        let net =
            Net { tap: Arc::new(tap), mac, offloads: 0, announcements: Arc::default(), running: Running::Stopped };
        let rings = [0, 1, 2].map(|number| Ring::new(&memory, (number as u64 + 1) * RING_SIZE, QUEUE_SIZES[number]));
        let (notifier, heard) = notifier();
        Self { memory, net, network, rings, heard, notifier }
    }

    fn work(&self, features: u64) -> NetWork {
        self.work_of(self.rings.iter().map(Ring::active).collect(), features)
    }

    fn work_of(&self, queues: Vec<ActiveQueue>, features: u64) -> NetWork {
        let (tap, memory) = (self.net.tap.clone(), self.memory.clone());
        NetWork::new(tap, memory, queues, self.notifier.clone(), features, self.net.announcements.clone()).unwrap()
    }

    fn work_with_event_idx(&self) -> NetWork {
        let mut queues: Vec<ActiveQueue> = self.rings.iter().map(Ring::active).collect();
        for active in &mut queues {
            active.queue.set_event_idx(true);
        }
        self.work_of(queues, MERGEABLE)
    }

    fn worker(&self) -> Worker<NetWork> {
        Worker::start("network", self.work(MERGEABLE)).unwrap()
    }

    fn bytes(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }
}

fn frame(length: usize) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..length).map(|byte| byte as u8).collect();
    frame[..HEADER].fill(0);
    frame
}

/// Calls a thread's work as its thread would.
fn call(work: &mut NetWork, source: u64) {
    let epoll = Epoll::new().unwrap();
    for (descriptor, events, number) in work.sources() {
        let event = vmm_sys_util::epoll::EpollEvent::new(events, number);
        epoll.ctl(vmm_sys_util::epoll::ControlOperation::Add, descriptor, event).unwrap();
    }
    work.handle(source, EventSet::IN, &epoll);
}

#[test]
fn frame_goes_from_the_guest_to_the_network_as_it_is() {
    let mut bench = Bench::new();
    let sent = frame(HEADER + 1500);
    bench.memory.write_slice(&sent, GuestAddress(DATA)).unwrap();
    let head = bench.rings[1].offer(&[readable(DATA, 12), readable(DATA + 12, 100), readable(DATA + 112, 1400)]);
    bench.work(MERGEABLE).begin();
    let mut received = [0; 4096];
    assert_eq!(bench.network.recv(&mut received).unwrap(), sent.len());
    assert_eq!(received[..sent.len()], sent);
    assert_eq!(bench.rings[1].used(), [(head, 0)]);
    assert_eq!(bench.heard.try_recv(), Ok(Told::Queue(1)));
}

#[test]
fn frame_from_the_network_fills_as_many_buffers_as_it_needs() {
    let mut bench = Bench::new();
    let heads: Vec<u16> = (0..4).map(|number| bench.rings[0].offer(&[writable(DATA + number * 1000, 1000)])).collect();
    let mut sent = frame(2500);
    bench.network.send(&sent).unwrap();
    call(&mut bench.work(MERGEABLE), 3);
    assert_eq!(bench.rings[0].used(), [(heads[0], 1000), (heads[1], 1000), (heads[2], 500)]);
    sent[10] = 3;
    assert_eq!(bench.bytes(DATA, 2500), sent);
    assert_eq!(bench.heard.try_recv(), Ok(Told::Queue(0)));
}

#[test]
fn driver_never_finds_a_part_of_a_frame() {
    const FRAMES: u16 = 100;
    let mut bench = Bench::new();
    for number in 0..3 * u64::from(FRAMES) {
        bench.rings[0].offer(&[writable(DATA + number * 1000, 1000)]);
    }
    let (memory, used) = (bench.memory.clone(), bench.rings[0].used_index());
    let driver = std::thread::spawn(move || {
        loop {
            let found: u16 = memory.load(used, Ordering::Acquire).unwrap();
            assert_eq!(found % 3, 0);
            if found == 3 * FRAMES {
                return;
            }
        }
    });
    let mut work = bench.work(MERGEABLE);
    for _ in 0..FRAMES {
        bench.network.send(&frame(2500)).unwrap();
        call(&mut work, 3);
        assert_eq!(bench.heard.try_recv(), Ok(Told::Queue(0)));
    }
    driver.join().unwrap();
    assert_eq!(bench.rings[0].used().len(), 3 * usize::from(FRAMES));
}

#[test]
fn driver_that_waits_for_one_buffer_hears_of_a_frame_in_several() {
    let mut bench = Bench::new();
    for number in 0..4 {
        bench.rings[0].offer(&[writable(DATA + number * 1000, 1000)]);
    }
    bench.rings[0].wait_for(0);
    let mut work = bench.work_with_event_idx();
    for length in [2500, 900] {
        bench.network.send(&frame(length)).unwrap();
        call(&mut work, 3);
    }
    assert_eq!(bench.heard.try_recv(), Ok(Told::Queue(0)));
    // Nobody waits for the second.
    assert!(bench.heard.try_recv().is_err());
    assert_eq!(bench.rings[0].used().len(), 4);
}

#[test]
fn frame_without_merging_takes_one_buffer_or_is_lost() {
    let mut bench = Bench::new();
    let head = bench.rings[0].offer(&[writable(DATA, 12), writable(DATA + 12, 1514)]);
    bench.network.send(&frame(1527)).unwrap();
    bench.network.send(&frame(1526)).unwrap();
    call(&mut bench.work(0), 3);
    assert_eq!(bench.rings[0].used(), [(head, 1526)]);
    assert_eq!(bench.bytes(DATA + 10, 2), [1, 0]);
}

#[test]
fn what_is_known_of_a_checksum_is_told_only_to_a_driver_that_asked() {
    for (features, flags) in [(0, 0), (1 << VIRTIO_NET_F_GUEST_CSUM, 2)] {
        let mut bench = Bench::new();
        bench.rings[0].offer(&[writable(DATA, 2000)]);
        let mut sent = frame(100);
        sent[0] = 2;
        bench.network.send(&sent).unwrap();
        call(&mut bench.work(features), 3);
        assert_eq!(bench.bytes(DATA, 1), [flags]);
    }
}

#[test]
fn frame_waits_in_the_tap_until_the_guest_has_a_buffer() {
    let mut bench = Bench::new();
    let worker = bench.worker();
    bench.network.send(&frame(100)).unwrap();
    // A frame the other way shows that the thread runs and has nothing to report of the first.
    assert!(bench.heard.recv_timeout(Duration::from_millis(50)).is_err());
    worker.stop().unwrap();
    let head = bench.rings[0].offer(&[writable(DATA, 2000)]);
    let worker = bench.worker();
    assert_eq!(bench.heard.recv_timeout(SOON), Ok(Told::Queue(0)));
    assert_eq!(bench.rings[0].used(), [(head, 100)]);
    worker.stop().unwrap();
}

#[test]
fn kick_after_starvation_brings_the_frames_in() {
    let mut bench = Bench::new();
    let work = bench.work(MERGEABLE);
    let kick = work.queue(0).kick.try_clone().unwrap();
    let worker = Worker::start("network", work).unwrap();
    for number in 0..5 {
        bench.network.send(&frame(100)).unwrap();
        bench.rings[0].offer(&[writable(DATA + number * 2000, 2000)]);
        kick.write(1).unwrap();
        assert_eq!(bench.heard.recv_timeout(SOON), Ok(Told::Queue(0)));
        assert_eq!(bench.rings[0].used().len(), 1);
    }
    worker.stop().unwrap();
}

#[test]
fn announcement_is_asked_for_until_the_driver_says_that_it_was_made() {
    let mut bench = Bench::new();
    bench.net.announcements.end(true);
    assert_eq!(bench.net.config_space()[6..], [3, 0]);
    bench.memory.write_slice(&[3, 0], GuestAddress(DATA)).unwrap();
    bench.rings[2].offer(&[readable(DATA, 2), writable(DATA + 2, 1)]);
    bench.memory.write_slice(&[9, 9, 0xee], GuestAddress(DATA + 8)).unwrap();
    bench.rings[2].offer(&[readable(DATA + 8, 2), writable(DATA + 10, 1)]);
    bench.work(MERGEABLE).begin();
    assert_eq!(bench.net.config_space(), [2, 0, 0, 0, 0, 1, 1, 0]);
    assert_eq!((bench.bytes(DATA + 2, 1)[0], bench.bytes(DATA + 10, 1)[0]), (0, 1));
    assert_eq!(bench.rings[2].used().len(), 2);
}

#[test]
fn restored_device_keeps_its_address_and_asks_a_driver_that_can_to_announce_itself() {
    for (features, asked) in [(0, false), (1 << VIRTIO_NET_F_GUEST_ANNOUNCE, true)] {
        let mut bench = Bench::new();
        let state = |mac, announce| VirtioState::Net(NetV1 { mac, announce });
        bench.net.restore(&state([2, 9, 9, 9, 9, 9], false)).unwrap_err();
        bench.net.restore(&state([2, 0, 0, 0, 0, 1], false)).unwrap();
        bench.net.running = Running::Working(bench.worker(), features, bench.notifier.clone());
        bench.net.after_restore();
        assert_eq!(bench.heard.try_recv().is_ok(), asked);
        assert_eq!(bench.net.stop().len(), 3);
        assert_eq!(bench.net.save(), state([2, 0, 0, 0, 0, 1], asked));
    }
}

#[test]
fn driver_is_asked_again_for_an_announcement_that_may_be_lost_but_not_for_ever() {
    let mut bench = Bench::new();
    let features = 1 << VIRTIO_NET_F_GUEST_ANNOUNCE;
    bench.memory.write_slice(&[3, 0], GuestAddress(DATA)).unwrap();
    let worker = Worker::start("network", bench.work(features)).unwrap();
    bench.net.running = Running::Working(worker, features, bench.notifier.clone());
    bench.net.after_restore();
    for asked in 0..=WAITS.len() {
        assert_eq!(bench.heard.recv_timeout(SOON), Ok(Told::Config), "{asked}");
        assert_eq!(bench.net.config_space()[6..], [3, 0]);
        // Stopped and started again, it goes on with what is left.
        let queues = bench.net.stop();
        bench.rings[2].offer(&[readable(DATA, 2), writable(DATA + 2, 1)]);
        let worker = Worker::start("network", bench.work_of(queues, features)).unwrap();
        bench.net.running = Running::Working(worker, features, bench.notifier.clone());
        assert_eq!(bench.heard.recv_timeout(SOON), Ok(Told::Queue(2)));
    }
    assert_eq!(bench.net.announcements.wait(), None);
    assert_eq!(bench.net.config_space()[6..], [1, 0]);
}

#[test]
fn chain_that_is_no_frame_is_given_back_and_sends_nothing() {
    let mut bench = Bench::new();
    let long = FRAME_MAX as u32 + 1;
    let chains: [&[Part]; 6] = [
        &[readable(DATA, 25)],
        &[readable(DATA, long)],
        &[readable(MEMORY as u64 - 10, 100)],
        &[readable(u64::MAX, 100)],
        &[writable(DATA, 1000)],
        &[readable(DATA, 12), readable(DATA, u32::MAX)],
    ];
    for chain in chains {
        bench.rings[1].offer(chain);
    }
    bench.work(MERGEABLE).begin();
    assert_eq!(bench.rings[1].used().len(), chains.len());
    assert!(bench.network.recv(&mut [0; 100]).is_err());
}

fn any_part() -> impl Strategy<Value = Part> {
    let address = prop_oneof![0..MEMORY as u64, DATA..DATA + 100, any::<u64>()];
    let length = prop_oneof![0..3000u32, Just(1), Just(2), Just(65_562), any::<u32>()];
    (address, length, any::<bool>()).prop_map(|(address, length, writable)| Part { address, length, writable })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// No chains, and no rings that the device itself may have written to, make the thread panic or stay.
    #[test]
    fn any_chains_leave_the_thread_working(
        chains in prop::collection::vec((0..3usize, prop::collection::vec(any_part(), 1..5)), 0..40),
        frames in prop::collection::vec(0..4000usize, 0..10),
        features: u64,
    ) {
        let mut bench = Bench::new();
        for (ring, parts) in &chains {
            bench.rings[*ring].offer(parts);
        }
        for length in frames {
            bench.network.send(&vec![1; length]).unwrap();
        }
        let mut work = bench.work(features);
        work.begin();
        for source in [3, 0, 1, 2, 3] {
            call(&mut work, source);
        }
        prop_assert_eq!(work.into_queues().len(), 3);
    }
}

proptest! {
    // Each may walk through the longest indirect tables that there are.
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Nor do rings of which every byte is the driver's.
    #[test]
    fn any_rings_leave_the_thread_working(seed in prop::collection::vec(any::<u8>(), 64)) {
        let mut bench = Bench::new();
        let bytes: Vec<u8> = seed.iter().cycle().copied().take(RING_SIZE as usize * 3).collect();
        bench.memory.write_slice(&bytes, GuestAddress(RING_SIZE)).unwrap();
        bench.network.send(&frame(1000)).unwrap();
        let mut work = bench.work(MERGEABLE);
        work.begin();
        call(&mut work, 3);
        bench.rings[0].used();
    }
}
