//! The oracle: a guest kernel whose only job is to notice damage.
#![no_std]
#![no_main]

mod arch;
mod console;
mod irq_cell;
mod kept;
mod live;
mod oracle;
mod others;
mod processors;
mod storm;
mod time;

use guest_kernel::options::End;

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    match info.location() {
        Some(at) => console::damage("panic", format_args!("file={} line={}", at.file(), at.line())),
        None => console::damage("panic", format_args!("file=unknown")),
    }
    arch::end(End::PowerOff)
}
