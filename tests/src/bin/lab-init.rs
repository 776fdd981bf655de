//! PID 1 of the lab's host: see `tests::init`.
fn main() {
    tests::init::main()
}
