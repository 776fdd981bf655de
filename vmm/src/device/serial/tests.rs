use std::io::Read;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::*;
use crate::device::{Gate, start_event_loop};

/// Registers, and a bit of two of them.
const DATA: u64 = 0;
const INTERRUPT_ENABLE: u64 = 1;
const LINE_STATUS: u64 = 5;
const RECEIVED: u8 = 1;

fn serial(config: &SerialConfig) -> Serial {
    Serial::new(config, EventFd::new(libc::EFD_NONBLOCK).unwrap()).unwrap()
}

/// A port on a socket in a folder of its own, with all that is around it in a VM; and its interrupt, to be waited for.
struct Running {
    serial: Arc<Mutex<Serial>>,
    interrupt: EventFd,
    path: PathBuf,
    _folder: tempfile::TempDir,
}

impl Running {
    fn new(state: Option<&SerialV2>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        let config = SerialConfig::Socket(path.clone());
        let interrupt = EventFd::new(0).unwrap();
        let mut port = Serial::new(&config, interrupt.try_clone().unwrap()).unwrap();
        state.into_iter().for_each(|state| port.restore(state).unwrap());
        let serial = Arc::new(Mutex::new(port));
        start_event_loop(Arc::new(Gate::default()), SerialInput::new(serial.clone(), &config).unwrap()).unwrap();
        Self { serial, interrupt, path, _folder: folder }
    }

    fn say(&self, bytes: &[u8]) {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner).write(DATA, bytes);
    }

    fn attach(&self) -> UnixStream {
        let client = UnixStream::connect(&self.path).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        client
    }

    fn save(&self) -> SerialV2 {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner).save()
    }
}

fn hear(client: &mut UnixStream, count: usize) -> Vec<u8> {
    let mut heard = vec![0; count];
    client.read_exact(&mut heard).unwrap();
    heard
}

/// Bytes that tell where they are.
fn numbered(count: usize) -> Vec<u8> {
    (0..count).map(|at| (at % 251) as u8).collect()
}

#[test]
fn string_output_reaches_the_file_whole() {
    let path = tempfile::tempdir().unwrap().keep().join("log");
    let mut port = serial(&SerialConfig::File(path.clone()));
    assert_eq!(port.write(0, b"hello\n"), None);
    assert_eq!(std::fs::read(&path).unwrap(), b"hello\n");
}

#[test]
fn restored_port_still_holds_its_unread_input() {
    let mut port = serial(&SerialConfig::Off);
    port.uart.enqueue_raw_bytes(b"ab").unwrap();
    port.write(7, &[0x5a]);
    let state = port.save();
    let mut other = serial(&SerialConfig::Off);
    other.restore(&state).unwrap();
    assert_eq!(other.save(), state);
    let mut data = [0, 0];
    other.read(0, &mut data);
    assert_eq!(&data, b"ab");
}

#[test]
fn an_interrupt_that_the_guest_has_not_acknowledged_is_raised_again_by_a_restore() {
    let restored = |state: &SerialV2| {
        let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let mut port = Serial::new(&SerialConfig::Off, interrupt.try_clone().unwrap()).unwrap();
        port.restore(state).unwrap();
        (port, interrupt)
    };
    let mut port = serial(&SerialConfig::Off);
    port.write(INTERRUPT_ENABLE, &[RECEIVED]);
    let (_, interrupt) = restored(&port.save());
    assert!(interrupt.read().is_err(), "an interrupt without a cause");
    port.uart.enqueue_raw_bytes(b"a").unwrap();
    let (mut other, interrupt) = restored(&port.save());
    assert_eq!(interrupt.read().unwrap(), 1);
    // And once more, when the next update comes before the guest gets to it.
    let (_, interrupt) = restored(&other.save());
    assert_eq!(interrupt.read().unwrap(), 1);
    let mut data = [0];
    other.read(DATA, &mut data);
    let (_, interrupt) = restored(&other.save());
    assert!(interrupt.read().is_err(), "an interrupt that the guest had acknowledged");
}

#[test]
fn state_with_more_input_than_the_queue_holds_is_refused() {
    let mut port = serial(&SerialConfig::Off);
    let mut state = port.save();
    state.port.in_buffer = vec![0; 1000];
    assert!(matches!(port.restore(&state), Err(SerialError::State(_))));
}

#[test]
fn state_with_output_for_nobody_is_refused_where_there_is_no_socket() {
    let mut port = serial(&SerialConfig::Off);
    let state = SerialV2 { backlog: b"lost".to_vec(), ..port.save() };
    assert!(matches!(port.restore(&state), Err(SerialError::State(_))));
}

#[test]
fn socket_of_a_live_process_is_not_taken_over_but_that_of_a_dead_one_is() {
    let directory = tempfile::tempdir().unwrap();
    let config = SerialConfig::Socket(directory.path().join("s"));
    let first = serial(&config);
    assert!(Serial::new(&config, EventFd::new(0).unwrap()).is_err());
    drop(first);
    serial(&config);
}

