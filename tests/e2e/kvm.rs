//! The monitor's unit tests in the lab's host: those that need the kernel's own KVM, or its page map, can run nowhere else.
use anyhow::{Context, Result, ensure};
use std::fs;
use tests::architecture::Architecture;
use tests::host::{Host, HostConfig};
use tests::products;

on_each_architecture![the_monitors_unit_tests_pass_where_there_is_kvm];

fn the_monitors_unit_tests_pass_where_there_is_kvm(architecture: Architecture) -> Result<()> {
    let program = products::unit_tests(architecture)?;
    // A VM's memory is never unmapped, and all tests are one process here: what each of them has had adds up.
    Host::with(HostConfig::new("kvm", architecture, 4096)?, |host| {
        fs::copy(&program, host.local("vmm-tests")).context("cannot copy the unit tests")?;
        // One at a time: vCPUs of several tests on an emulated host would make each other's deadlines meaningless. All others have
        // been run already, and much faster.
        let said = host.run(&["/share/vmm-tests", "--ignored", "--test-threads=1"])?.success()?;
        let summary = said.stdout.lines().find(|line| line.starts_with("test result")).context("no summary")?;
        eprintln!("{summary}");
        ensure!(!summary.contains(" 0 passed") && summary.contains(" 0 ignored"), "no test was run: {said}");
        Ok(())
    })
}
