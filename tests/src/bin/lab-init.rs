//! PID 1 of the lab's host: see `tests::init`. As any other process it is a terminal: see `tests::init::terminal`.
use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        tests::init::main()
    }
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [socket, typed, said] = arguments.as_slice() else {
        eprintln!("usage: init SOCKET FIFO LOG");
        return ExitCode::from(2);
    };
    match tests::init::terminal::main(socket, typed, said) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
