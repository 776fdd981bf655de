//! A value that the interrupt handlers and the main loop share on one CPU: whoever uses it has interrupts off.

use core::cell::UnsafeCell;

/// See the file's comment.
pub struct IrqCell<T>(UnsafeCell<T>);

// SAFETY: there is one CPU, and `with` lets nothing interrupt it while the value is borrowed.
unsafe impl<T: Send> Sync for IrqCell<T> {}

impl<T> IrqCell<T> {
    pub const fn new(value: T) -> Self {
        IrqCell(UnsafeCell::new(value))
    }

    /// Uses the value. Not to be nested on the same cell.
    pub fn with<R>(&self, work: impl FnOnce(&mut T) -> R) -> R {
        crate::arch::interrupts_off(|| {
            // SAFETY: one CPU, interrupts off, and no caller nests: this is the only reference.
            let value = unsafe { &mut *self.0.get() };
            work(value)
        })
    }
}
