//! What no driver should do: it may break its own connections, and nothing else.

use std::io::{Read, Write};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::packet::{HEADER, Header, Operation};
use super::super::room::BUFFER;
use super::super::table::{CONNECTIONS_MAX, RESETS_MAX};
use super::bench::{ANYWHERE, Bench, HOST_PORT, SERVICE};
use crate::device::virtio::mock::{Part, RING_SIZE, readable, writable};

#[test]
fn packet_of_no_connection_is_answered_by_a_reset_unless_it_is_one() {
    let mut bench = Bench::new();
    for number in [0, 2, 4, 5, 6, 7, 8, u16::MAX] {
        let header = Header { operation: number.into(), ..bench.header(Operation::Data, 1, 2) };
        bench.sends_raw(header, &[], &[HEADER]);
        let (reset, _) = bench.hears_one(Operation::Reset);
        assert_eq!((reset.source_port.get(), reset.destination_port.get()), (1, 2));
    }
    bench.says(Operation::Reset, 1, 2);
    // Another kind of socket.
    let _service = bench.service(SERVICE);
    let header = Header { kind: 2.into(), ..bench.header(Operation::Request, SERVICE, 2) };
    bench.sends_raw(header, &[], &[HEADER]);
    bench.hears_one(Operation::Reset);
    // Between others.
    for (source, destination) in [(4, 2), (3, 1), (3, 3), (u64::MAX, 2), (3, u64::MAX)] {
        let header = bench.header(Operation::Request, SERVICE, 2);
        let header = Header { source_cid: source.into(), destination_cid: destination.into(), ..header };
        bench.sends_raw(header, &[], &[HEADER]);
    }
    assert_eq!((bench.hears(), bench.work.table().len()), (vec![], 0));
}

#[test]
fn packet_that_does_not_fit_its_connection_resets_it() {
    let wrong: [&dyn Fn(&mut Bench); 8] = [
        // Not as much data as it says, more than a packet has, more than there is room for.
        &|bench| bench.sends_spread(HOST_PORT, 5000, &[1; 100], &[HEADER, 99]),
        &|bench| bench.sends_spread(HOST_PORT, 5000, &[1; BUFFER + 1], &[HEADER, BUFFER + 1]),
        &|bench| {
            let header = Header { length: u32::MAX.into(), ..bench.header(Operation::Data, HOST_PORT, 5000) };
            bench.sends_raw(header, &[], &[HEADER]);
        },
        // What cannot come now.
        &|bench| bench.says(Operation::Request, HOST_PORT, 5000),
        &|bench| bench.says(Operation::Response, HOST_PORT, 5000),
        &|bench| {
            let header = Header { operation: 99.into(), ..bench.header(Operation::Data, HOST_PORT, 5000) };
            bench.sends_raw(header, &[], &[HEADER]);
        },
        &|bench| {
            let header = Header { kind: 2.into(), ..bench.header(Operation::Credit, HOST_PORT, 5000) };
            bench.sends_raw(header, &[], &[HEADER]);
        },
        &|bench| {
            bench.shuts_down(HOST_PORT, 5000, 2);
            bench.sends(HOST_PORT, 5000, b"after all");
        },
    ];
    for wrong in wrong {
        let mut bench = Bench::new();
        let mut program = bench.open(5000);
        wrong(&mut bench);
        bench.hears_one(Operation::Reset);
        assert_eq!(program.read(&mut [0; 8]).unwrap(), 0);
        assert_eq!(bench.work.table().len(), 0);
    }
}

#[test]
fn more_than_there_is_room_for_resets_the_connection() {
    let mut bench = Bench::new();
    let mut program = bench.open(5000);
    bench.fill(&mut program, 5000);
    bench.sends(HOST_PORT, 5000, &[0; BUFFER]);
    assert_eq!(bench.hears_but(Operation::Credit)[0].0.operation.get(), Operation::Reset as u16);
    assert_eq!(bench.work.table().len(), 0);
}

#[test]
fn answer_to_what_has_not_been_asked_yet_is_none() {
    let mut bench = Bench::without_buffers();
    let mut program = bench.asks(5000, b"");
    bench.says(Operation::Response, HOST_PORT, 5000);
    assert_eq!(program.read(&mut [0; 8]).unwrap(), 0);
    bench.offers(2, 100);
    bench.hears_one(Operation::Reset);
}

