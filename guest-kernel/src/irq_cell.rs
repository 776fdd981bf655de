//! A value that one CPU's interrupt handlers and its main loop share: whoever uses it has interrupts off.

use core::cell::UnsafeCell;

/// See the file's comment. Where there is one per CPU, each CPU uses its own and no other; where there is one for all, only the
/// first CPU uses it, or writes it before it starts the others.
pub struct IrqCell<T>(UnsafeCell<T>);

// SAFETY: one CPU uses it, and `with` lets nothing interrupt it while the value is borrowed; or nobody writes to it any more.
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

    /// A copy of a value that is not written any more: any CPU may ask for it.
    pub fn get(&self) -> T
    where
        T: Copy,
    {
        // SAFETY: nobody writes to it, so reading is all that is done.
        unsafe { *self.0.get() }
    }
}
