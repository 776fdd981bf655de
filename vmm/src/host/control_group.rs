//! How much memory a process's control groups still let it have.

use std::fs;
use std::path::{Path, PathBuf};

/// The least that the groups of a process let it have, of those that limit it, and which one it is. `process` is its folder in /proc.
pub fn least_left(process: &Path) -> Option<(PathBuf, u64)> {
    let group = group(&fs::read_to_string(process.join("cgroup")).ok()?)?;
    let text = |group: &Path, file: &str| fs::read_to_string(group.join(file)).ok();
    let number = |group: &Path, file: &str| text(group, file)?.trim().parse::<u64>().ok();
    let left = |group: &Path| {
        let limit = number(group, "memory.max")?;
        let cached = text(group, "memory.stat").as_deref().map_or(0, cached);
        let used = number(group, "memory.current").unwrap_or_default().saturating_sub(cached);
        Some((group.to_owned(), limit.saturating_sub(used)))
    };
    group.ancestors().filter_map(left).min_by_key(|(_, left)| *left)
}

/// Where a process's group is in the one hierarchy of version 2.
fn group(text: &str) -> Option<PathBuf> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(Path::new("/sys/fs/cgroup").join(path))
}

/// What of a group's memory the kernel gives up when something else needs it: files that are on a disk, too.
fn cached(stat: &str) -> u64 {
    let is_file = |line: &&str| line.starts_with("active_file ") || line.starts_with("inactive_file ");
    let bytes = |line: &str| line.split_whitespace().nth(1)?.parse::<u64>().ok();
    stat.lines().filter(is_file).filter_map(bytes).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn group_is_found_where_it_is_mounted() {
        assert_eq!(group("1:cpu:/a\n0::/guests/one\n"), Some(PathBuf::from("/sys/fs/cgroup/guests/one")));
        assert_eq!(group("1:cpu:/a\n"), None);
    }

    #[test]
    fn files_that_are_on_a_disk_are_in_nobodys_way() {
        assert_eq!(cached("anon 7\nfile 100\nshmem 50\ninactive_file 30\nactive_file 20\n"), 50);
    }
}