#[test]
fn flood_of_what_has_to_be_answered_waits_until_the_guest_takes_answers() {
    let mut bench = Bench::without_buffers();
    let mut used = 0;
    for number in 0..RESETS_MAX as u32 + 100 {
        bench.says(Operation::Credit, 1, number);
        used += bench.rings[1].used().len();
    }
    assert_eq!(used, RESETS_MAX);
    let mut heard = 0;
    while heard < RESETS_MAX + 100 {
        bench.offers(10, 100);
        let packets = bench.hears().len();
        assert!(packets > 0);
        heard += packets;
    }
    assert_eq!(used + bench.rings[1].used().len(), RESETS_MAX + 100);
    assert_eq!(bench.hears(), []);
}

#[test]
fn guest_that_connects_for_ever_gets_so_many_and_room_again_when_some_end() {
    let mut bench = Bench::new();
    let service = bench.service(SERVICE);
    let mut programs = Vec::new();
    let mut answers = |bench: &mut Bench, number: u32| {
        bench.says(Operation::Request, SERVICE, number);
        programs.extend(service.accept().map(|(program, _)| program));
        let (answer, _) = bench.hears().pop().unwrap();
        answer.operation.get() == Operation::Response as u16
    };
    for number in 0..CONNECTIONS_MAX as u32 {
        assert!(answers(&mut bench, number), "{number}");
    }
    for number in 0..10 {
        assert!(!answers(&mut bench, 10_000 + number));
    }
    assert_eq!(bench.work.table().len(), CONNECTIONS_MAX);
    // A program of the host has to wait, and comes in when one ends.
    let mut waiting = std::os::unix::net::UnixStream::connect(&bench.config.socket).unwrap();
    waiting.write_all(b"CONNECT 1\n").unwrap();
    bench.drive();
    assert_eq!(bench.hears(), []);
    bench.says(Operation::Reset, SERVICE, 7);
    bench.hears_one(Operation::Request);
    assert!(!answers(&mut bench, 20_000));
    // Its programs end, it does not confirm that, and connects all the same.
    programs.clear();
    bench.drive();
    bench.hears();
    bench.says(Operation::Request, SERVICE, 30_000);
    let (program, _) = service.accept().unwrap();
    let answers: Vec<u16> = bench.hears().iter().map(|(header, _)| header.operation.get()).collect();
    assert_eq!(answers, [Operation::Reset as u16, Operation::Response as u16]);
    drop(program);
    assert_eq!(bench.work.table().len(), CONNECTIONS_MAX);
}

#[test]
fn guest_that_opens_and_resets_without_taking_answers_leaves_nothing_behind() {
    let mut bench = Bench::without_buffers();
    let service = bench.service(SERVICE);
    for number in 0..200 {
        bench.says(Operation::Request, SERVICE, number);
        service.accept().unwrap();
        bench.says(Operation::Reset, SERVICE, number);
        assert_eq!(bench.work.table().len(), 0);
    }
    bench.offers(10, 100);
    assert_eq!(bench.hears(), []);
}

#[test]
fn chain_that_is_no_packet_is_given_back() {
    let mut bench = Bench::new();
    let end = ANYWHERE.end;
    let chains: [&[Part]; 5] = [
        &[readable(ANYWHERE.start, 43)],
        &[readable(end, 44)],
        &[readable(u64::MAX - 3, 100)],
        &[writable(ANYWHERE.start, 1000)],
        &[readable(ANYWHERE.start, 44), readable(ANYWHERE.start, u32::MAX)],
    ];
    for chain in chains {
        bench.rings[1].offer(chain);
    }
    bench.says(Operation::Reset, 1, 2);
    assert_eq!(bench.rings[1].used().len(), chains.len() + 1);
    assert_eq!(bench.hears(), []);
}

fn any_part() -> impl Strategy<Value = Part> {
    let address = prop_oneof![ANYWHERE, any::<u64>()];
    let length = prop_oneof![0..300u32, Just(44), Just(4096), any::<u32>()];
    (address, length, any::<bool>()).prop_map(|(address, length, writable)| Part { address, length, writable })
}

