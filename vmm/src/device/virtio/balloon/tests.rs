//! A driver that puts pages in and takes them out, updates in between, and what no driver should do.

use std::sync::mpsc::Receiver;
use std::thread;
use std::time::Duration;

use proptest::prelude::*;
use rustix::fs::{MemfdFlags, SealFlags};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{Epoll, EventSet};

use super::pages::{BLOCK, PAGE};
use super::work::{DEFLATE, INFLATE, REFRESH, RELEASED, STATISTICS};
use super::*;
use crate::device::virtio::Notifier;
use crate::device::virtio::mock::{Part, RING_SIZE, Ring, Told, notifier, readable, writable};
use crate::device::virtio::worker::Work;
use crate::memory::Ram;
use crate::memory::discards::Discards;

const SIZE: u64 = 16 * BLOCK;
const PAGES: u64 = SIZE / PAGE;
/// What is tried at random is tried with less.
const SMALL: u64 = 8;
const SMALL_PAGES: u64 = SMALL * IN_BLOCK;
const IN_BLOCK: u64 = BLOCK / PAGE;
const REPORT: usize = 4;
const ALL: u64 = 1 << F_MUST_TELL_HOST | 1 << F_STATS_VQ | 1 << F_DEFLATE_ON_OOM | 1 << F_REPORTING;
const SOON: Duration = Duration::from_secs(10);

/// RAM with the rings in its first block and what they lead to in the second.
struct Bench {
    ram: Ram,
    base: u64,
    control: Arc<Control>,
    rings: Vec<Ring>,
    heard: Receiver<Told>,
    notifier: Arc<dyn Notifier>,
    used: u64,
}

impl Bench {
    /// All of RAM is backed, and each page has its number in it.
    fn new() -> Self {
        Self::of(SIZE / BLOCK)
    }

    fn of(blocks: u64) -> Self {
        let bench = Self::sparse(blocks);
        bench.back();
        bench.number();
        bench
    }

    /// RAM is not used yet.
    fn sparse(blocks: u64) -> Self {
        let ram = Ram::create("test", blocks * BLOCK).unwrap();
        let base = ram.ranges()[0].gpa;
        let control = Arc::new(Control::new(ram.discards()).unwrap());
        let rings = (0..QUEUE_SIZES.len())
            .map(|number| Ring::new(&ram.guest, base + (number as u64 + 1) * RING_SIZE, QUEUE_SIZES[number]))
            .collect();
        let (notifier, heard) = notifier();
        Self { ram, base, control, rings, heard, notifier, used: 0 }
    }

    fn number(&self) {
        for page in 2 * IN_BLOCK..self.ram.size() / PAGE {
            self.write(page, page);
        }
    }

    /// Has all of it backed, as for a live update, also where `populate` does nothing, as under a user-mode emulator.
    fn back(&self) {
        for page in 0..self.ram.size() / PAGE {
            let found = self.read(page);
            self.write(page, found);
        }
    }

    fn backed(&self) -> u64 {
        self.ram.discards().backed().unwrap()
    }

    fn address(&self, page: u64) -> u64 {
        self.base + page * PAGE
    }

    fn write(&self, page: u64, value: u64) {
        self.ram.guest.write_obj(value, GuestAddress(self.address(page))).unwrap();
    }

    fn read(&self, page: u64) -> u64 {
        self.ram.guest.read_obj(GuestAddress(self.address(page))).unwrap()
    }

    /// The blocks of which nothing is there any more. (To read them backs them again.)
    fn discarded(&self) -> Vec<u64> {
        let gone = |block: &u64| (0..IN_BLOCK).all(|page| self.read(block * IN_BLOCK + page) == 0);
        (2..self.ram.size() / BLOCK).filter(gone).collect()
    }

    fn work(&self, features: u64) -> BalloonWork {
        self.work_with(features, self.rings.iter().map(Ring::active).collect(), Pages::new(self.ram.size()))
    }

    fn work_with(&self, features: u64, queues: Vec<ActiveQueue>, pages: Pages) -> BalloonWork {
        let (memory, notifier) = (self.ram.guest.clone(), self.notifier.clone());
        let mut work = BalloonWork::new(memory, queues, notifier, self.control.clone(), pages, features).unwrap();
        work.begin();
        settle(&mut work);
        work
    }

