//! A device between programs of a host and a driver that these tests play: what each sees of the other.

mod bench;
mod hostile;
mod live_update;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;

use self::bench::{Bench, GUEST_BUFFER, HOST_PORT, SERVICE};
use super::packet::{NO_RECEIVE, NO_SEND, Operation};
use super::room::BUFFER;

fn text(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at % 251) as u8 ^ (at >> 8) as u8).collect()
}

#[test]
fn program_reaches_a_port_of_the_guest_and_both_hear_each_other() {
    let mut bench = Bench::new();
    let mut program = bench.program();
    program.write_all(b"CONNECT 5000\nhello, ").unwrap();
    bench.drive();
    let (request, _) = bench.hears_one(Operation::Request);
    assert_eq!((request.source_cid.get(), request.destination_cid.get()), (2, 3));
    assert_eq!((request.source_port.get(), request.destination_port.get()), (1 << 30, 5000));
    assert_eq!((request.buffer.get() as usize, request.forwarded.get()), (BUFFER, 0));
    // Nothing before the guest has agreed.
    program.write_all(b"guest").unwrap();
    bench.drive();
    assert_eq!(bench.hears(), []);
    assert_eq!(program.read(&mut [0; 64]).unwrap_err().kind(), ErrorKind::WouldBlock);

    bench.says(Operation::Response, 1 << 30, 5000);
    bench.expect(&mut program, b"OK 1073741824\n");
    assert_eq!(bench.hears_data(), b"hello, guest");
    bench.sends(1 << 30, 5000, b"hello, host");
    bench.expect(&mut program, b"hello, host");
    // The next one has a port of its own.
    let _other = bench.asks(5000, b"");
    assert_eq!(bench.hears_one(Operation::Request).0.source_port.get(), (1 << 30) + 1);
}

#[test]
fn line_that_comes_in_pieces_is_understood_and_one_that_is_none_ends_the_connection() {
    let mut bench = Bench::new();
    let mut program = bench.program();
    for piece in [&b"CON"[..], b"NECT 77", b"\n"] {
        assert_eq!(bench.hears(), []);
        program.write_all(piece).unwrap();
        bench.drive();
    }
    assert_eq!(bench.hears_one(Operation::Request).0.destination_port.get(), 77);
    for wrong in [&b"CONNECT\n"[..], b"CONNECT x\n", b"GET / HTTP/1.1\n", &[b'x'; 32]] {
        let mut program = bench.program();
        program.write_all(wrong).unwrap();
        bench.drive();
        // What has not been read when a socket is closed makes an error of its end.
        let read = program.read(&mut [0; 8]).or_else(|error| match error.kind() {
            ErrorKind::ConnectionReset => Ok(0),
            _ => Err(error),
        });
        assert_eq!(read.unwrap(), 0, "{wrong:?}");
    }
    drop(bench.program());
    bench.drive();
    assert_eq!((bench.hears(), bench.work.table().len()), (vec![], 1));
}

#[test]
fn guest_reaches_the_program_that_has_the_port_and_no_other() {
    let mut bench = Bench::new();
    let service = bench.service(SERVICE);
    bench.says(Operation::Request, SERVICE, 1025);
    let (response, _) = bench.hears_one(Operation::Response);
    assert_eq!((response.source_port.get(), response.destination_port.get()), (SERVICE, 1025));
    let mut program = bench.accepted(&service);
    bench.sends(SERVICE, 1025, b"ping");
    bench.expect(&mut program, b"ping");
    program.write_all(b"pong").unwrap();
    bench.drive();
    assert_eq!(bench.hears_data(), b"pong");

    bench.says(Operation::Request, SERVICE + 1, 1026);
    let (reset, _) = bench.hears_one(Operation::Reset);
    assert_eq!((reset.source_port.get(), reset.destination_port.get()), (SERVICE + 1, 1026));
    assert_eq!(bench.work.table().len(), 1);
}

#[test]
fn program_whose_port_the_guest_does_not_have_is_hung_up_on() {
    let mut bench = Bench::new();
    let mut program = bench.asks(9, b"");
    bench.hears_one(Operation::Request);
    bench.says(Operation::Reset, HOST_PORT, 9);
    assert_eq!(program.read(&mut [0; 8]).unwrap(), 0);
    assert_eq!((bench.hears(), bench.work.table().len()), (vec![], 0));
}

