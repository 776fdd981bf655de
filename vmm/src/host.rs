//! What concerns the host: its VMs as a whole, its kernel, and the verbs an operator uses.

pub mod check;
pub mod clock;
pub mod control_group;
pub mod digest;
pub mod inspect;
pub mod kcore;
pub mod kept;
pub mod kexec;
pub mod memory_shortage;
pub mod proof;
pub mod report;
pub mod rescue;
pub mod restore;
pub mod run;
pub mod signals;
pub mod update;
pub mod verbs;