    /// A place for so many bytes that the driver hands over.
    fn place(&mut self, bytes: &[u8]) -> Part {
        let at = self.base + BLOCK + self.used;
        self.used = (self.used + bytes.len() as u64) % (BLOCK / 2);
        self.ram.guest.write_slice(bytes, GuestAddress(at)).unwrap();
        readable(at, bytes.len() as u32)
    }

    fn offer(&mut self, queue: usize, parts: &[Part], work: &mut BalloonWork) -> u16 {
        let head = self.rings[queue].offer(parts);
        call(work, queue as u64);
        head
    }

    /// Names pages to the device, as Linux does: up to 256 at once.
    fn name(&mut self, queue: usize, pages: impl IntoIterator<Item = u64>, work: &mut BalloonWork) {
        let numbers: Vec<u64> = pages.into_iter().map(|page| self.address(page) / PAGE).collect();
        for part in numbers.chunks(256) {
            let bytes: Vec<u8> = part.iter().flat_map(|number| (*number as u32).to_le_bytes()).collect();
            let place = self.place(&bytes);
            let head = self.offer(queue, &[place], work);
            assert_eq!(self.rings[queue].used(), [(head, 0)]);
        }
    }
}

/// Calls a thread's work as its thread would.
fn call(work: &mut BalloonWork, source: u64) {
    work.handle(source, EventSet::IN, &Epoll::new().unwrap());
    settle(work);
}

/// Until nothing is left to be done but to wait.
fn settle(work: &mut BalloonWork) {
    while work.is_sweeping() {
        work.go_on_sweeping();
    }
}

fn block(number: u64) -> std::ops::Range<u64> {
    number * IN_BLOCK..(number + 1) * IN_BLOCK
}

#[test]
fn block_goes_back_when_all_of_it_is_in_the_balloon_and_what_is_beside_it_stays() {
    let mut bench = Bench::new();
    let mut work = bench.work(ALL);
    bench.name(INFLATE, block(4).take(511), &mut work);
    assert!(bench.discarded().is_empty());
    // The last page, with more before and behind it, in no order.
    let others = [5 * IN_BLOCK, 4 * IN_BLOCK + 511, 3 * IN_BLOCK + 511];
    bench.name(INFLATE, others, &mut work);
    assert_eq!(bench.backed(), SIZE - BLOCK);
    assert_eq!(bench.discarded(), [4]);
    for page in (2 * IN_BLOCK..PAGES).filter(|page| !block(4).contains(page)) {
        assert_eq!(bench.read(page), page);
    }
    assert_eq!(bench.heard.try_recv(), Ok(Told::Queue(INFLATE as u16)));
}

#[test]
fn page_that_was_taken_out_keeps_its_block_until_it_is_in_again() {
    let mut bench = Bench::new();
    let mut work = bench.work(ALL);
    bench.name(INFLATE, block(4).take(511), &mut work);
    bench.name(DEFLATE, [4 * IN_BLOCK + 7], &mut work);
    bench.name(INFLATE, [4 * IN_BLOCK + 511], &mut work);
    assert!(bench.discarded().is_empty());
    bench.name(INFLATE, [4 * IN_BLOCK + 7], &mut work);
    assert_eq!(bench.discarded(), [4]);
}

#[test]
fn what_is_put_in_while_held_is_given_back_after_the_release_unless_it_was_taken_out() {
    let mut bench = Bench::new();
    let mut work = bench.work(ALL);
    bench.name(INFLATE, block(3), &mut work);
    bench.control.discards().hold();
    bench.back();
    // The driver is answered as ever.
    bench.name(INFLATE, block(4).chain(block(6)), &mut work);
    // Of these the guest uses one page again.
    bench.name(DEFLATE, [6 * IN_BLOCK + 9], &mut work);
    bench.write(6 * IN_BLOCK + 9, 77);
    assert_eq!(bench.backed(), SIZE);
    bench.control.discards().release();
    call(&mut work, RELEASED);
    assert_eq!(bench.backed(), SIZE - 2 * BLOCK);
    assert_eq!(bench.discarded(), [3, 4]);
    assert_eq!(bench.read(6 * IN_BLOCK + 9), 77);
}