#[test]
fn whoever_is_attached_stays_when_another_vm_wants_the_same_socket() {
    let running = Running::new(None);
    let mut client = running.attach();
    running.say(b"a");
    assert_eq!(hear(&mut client, 1), b"a");
    assert!(Serial::new(&SerialConfig::Socket(running.path.clone()), EventFd::new(0).unwrap()).is_err());
    running.say(b"b");
    assert_eq!(hear(&mut client, 1), b"b");
}

#[test]
fn a_file_in_the_place_of_the_socket_is_not_removed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("precious");
    std::fs::write(&path, "content").unwrap();
    assert!(Serial::new(&SerialConfig::Socket(path.clone()), EventFd::new(0).unwrap()).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"content");
}

#[test]
fn full_backend_does_not_stop_the_guest() {
    let mut port = serial(&SerialConfig::File("/dev/full".into()));
    port.write(0, b"lost");
    assert_eq!(port.dropped().load(Ordering::Relaxed), 4);
}

#[test]
fn output_between_two_clients_is_there_for_the_second() {
    let running = Running::new(None);
    running.say(b"before anybody came; ");
    let mut first = running.attach();
    assert_eq!(hear(&mut first, 21), b"before anybody came; ");
    running.say(b"while somebody listened; ");
    assert_eq!(hear(&mut first, 25), b"while somebody listened; ");
    drop(first);
    running.say(b"while nobody did");
    assert_eq!(hear(&mut running.attach(), 16), b"while nobody did");
    assert_eq!(running.save().dropped, 0);
}

#[test]
fn of_more_than_is_kept_the_oldest_is_dropped_and_counted() {
    let running = Running::new(None);
    let said = numbered(backlog::CAPACITY + 1000);
    for part in said.chunks(777) {
        running.say(part);
    }
    let state = running.save();
    assert_eq!((state.backlog.len(), state.dropped), (backlog::CAPACITY, 1000));
    assert!(hear(&mut running.attach(), backlog::CAPACITY) == said[1000..], "what is left is not the newest");
}

#[test]
fn one_write_of_more_than_is_kept_leaves_the_end_of_it() {
    let running = Running::new(None);
    let said = numbered(3 * backlog::CAPACITY + 5);
    running.say(&said);
    let state = running.save();
    assert_eq!(state.dropped, 2 * backlog::CAPACITY as u64 + 5);
    assert!(state.backlog == said[2 * backlog::CAPACITY + 5..], "what is left is not the newest");
}

#[test]
fn a_client_that_stands_still_stops_nothing_and_gets_on_when_it_reads_again() {
    let running = Running::new(None);
    let mut client = running.attach();
    running.say(b"!");
    assert_eq!(hear(&mut client, 1), b"!");
    // More than a socket takes, less than what is kept besides.
    let said = numbered(backlog::CAPACITY / 2);
    for part in said.chunks(100) {
        running.say(part);
    }
    assert!(!running.save().backlog.is_empty(), "it all went to a client that does not read");
    assert!(hear(&mut client, said.len()) == said, "what it reads is not what was said");
    assert_eq!(running.save().dropped, 0);
    for _ in 0..8 {
        running.say(&said);
    }
    assert!(running.save().dropped > 0, "more was kept than may be");
}

#[test]
fn what_nobody_has_read_and_what_was_dropped_live_through_an_update() {
    let running = Running::new(None);
    running.say(&numbered(backlog::CAPACITY));
    running.say(b"and the end");
    let state = running.save();
    let other = Running::new(Some(&state));
    assert_eq!(other.save(), state);
    other.say(b", and more");
    let heard = hear(&mut other.attach(), backlog::CAPACITY);
    assert!(heard.ends_with(b"and the end, and more"), "the end is missing");
    assert_eq!(other.save().dropped, 21);
}

#[test]
fn typing_ahead_waits_until_the_guest_reads_and_arrives_whole() {
    let running = Running::new(None);
    running.serial.lock().unwrap().write(INTERRUPT_ENABLE, &[RECEIVED]);
    let typed = numbered(5000);
    let mut client = running.attach();
    client.write_all(&typed).unwrap();
    // Detached before the guest has read it.
    drop(client);
    let mut read = Vec::new();
    while read.len() < typed.len() {
        running.interrupt.read().unwrap();
        let mut port = running.serial.lock().unwrap();
        let mut byte = [0];
        loop {
            port.read(LINE_STATUS, &mut byte);
            if byte[0] & 1 == 0 {
                break;
            }
            port.read(DATA, &mut byte);
            read.push(byte[0]);
        }
    }
    assert!(read == typed, "something is missing or twice");
}

#[test]
fn a_client_that_has_nothing_to_say_still_hears() {
    let running = Running::new(None);
    let mut client = running.attach();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    for word in [&b"one"[..], b"two", b"three"] {
        running.say(word);
        assert_eq!(hear(&mut client, word.len()), word);
    }
    drop(client);
    running.say(b"four");
    assert_eq!(hear(&mut running.attach(), 4), b"four");
}
