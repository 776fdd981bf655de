//! What carries a VM to the next kernel, and from the process that restores to the process that runs it.

pub mod channel;
pub mod ledger;
pub mod luo;