#[test]
fn after_a_restore_is_given_back_what_was_in_the_balloon_and_nothing_else() {
    let mut bench = Bench::new();
    let mut work = bench.work(ALL);
    bench.control.set_target(24 << 20).unwrap();
    bench.control.write_config(4, &[9, 8, 0, 0]);
    bench.name(INFLATE, block(3).chain(block(4)).chain(block(7)).take(2 * 512 + 511), &mut work);
    bench.control.discards().hold();
    bench.name(INFLATE, block(9), &mut work);
    bench.name(DEFLATE, [4 * IN_BLOCK], &mut work);
    work.finish();
    let mut balloon = Balloon::new(&bench.control);
    let queues;
    (queues, balloon.pages) = work.into_parts();
    let state = balloon.save();
    let VirtioState::Balloon(saved) = &state else { panic!("{state:?}") };
    assert_eq!((saved.target, saved.actual), (24 << 8, 0x809));

    // As under the next kernel: all is backed, and nothing held.
    bench.back();
    bench.number();
    bench.ram.discards().release();
    bench.control = Arc::new(Control::new(bench.ram.discards()).unwrap());
    let mut other = Balloon::new(&bench.control);
    other.restore(&state).unwrap();
    assert_eq!(other.save(), state);
    drop(bench.work_with(ALL, queues, other.pages));
    assert_eq!(bench.discarded(), [3, 9]);
}

#[test]
fn host_that_refuses_memory_is_asked_again_and_the_guest_does_not_notice() {
    let mut bench = Bench::new();
    // A file that refuses holes as the kernel does while it is preserved, which it may be for longer than RAM is held.
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create("refuses", flags).unwrap();
    rustix::fs::ftruncate(&file, SIZE).unwrap();
    rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
    let discards = Discards::new(file, bench.ram.ranges().to_vec()).unwrap();
    assert_eq!(discards.discard(0, BLOCK).unwrap_err().raw_os_error(), Some(libc::EPERM));
    bench.control = Arc::new(Control::new(&Arc::new(discards)).unwrap());
    let mut work = bench.work(ALL);
    let bytes: Vec<u8> = block(4).flat_map(|page| ((bench.address(page) / PAGE) as u32).to_le_bytes()).collect();
    let place = bench.place(&bytes);
    let head = bench.rings[INFLATE].offer(&[place]);
    let report = bench.rings[REPORT].offer(&[writable(bench.base + 6 * BLOCK, BLOCK as u32)]);
    let epoll = Epoll::new().unwrap();
    work.handle(INFLATE as u64, EventSet::IN, &epoll);
    work.handle(REPORT as u64, EventSet::IN, &epoll);
    assert_eq!(bench.rings[INFLATE].used(), [(head, 0)]);
    assert_eq!(bench.rings[REPORT].used(), [(report, 0)]);
    work.go_on_sweeping();
    assert!(work.is_sweeping(), "it has given up");
}

#[test]
fn driver_that_does_not_promise_to_tell_first_keeps_its_memory() {
    let mut bench = Bench::new();
    let mut work = bench.work(ALL & !(1 << F_MUST_TELL_HOST));
    bench.name(INFLATE, block(4), &mut work);
    bench.control.discards().release();
    call(&mut work, RELEASED);
    assert!(bench.discarded().is_empty());
}

#[test]
fn taking_out_what_cannot_be_understood_keeps_all_from_being_given_back_later() {
    let numbers = [1, 2, 3];
    let beyond = SIZE as u32 + 1;
    for case in 0..5 {
        let mut bench = Bench::new();
        let mut work = bench.work(ALL);
        bench.control.discards().hold();
        bench.name(INFLATE, block(4), &mut work);
        let place = bench.place(&numbers);
        let parts = match case {
            0 => vec![place],
            1 => vec![readable(bench.base + SIZE - 2, 4)],
            2 => vec![readable(u64::MAX - 3, 4)],
            3 => vec![writable(place.address, 4)],
            _ => vec![readable(bench.base, beyond)],
        };
        let head = bench.offer(DEFLATE, &parts, &mut work);
        assert_eq!(bench.rings[DEFLATE].used(), [(head, 0)]);
        bench.control.discards().release();
        call(&mut work, RELEASED);
        assert!(bench.discarded().is_empty(), "{case}");
    }
}

#[test]
fn pages_that_are_no_ram_are_left_out_and_others_in_the_request_count() {
    let mut bench = Bench::new();
    let mut work = bench.work(ALL);
    bench.name(INFLATE, block(4).take(511), &mut work);
    let last = (bench.address(4 * IN_BLOCK + 511) / PAGE) as u32;
    let outside = ((bench.base + SIZE) / PAGE) as u32;
    let numbers = [u32::MAX, outside, last, last, outside + 1];
    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    let place = bench.place(&bytes);
    bench.offer(INFLATE, &[place], &mut work);
    assert_eq!(bench.discarded(), [4]);
}

