//! PID 1 of the lab's host: see `tests::init`. As any other process it is a terminal, see `tests::init::terminal`, or holds a session,
//! see `tests::init::session`.
use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        tests::init::main()
    }
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let words: Vec<_> = arguments.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["session", name] => tests::init::session::main(name),
        [socket, typed, said] => tests::init::terminal::main(socket, typed, said),
        _ => {
            eprintln!("usage: init SOCKET FIFO LOG, or init session NAME");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