/// What a guest or a program does next.
#[derive(Clone, Debug)]
enum Step {
    Packet {
        operation: u16,
        kind: u16,
        host: u32,
        guest: u32,
        flags: u32,
        buffer: u32,
        forwarded: u32,
        data: usize,
        lie: u32,
    },
    Chain {
        ring: usize,
        parts: Vec<Part>,
    },
    Offer {
        count: usize,
        size: u32,
    },
    Ask {
        port: u32,
    },
    Write {
        program: usize,
        length: usize,
    },
    Read {
        program: usize,
    },
    Close {
        program: usize,
    },
}

fn any_step() -> impl Strategy<Value = Step> {
    let host = prop_oneof![3 => HOST_PORT..HOST_PORT + 4, 2 => Just(SERVICE), 1 => any::<u32>()];
    let number = || prop_oneof![Just(0), 0..5000u32, Just(65_536), any::<u32>()];
    let lie = prop_oneof![8 => Just(0), 1 => any::<u32>()];
    let packet = (0..9u16, prop_oneof![9 => Just(1u16), 1 => any::<u16>()], host, 0..4u32, 0..4u32, number(), number());
    prop_oneof![
        8 => (packet, 0..70_000usize, lie).prop_map(
            |((operation, kind, host, guest, flags, buffer, forwarded), data, lie)| Step::Packet {
                operation, kind, host, guest, flags, buffer, forwarded, data, lie,
            }
        ),
        1 => (0..3usize, prop::collection::vec(any_part(), 1..5)).prop_map(|(ring, parts)| Step::Chain { ring, parts }),
        2 => (1..5usize, 40..5000u32).prop_map(|(count, size)| Step::Offer { count, size }),
        2 => (0..4u32).prop_map(|port| Step::Ask { port }),
        2 => (0..8usize, 0..70_000usize).prop_map(|(program, length)| Step::Write { program, length }),
        1 => (0..8usize).prop_map(|program| Step::Read { program }),
        1 => (0..8usize).prop_map(|program| Step::Close { program }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever they do, the thread comes to rest, and holds no more than it may.
    #[test]
    fn any_steps_leave_the_thread_working(steps in prop::collection::vec(any_step(), 0..60)) {
        let mut bench = Bench::without_buffers();
        let service = bench.service(SERVICE);
        let mut programs = Vec::new();
        for step in steps {
            let wanted = |program: usize, programs: &Vec<_>| program % programs.len().max(1);
            match step {
                Step::Packet { operation, kind, host, guest, flags, buffer, forwarded, data, lie } => {
                    let header = Header {
                        operation: operation.into(),
                        kind: kind.into(),
                        flags: flags.into(),
                        buffer: buffer.into(),
                        forwarded: forwarded.into(),
                        length: (data as u32 ^ lie).into(),
                        ..bench.header(Operation::Data, host, guest)
                    };
                    bench.sends_raw(header, &vec![7; data], &[HEADER, data]);
                }
                Step::Chain { ring, parts } => {
                    bench.rings[ring].offer(&parts);
                    bench.offers_events(0);
                }
                Step::Offer { count, size } => bench.offers(count, size),
                Step::Ask { port } => programs.push(bench.asks(port, b"more")),
                Step::Write { program, length } => {
                    let program = wanted(program, &programs);
                    if let Some(program) = programs.get_mut(program) {
                        let _gone_or_full = program.write(&vec![9; length]);
                    }
                }
                Step::Read { program } => {
                    let program = wanted(program, &programs);
                    if let Some(program) = programs.get_mut(program) {
                        let _gone_or_empty = program.read(&mut [0; 9000]);
                    }
                }
                Step::Close { program } => {
                    let program = wanted(program, &programs);
                    if program < programs.len() {
                        programs.remove(program);
                    }
                }
            }
            programs.extend(service.accept().into_iter().map(|(program, _)| {
                program.set_nonblocking(true).unwrap();
                program
            }));
            bench.drive();
            prop_assert!(bench.work.table().len() <= CONNECTIONS_MAX);
        }
        let mut bench = bench.pause();
        bench.drive();
    }

    /// Nor do rings of which every byte is the driver's.
    #[test]
    fn any_rings_leave_the_thread_working(seed in prop::collection::vec(any::<u8>(), 64)) {
        let mut bench = Bench::without_buffers();
        let bytes: Vec<u8> = seed.iter().cycle().copied().take(RING_SIZE as usize * 3).collect();
        bench.memory.write_slice(&bytes, GuestAddress(RING_SIZE)).unwrap();
        let _program = bench.asks(1, b"");
        bench.kick_all();
    }
}