#[test]
fn reported_free_memory_goes_back_in_whole_blocks_and_what_is_beside_them_stays() {
    for queue in [REPORT - 1, REPORT] {
        let mut bench = Bench::new();
        let mut work = bench.work(ALL);
        let part = |page: u64, pages: u64| writable(bench.base + page * PAGE, (pages * PAGE) as u32);
        let parts = [
            part(4 * IN_BLOCK, IN_BLOCK),
            part(6 * IN_BLOCK - 1, 2 * IN_BLOCK),
            part(9 * IN_BLOCK + 1, IN_BLOCK),
            part(10 * IN_BLOCK, IN_BLOCK - 1),
            part(14 * IN_BLOCK, 0),
            writable(bench.base + 15 * BLOCK, BLOCK as u32 + 1),
            writable(u64::MAX, 2),
            readable(bench.base + 12 * BLOCK, BLOCK as u32),
        ];
        let head = bench.offer(queue, &parts, &mut work);
        assert_eq!(bench.rings[queue].used(), [(head, 0)]);
        assert_eq!(bench.discarded(), [4, 6]);
        for page in (2 * IN_BLOCK..PAGES).filter(|page| ![4, 6].contains(&(page / IN_BLOCK))) {
            assert_eq!(bench.read(page), page);
        }
    }
}

#[test]
fn report_while_held_is_forgotten_as_the_guest_may_use_the_memory_at_once() {
    let mut bench = Bench::new();
    let mut work = bench.work(ALL);
    bench.control.discards().hold();
    let parts = [writable(bench.base + 4 * BLOCK, BLOCK as u32)];
    let head = bench.offer(REPORT, &parts, &mut work);
    assert_eq!(bench.rings[REPORT].used(), [(head, 0)]);
    bench.control.discards().release();
    call(&mut work, RELEASED);
    assert!(bench.discarded().is_empty());
}

#[test]
fn reports_of_a_driver_that_has_not_said_that_it_makes_any_are_not_taken() {
    let mut bench = Bench::new();
    let mut work = bench.work(ALL & !(1 << F_REPORTING));
    bench.offer(REPORT, &[writable(bench.base + 4 * BLOCK, BLOCK as u32)], &mut work);
    assert!(bench.rings[REPORT].used().is_empty());
    assert!(bench.discarded().is_empty());
}

#[test]
fn statistics_are_kept_asked_for_and_put_back_unnoticed() {
    let mut bench = Bench::new();
    let mut work = bench.work(ALL);
    let free = [&[4, 0][..], &5_u64.to_le_bytes()].concat();
    let place = bench.place(&free);
    let head = bench.offer(STATISTICS, &[place], &mut work);
    assert!(bench.rings[STATISTICS].used().is_empty());
    assert_eq!(bench.control.status(Duration::ZERO).unwrap().statistics, [("free_bytes", 5)]);

    call(&mut work, REFRESH);
    call(&mut work, REFRESH);
    assert_eq!(bench.rings[STATISTICS].used(), [(head, 0)]);
    let head = bench.offer(STATISTICS, &[place], &mut work);
    let before = work.queue(STATISTICS).next_avail();
    work.finish();
    assert_eq!(work.queue(STATISTICS).next_avail(), before.wrapping_sub(1));
    // The thread after it takes it anew, and asks for newer ones.
    work.begin();
    assert_eq!(bench.rings[STATISTICS].used(), [(head, 0)]);
}

