//! The load that runs inside a Linux guest: see `tests::load`.
fn main() -> std::process::ExitCode {
    tests::load::main()
}
