//! Memory that is handed over is charged to whoever retrieves it. Where a control group does not let it have that much, the kernel gives
//! up the file half way, and what was in it is lost. So it is asked for before.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::host::control_group;
use crate::host::report;

/// What this process may still be charged with.
#[derive(Debug, Default)]
pub struct Allowance(Mutex<Granted>);

#[derive(Debug, Default)]
struct Granted {
    /// How many are retrieving.
    count: usize,
    /// The group that allows the least, and what is left of it. It was asked when nobody was retrieving: as long as somebody is,
    /// nobody can tell which part of what was granted has been charged already.
    left: Option<(PathBuf, u64)>,
}

/// Memory may be retrieved, as long as this is there.
#[derive(Debug)]
pub struct Grant<'allowance>(&'allowance Allowance);

impl Allowance {
    /// Asks for so many bytes; says why not.
    pub fn grant(&self, bytes: u64) -> Result<Grant<'_>, String> {
        self.grant_of(bytes, || control_group::least_left(Path::new("/proc/self")))
    }

    fn grant_of(&self, bytes: u64, least_left: impl FnOnce() -> Option<(PathBuf, u64)>) -> Result<Grant<'_>, String> {
        let mut granted = self.lock();
        if granted.count == 0 {
            granted.left = least_left();
        }
        if let Some((group, left)) = &mut granted.left {
            *left = left.checked_sub(bytes).ok_or_else(|| {
                let [needed, left] = [bytes, *left].map(report::bytes);
                format!(
                    "its memory of {needed} would be charged to the control group {}, which has {left} left: nothing was \
                     touched, raise its memory.max",
                    group.display()
                )
            })?;
        }
        granted.count += 1;
        Ok(Grant(self))
    }

    fn lock(&self) -> MutexGuard<'_, Granted> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Grant<'_> {
    fn drop(&mut self) {
        self.0.lock().count -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_granted_is_not_granted_again_until_it_is_charged() {
        let allowance = Allowance::default();
        let left = |bytes| move || Some((PathBuf::from("/sys/fs/cgroup/small"), bytes));
        let first = allowance.grant_of(6, left(10)).unwrap();
        let refused = allowance.grant_of(6, left(10)).unwrap_err();
        assert!(refused.contains("/sys/fs/cgroup/small") && refused.contains("memory.max"), "{refused}");
        let second = allowance.grant_of(4, left(10)).unwrap();
        drop((first, second));
        // What is charged shows in what is left.
        assert!(allowance.grant_of(6, left(0)).is_err());
        assert!(allowance.grant_of(6, left(6)).is_ok());
    }

    #[test]
    fn whoever_is_not_limited_may_have_all() {
        let allowance = Allowance::default();
        let first = allowance.grant_of(u64::MAX, || None).unwrap();
        assert!(allowance.grant_of(u64::MAX, || None).is_ok());
        drop(first);
    }
}