#[test]
fn data_to_the_guest_waits_for_its_room_and_arrives_whole() {
    let mut bench = Bench::new();
    let mut program = bench.open(5000);
    let sent = text(5 * GUEST_BUFFER as usize + 77);
    let (mut written, mut received) = (0, Vec::new());
    let mut asked = 0;
    while received.len() < sent.len() {
        while let Ok(count) = program.write(&sent[written..]) {
            written += count;
            if count == 0 {
                break;
            }
        }
        bench.drive();
        let before = received.len();
        for (header, data) in bench.hears() {
            match Operation::of(header.operation.get()) {
                Some(Operation::CreditRequest) => asked += 1,
                other => assert_eq!(other, Some(Operation::Data)),
            }
            received.extend(data);
        }
        assert!(received.len() - bench.forwarded as usize <= GUEST_BUFFER as usize);
        if received.len() == before {
            // An answer that nothing has changed brings nothing, not even another question.
            bench.says(Operation::Credit, HOST_PORT, 5000);
            assert_eq!(bench.hears(), []);
            bench.forwarded = received.len() as u32;
            bench.says(Operation::Credit, HOST_PORT, 5000);
        }
    }
    assert_eq!(received, sent);
    assert!((4..=6).contains(&asked), "{asked}");
}

#[test]
fn data_from_the_guest_waits_for_a_slow_program_and_arrives_whole() {
    let mut bench = Bench::new();
    let mut program = bench.open(5000);
    let sent = text(1 << 20);
    let (mut at, mut told) = (0, 0);
    let mut received = Vec::new();
    while received.len() < sent.len() {
        // As much as the device says that it has room for.
        let room = (BUFFER - (at - told)).min(sent.len() - at);
        for piece in sent[at..at + room].chunks(40_000) {
            bench.sends(HOST_PORT, 5000, piece);
        }
        at += room;
        let mut piece = [0; 9000];
        received.extend(program.read(&mut piece).ok().map(|count| piece[..count].to_vec()).unwrap_or_default());
        bench.drive();
        for (header, _) in bench.hears() {
            assert_eq!(Operation::of(header.operation.get()), Some(Operation::Credit));
            told = header.forwarded.get() as usize;
        }
    }
    assert_eq!(received, sent);
}

