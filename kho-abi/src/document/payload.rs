//! Raw kernel structs between kernels that disagree about their size.
//!
//! A kernel may have grown a struct since the document was written, or not yet have done so. New fields are made such
//! that zero means "as before", so a shorter payload is extended by zeros. A longer one is accepted only where all
//! that this kernel does not know is zero: anything else is state that would be lost.

use alloc::vec::Vec;

use super::PayloadError;

/// `bytes` as a struct of `size` bytes.
///
/// # Errors
/// When `bytes` is longer and has anything but zeros beyond `size`.
pub fn fit(bytes: &[u8], size: usize) -> Result<Vec<u8>, PayloadError> {
    if let Some(tail) = bytes.get(size..)
        && let Some(position) = tail.iter().position(|&byte| byte != 0)
    {
        return Err(PayloadError { expected: size, found: bytes.len(), offset: size + position });
    }
    let mut fitted = bytes.to_vec();
    fitted.resize(size, 0);
    Ok(fitted)
}
