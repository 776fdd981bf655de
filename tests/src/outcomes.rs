//! `tests/FAULTS.md`: everything that must survive, the tests that make it happen, and what has become of each on both architectures,
//! from what the test runner has written down.
mod rows;

use crate::architecture::Architecture;
use crate::paths;
use anyhow::{Context, Result, ensure};
use rows::{Row, SECTIONS};
use roxmltree::Document;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::PathBuf;

/// Modules that say where a test runs, or that it is one.
const MODULES: [&str; 4] = ["long", "second", "full", "tests"];

/// What has become of a test, the worst last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    Passed,
    NotRun,
    Failed,
}

impl Outcome {
    fn in_words(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::NotRun => "not run",
            Self::Failed => "**failed**",
        }
    }
}

/// What has become of tests on an architecture, by their names.
#[derive(Debug, Default)]
pub struct Outcomes(BTreeMap<(String, &'static str), Outcome>);

impl Outcomes {
    /// Takes in what the test runner has just written down of programs that ran on an architecture.
    pub fn take(&mut self, runs_on: Architecture) -> Result<()> {
        let report = report();
        let text = fs::read_to_string(&report).with_context(|| format!("cannot read {}", report.display()))?;
        self.add_text(&text, runs_on).with_context(|| format!("cannot understand {}", report.display()))?;
        // So that it is never taken for that of a later run.
        fs::remove_file(&report).with_context(|| format!("cannot remove {}", report.display()))
    }

    /// Tests whose name has an architecture's run in a host of that; others where their program runs.
    fn add_text(&mut self, text: &str, runs_on: Architecture) -> Result<()> {
        let document = Document::parse(text)?;
        for test in document.descendants().filter(|node| node.has_tag_name("testcase")) {
            let attribute = |name| test.attribute(name).with_context(|| format!("a test has no {name}"));
            let binary = attribute("classname")?.rsplit("::").next().unwrap_or_default().trim_start_matches("bin/");
            let is_e2e = binary == "e2e";
            let of = |segment: &str| Architecture::ALL.iter().find(|one| is_e2e && one.name() == segment);
            let name = attribute("name")?;
            let architecture = name.split("::").find_map(of).copied().unwrap_or(runs_on);
            let left_out = |segment: &&str| MODULES.contains(segment) || of(segment).is_some();
            let short: Vec<_> = name.split("::").filter(|segment| !left_out(segment)).collect();
            let failed = test.children().any(|node| node.has_tag_name("failure") || node.has_tag_name("error"));
            let outcome = if failed { Outcome::Failed } else { Outcome::Passed };
            self.0.insert((format!("{binary} {}", short.join("::")), architecture.name()), outcome);
        }
        Ok(())
    }

    fn of(&self, test: &str, architecture: Architecture) -> Outcome {
        self.0.get(&(test.to_owned(), architecture.name())).copied().unwrap_or(Outcome::NotRun)
    }

    /// The table. A row's outcome is that of its worst test. `before` is the table that has the outcomes on the architectures that
    /// this run has left out.
    fn table(&self, ran: &[Architecture], before: &str) -> String {
        let mut text = String::from(
            "# What must survive, and what has become of it\n\
             Written by `cargo xtask test --full`, for the architectures that it ran on. Each test makes the fault of its row happen\n\
             and checks what has come of it. Those of `e2e` do so with real guests on a real kernel's KVM, KHO and LUO, in the lab's\n\
             hosts; those of `vmm` and `contract` (kho-abi's) take a part by itself. Rows are in `tests/src/outcomes/rows.rs`.\n",
        );
        for (title, rows) in SECTIONS {
            let _ = write!(text, "\n## {title}\n| fault | what comes of it | tests |");
            for architecture in Architecture::ALL {
                let _ = write!(text, " {} |", architecture.name());
            }
            text.push_str("\n|---|---|---|");
            text.push_str(&"---|".repeat(Architecture::ALL.len()));
            text.push('\n');
            for row in rows {
                let beginning = beginning(row);
                let old = before.lines().find_map(|line| line.strip_prefix(&beginning)).unwrap_or_default();
                let mut old = old.split_terminator('|').map(str::trim);
                text.push_str(&beginning);
                for &architecture in Architecture::ALL {
                    let old = old.next();
                    let outcome = if ran.contains(&architecture) {
                        let tests = row.tests.iter().filter(|test| concerns(test, architecture));
                        tests.map(|test| self.of(test, architecture)).max().unwrap_or(Outcome::NotRun).in_words()
                    } else {
                        old.unwrap_or(Outcome::NotRun.in_words())
                    };
                    let _ = write!(text, " {outcome} |");
                }
                text.push('\n');
            }
        }
        text
    }

    /// Writes the table: to its place in the repository after a run that leaves out no test of these architectures, else beside what
    /// was built.
    pub fn write(&self, ran: &[Architecture], complete: bool) -> Result<PathBuf> {
        self.check_names(ran)?;
        let committed = committed();
        let before = fs::read_to_string(&committed).with_context(|| format!("cannot read {}", committed.display()))?;
        let path = if complete { committed } else { paths::target().join("FAULTS.md") };
        fs::write(&path, self.table(ran, &before)).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    /// A test that has another name now would be missing silently.
    fn check_names(&self, ran: &[Architecture]) -> Result<()> {
        let known = |test: &str| self.0.keys().any(|(name, _)| name == test);
        let all = SECTIONS.iter().flat_map(|(_, rows)| rows.iter()).flat_map(|row| row.tests);
        let expected = all.filter(|test| ran.iter().any(|&architecture| concerns(test, architecture)));
        let unknown: Vec<_> = expected.filter(|test| !known(test)).collect();
        ensure!(unknown.is_empty(), "no tests are called {unknown:?}, of which tests/src/outcomes/rows.rs tells");
        Ok(())
    }
}

/// What is only in programs of another architecture is not missing in those of this one.
fn concerns(test: &str, architecture: Architecture) -> bool {
    let others = Architecture::ALL.iter().filter(|other| **other != architecture);
    others.into_iter().all(|other| !test.contains(&format!(" arch::{}::", other.name())))
}

/// A row without its outcomes.
fn beginning(row: &Row) -> String {
    let tests: Vec<_> = row.tests.iter().map(|test| format!("`{test}`")).collect();
    format!("| {} | {} | {} |", row.fault, row.outcome, tests.join("<br>"))
}

/// Where the table is kept.
fn committed() -> PathBuf {
    paths::workspace().join("tests/FAULTS.md")
}

/// Where the test runner writes what has become of its tests: `store.dir`, its profile, and `junit.path` in `.config/nextest.toml`.
/// It is in the workspace wherever cargo builds, and each run overwrites it.
fn report() -> PathBuf {
    paths::workspace().join("target/nextest/default/junit.xml")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rows_outcome_is_that_of_its_worst_test_where_it_ran() {
        let mut outcomes = Outcomes::default();
        let report = r#"<?xml version="1.0"?><testsuites><testsuite name="tests::e2e">
            <testcase name="disks::x86_64::one" classname="tests::e2e"/>
            <testcase name="disks::long::second::aarch64::one" classname="tests::e2e"><failure type="x"/></testcase>
            </testsuite><testsuite name="vmm::bin/vmm">
            <testcase name="arch::aarch64::gic::tests::two" classname="vmm::bin/vmm"/></testsuite></testsuites>"#;
        outcomes.add_text(report, Architecture::X86_64).unwrap();
        let found = |test, architecture| outcomes.of(test, architecture);
        assert_eq!(found("e2e disks::one", Architecture::X86_64), Outcome::Passed);
        assert_eq!(found("e2e disks::one", Architecture::Aarch64), Outcome::Failed);
        assert_eq!(found("vmm arch::aarch64::gic::two", Architecture::X86_64), Outcome::Passed);
        assert_eq!(found("vmm arch::aarch64::gic::two", Architecture::Aarch64), Outcome::NotRun);
        assert!(Outcome::Failed > Outcome::NotRun && Outcome::NotRun > Outcome::Passed);
        assert!(outcomes.check_names(&[Architecture::X86_64]).is_err());
    }

    #[test]
    fn outcomes_on_an_architecture_that_was_left_out_stay() {
        let cells = |table: &str| -> Vec<(String, String)> {
            let rows = table.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| fault |"));
            rows.map(|line| {
                let mut cells = line.rsplit('|').skip(1).map(|cell| cell.trim().to_owned());
                let (aarch64, x86_64) = (cells.next().unwrap(), cells.next().unwrap());
                (x86_64, aarch64)
            })
            .collect()
        };
        let (mut first, test) = (Outcomes::default(), SECTIONS[0].1[0].tests[0].to_owned());
        first.0.insert((test, "x86_64"), Outcome::Passed);
        let before = first.table(&[Architecture::X86_64], "");
        let after = Outcomes::default().table(&[Architecture::Aarch64], &before);
        assert_eq!(cells(&before)[0], ("passed".to_owned(), "not run".to_owned()));
        assert_eq!(cells(&after), cells(&before));
        let forgotten = Outcomes::default().table(&[Architecture::X86_64], &before);
        assert_eq!(cells(&forgotten)[0].0, "not run");
    }

    #[test]
    fn the_table_in_the_repository_has_the_rows_of_today_and_no_others() {
        let table = fs::read_to_string(committed()).unwrap();
        let rows: Vec<_> = SECTIONS.iter().flat_map(|(_, rows)| rows.iter()).map(beginning).collect();
        let lines: Vec<_> =
            table.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| fault |")).collect();
        assert_eq!(lines.len(), rows.len());
        for (line, row) in lines.iter().zip(&rows) {
            assert!(
                line.starts_with(row),
                "write the row as it is in tests/src/outcomes/rows.rs, or run `cargo xtask test --full`: {line}"
            );
        }
    }
}