#[test]
fn status_waits_for_fresh_statistics_but_not_for_ever() {
    let mut bench = Bench::new();
    let mut balloon = Balloon::new(&bench.control);
    let queues = bench.rings.iter().map(Ring::active).collect::<Vec<_>>();
    let kick = queues[STATISTICS].kick.try_clone().unwrap();
    let (memory, notifier) = (bench.ram.guest.clone(), bench.notifier.clone());
    balloon.start(Activation { memory, features: ALL, queues, notifier }).unwrap();
    // The driver is not up to it.
    let told = bench.control.status(Duration::from_millis(10)).unwrap();
    assert!(told.statistics.is_empty() && told.statistics_age.is_none());

    let control = bench.control.clone();
    let (free, more) = ([4, 0, 1, 0, 0, 0, 0, 0, 0, 0], [4, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    let place = bench.place(&free);
    bench.rings[STATISTICS].offer(&[place]);
    kick.write(1).unwrap();
    let asked = thread::spawn(move || {
        let mut told = control.status(SOON).unwrap();
        while told.statistics != [("free_bytes", 2)] {
            told = control.status(SOON).unwrap();
        }
        told
    });
    // Whenever it is asked, it answers with newer ones.
    let place = bench.place(&more);
    while !asked.is_finished() {
        if let Ok(Told::Queue(_)) = bench.heard.recv_timeout(Duration::from_millis(10)) {
            bench.rings[STATISTICS].offer(&[place]);
            kick.write(1).unwrap();
        }
    }
    assert!(asked.join().unwrap().statistics_age.unwrap() < SOON);
    assert_eq!(balloon.stop().len(), QUEUE_SIZES.len());
}

#[test]
fn target_reaches_the_driver_and_what_it_says_reaches_the_operator() {
    let bench = Bench::new();
    let mut balloon = Balloon::new(&bench.control);
    assert!(bench.control.set_target(SIZE + 1).is_err());
    assert!(bench.control.set_target(u64::MAX).is_err());
    bench.control.set_target(8 * PAGE + 1).unwrap();
    assert!(bench.heard.try_recv().is_err());
    let (memory, notifier) = (bench.ram.guest.clone(), bench.notifier.clone());
    let queues = bench.rings.iter().map(Ring::active).collect();
    balloon.start(Activation { memory, features: ALL, queues, notifier }).unwrap();
    // It was asked for before there was anybody.
    assert_eq!(bench.heard.recv_timeout(SOON), Ok(Told::Config));
    bench.control.set_target(9 * PAGE).unwrap();
    assert_eq!(bench.heard.recv_timeout(SOON), Ok(Told::Config));
    let mut space = [0xee; 12];
    balloon.read_config(0, &mut space);
    assert_eq!(space, [9, 0, 0, 0, 0, 0, 0, 0, 0xee, 0xee, 0xee, 0xee]);
    balloon.write_config(4, &[1, 2, 0, 0]);
    balloon.write_config(5, &[3]);
    // Neither what it is asked for, nor what is not there, can be written.
    balloon.write_config(0, &[0xff; 4]);
    balloon.write_config(8, &[0xff; 8]);
    balloon.write_config(u64::MAX, &[0xff; 8]);
    let status = bench.control.status(Duration::ZERO).unwrap();
    assert_eq!((status.target, status.actual), (9 * PAGE, 0x301 * PAGE));
    balloon.stop();
    balloon.reset();
    let status = bench.control.status(Duration::ZERO).unwrap();
    assert_eq!((status.target, status.actual), (9 * PAGE, 0));
}

#[test]
fn state_that_is_not_of_this_ram_is_refused() {
    let bench = Bench::new();
    let mut balloon = Balloon::new(&bench.control);
    let good = BalloonV1 { target: PAGES as u32, actual: u32::MAX, blocks: vec![0xff; 2] };
    balloon.restore(&VirtioState::Balloon(good.clone())).unwrap();
    assert_eq!(balloon.save(), VirtioState::Balloon(good.clone()));
    for wrong in [
        BalloonV1 { target: PAGES as u32 + 1, ..good.clone() },
        BalloonV1 { blocks: vec![0; 1], ..good.clone() },
        BalloonV1 { blocks: vec![0; 3], ..good },
    ] {
        assert!(balloon.restore(&VirtioState::Balloon(wrong.clone())).is_err(), "{wrong:?}");
    }
    assert!(balloon.restore(&VirtioState::Rng(kho_abi::document::virtio::RngV1)).is_err());
}

/// What happens between driver, device and live update.
#[derive(Clone, Debug)]
enum Step {
    Inflate(u64, u64),
    Deflate(u64, u64),
    Report(u64, u64),
    Hold,
    Release,
    Restart,
}

fn any_step() -> impl Strategy<Value = Step> {
    // Whole blocks and odd parts of them.
    let pages = || {
        prop_oneof![
            (2..SMALL, 1..4_u64).prop_map(|(first, count)| (first * IN_BLOCK, count * IN_BLOCK)),
            (2 * IN_BLOCK..SMALL_PAGES, 1..2 * IN_BLOCK),
        ]
    };
    prop_oneof![
        4 => pages().prop_map(|(first, count)| Step::Inflate(first, count)),
        2 => pages().prop_map(|(first, count)| Step::Deflate(first, count)),
        1 => pages().prop_map(|(first, count)| Step::Report(first, count)),
        1 => Just(Step::Hold),
        1 => Just(Step::Release),
        1 => Just(Step::Restart),
    ]
}

fn any_part() -> impl Strategy<Value = Part> {
    let address = prop_oneof![0..SIZE, (0..16_u64).prop_map(|block| block * BLOCK), any::<u64>()];
    let length = prop_oneof![0..3000u32, Just(4), Just(BLOCK as u32), Just(4 * BLOCK as u32), any::<u32>()];
    (address, length, any::<bool>()).prop_map(|(address, length, writable)| Part { address, length, writable })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// A page that is not in the balloon and was not reported keeps what the guest wrote to it, whatever happens around it; and when
    /// nothing is held, whole blocks in the balloon take no memory.
    #[test]
    fn no_page_of_the_guests_is_ever_lost(steps in prop::collection::vec(any_step(), 1..20)) {
        let mut bench = Bench::of(SMALL);
        let mut work = bench.work(ALL);
        let mut inside = vec![false; SMALL_PAGES as usize];
        let mut held = false;
        let mut mark = SMALL_PAGES;
        let mut expected: Vec<u64> = (0..SMALL_PAGES).collect();
        for step in steps {
            match step {
                Step::Inflate(first, count) => {
                    let pages: Vec<u64> = (first..SMALL_PAGES.min(first + count)).filter(|page| !inside[*page as usize]).collect();
                    pages.iter().for_each(|page| inside[*page as usize] = true);
                    bench.name(INFLATE, pages, &mut work);
                }
                Step::Deflate(first, count) => {
                    let pages: Vec<u64> = (first..SMALL_PAGES.min(first + count)).filter(|page| inside[*page as usize]).collect();
                    bench.name(DEFLATE, pages.iter().copied(), &mut work);
                    for page in pages {
                        // The guest uses it at once.
                        mark += 1;
                        bench.write(page, mark);
                        (inside[page as usize], expected[page as usize]) = (false, mark);
                    }
                }
                Step::Report(first, count) => {
                    let pages: Vec<u64> = (first..SMALL_PAGES.min(first + count)).collect();
                    if pages.iter().any(|page| inside[*page as usize]) {
                        continue;
                    }
                    let part = writable(bench.address(first), (pages.len() as u64 * PAGE) as u32);
                    bench.offer(REPORT, &[part], &mut work);
                    bench.rings[REPORT].used();
                    for page in pages {
                        mark += 1;
                        bench.write(page, mark);
                        expected[page as usize] = mark;
                    }
                }
                Step::Hold => {
                    bench.control.discards().hold();
                    bench.back();
                    held = true;
                }
                Step::Release => {
                    bench.control.discards().release();
                    held = false;
                    call(&mut work, RELEASED);
                }
                Step::Restart => {
                    work.finish();
                    let (queues, pages) = work.into_parts();
                    let pages = Pages::restored(bench.ram.size(), &pages.save()).unwrap();
                    work = bench.work_with(ALL, queues, pages);
                }
            }
            for page in (2 * IN_BLOCK..SMALL_PAGES).filter(|page| !inside[*page as usize]) {
                prop_assert_eq!(bench.read(page), expected[page as usize], "page {}", page);
            }
        }
        if !held {
            let whole = work.whole_blocks();
            prop_assert!(whole.iter().all(|block| bench.discarded().contains(block)), "{:?}", whole);
        }
    }

    /// No chains, and no rings that the device itself may have written to, make the thread panic or stay.
    #[test]
    fn any_chains_leave_the_thread_working(
        chains in prop::collection::vec((0..5usize, prop::collection::vec(any_part(), 1..5)), 0..40),
        features in any::<u64>(),
    ) {
        let mut bench = Bench::sparse(SMALL);
        for (ring, parts) in &chains {
            let parts: Vec<_> =
                parts.iter().map(|part| Part { address: part.address.wrapping_add(bench.base), ..*part }).collect();
            bench.rings[*ring].offer(&parts);
        }
        let mut work = bench.work(features);
        for source in [0, 1, 2, 3, 4, REFRESH, RELEASED, 4, 3, 2, 1, 0] {
            call(&mut work, source);
        }
        work.finish();
        prop_assert_eq!(work.into_parts().0.len(), 5);
    }
}
