//! x86_64: the time stamp counter.

/// The raw counter that runs on through a kexec: here the time stamp counter.
pub fn counter() -> u64 {
    // SAFETY: RDTSC is unprivileged, touches no memory and exists on every x86_64 processor.
    unsafe { core::arch::x86_64::_rdtsc() }
}