#[test]
fn packet_spread_over_many_buffers_is_one() {
    let mut bench = Bench::new();
    let mut program = bench.open(5000);
    let sent = text(60_000);
    for pieces in [&[44, 4096, 4096, 30_000, 21_808][..], &[10, 30, 4, 60_000], &[60_044], &[1; 3]] {
        bench.sends_spread(HOST_PORT, 5000, &sent, pieces);
        if pieces.iter().sum::<usize>() == sent.len() + 44 {
            bench.expect(&mut program, &sent);
        }
    }
    assert_eq!(program.read(&mut [0; 8]).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert_eq!(bench.hears_but(Operation::Credit), []);
}

#[test]
fn program_that_closes_is_heard_out_and_the_guest_confirms() {
    let mut bench = Bench::new();
    let mut program = bench.open(5000);
    program.write_all(&text(10_000)).unwrap();
    drop(program);
    bench.drive();
    let mut heard = bench.hears_but(Operation::Credit);
    let (last, _) = heard.pop().unwrap();
    assert_eq!((last.operation.get(), last.flags.get()), (Operation::Shutdown as u16, NO_SEND | NO_RECEIVE));
    let data: Vec<u8> = heard.into_iter().flat_map(|(_, data)| data).collect();
    assert_eq!(data, text(10_000));
    // What the guest still sends is nobody's.
    bench.sends(HOST_PORT, 5000, b"too late");
    assert_eq!((bench.hears(), bench.work.table().len()), (vec![], 1));
    bench.says(Operation::Reset, HOST_PORT, 5000);
    assert_eq!((bench.hears(), bench.work.table().len()), (vec![], 0));
}

#[test]
fn program_that_only_stops_sending_still_receives() {
    let mut bench = Bench::new();
    let mut program = bench.open(5000);
    program.write_all(b"question").unwrap();
    program.shutdown(Shutdown::Write).unwrap();
    bench.drive();
    let heard = bench.hears();
    assert_eq!(heard[0].1, b"question");
    assert_eq!((heard[1].0.operation.get(), heard[1].0.flags.get()), (Operation::Shutdown as u16, NO_SEND));
    bench.sends(HOST_PORT, 5000, b"answer");
    bench.shuts_down(HOST_PORT, 5000, NO_SEND | NO_RECEIVE);
    bench.expect(&mut program, b"answer");
    assert_eq!(program.read(&mut [0; 8]).unwrap(), 0);
    bench.hears_one(Operation::Reset);
    assert_eq!(bench.work.table().len(), 0);
}

#[test]
fn guest_that_closes_is_heard_out_by_a_slow_program() {
    for reset in [false, true] {
        let mut bench = Bench::new();
        let mut program = bench.open(5000);
        bench.fill(&mut program, 5000);
        let waiting = text(30_000);
        bench.sends(HOST_PORT, 5000, &waiting);
        bench.shuts_down(HOST_PORT, 5000, NO_SEND | NO_RECEIVE);
        assert_eq!(bench.hears_but(Operation::Credit), []);
        if reset {
            // It does not wait for us to confirm.
            bench.says(Operation::Reset, HOST_PORT, 5000);
        }
        let received = bench.read_to_end(&mut program);
        assert!(received.ends_with(&waiting));
        assert_eq!(bench.hears_but(Operation::Credit).len(), usize::from(!reset));
        assert_eq!(bench.work.table().len(), 0);
    }
}

#[test]
fn guest_that_stops_sending_still_receives() {
    let mut bench = Bench::new();
    let mut program = bench.open(5000);
    bench.sends(HOST_PORT, 5000, b"question");
    bench.shuts_down(HOST_PORT, 5000, NO_SEND);
    bench.expect(&mut program, b"question");
    assert_eq!(program.read(&mut [0; 8]).unwrap(), 0);
    program.write_all(b"answer").unwrap();
    drop(program);
    bench.drive();
    assert_eq!(bench.hears_data(), b"answer");
    bench.shuts_down(HOST_PORT, 5000, NO_SEND | NO_RECEIVE);
    bench.hears_one(Operation::Reset);
}

#[test]
fn guest_that_resets_ends_it_at_once() {
    let mut bench = Bench::new();
    let mut program = bench.open(5000);
    bench.says(Operation::Reset, HOST_PORT, 5000);
    assert_eq!(program.read(&mut [0; 8]).unwrap(), 0);
    assert_eq!((bench.hears(), bench.work.table().len()), (vec![], 0));
}

#[test]
fn guest_that_asks_for_room_is_told() {
    let mut bench = Bench::new();
    let mut program = bench.open(5000);
    bench.sends(HOST_PORT, 5000, b"some");
    bench.expect(&mut program, b"some");
    assert_eq!(bench.hears(), []);
    bench.says(Operation::CreditRequest, HOST_PORT, 5000);
    let (credit, _) = bench.hears_one(Operation::Credit);
    assert_eq!((credit.buffer.get() as usize, credit.forwarded.get()), (BUFFER, 4));
}

#[test]
fn packets_wait_until_the_guest_has_buffers_and_share_them() {
    let mut bench = Bench::without_buffers();
    let mut programs: Vec<_> = (0..3).map(|number| bench.asks(5000 + number, b"")).collect();
    assert_eq!(bench.hears(), []);
    bench.offers(3, 100);
    assert_eq!(bench.hears().len(), 3);
    for (number, program) in programs.iter_mut().enumerate() {
        bench.says(Operation::Response, HOST_PORT + number as u32, 5000 + number as u32);
        program.write_all(&text(500)).unwrap();
    }
    // One that is too small for anything is given back.
    bench.offers(1, 44);
    bench.offers(6, 100);
    let mut heard: Vec<u32> = bench.hears().iter().map(|(header, _)| header.destination_port.get()).collect();
    heard.sort_unstable();
    assert_eq!(heard, [5000, 5000, 5001, 5001, 5002, 5002]);
}
