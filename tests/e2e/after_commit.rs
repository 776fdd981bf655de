//! What goes wrong after the point of no return costs no guest its memory, and never concerns the others.
use anyhow::{Context, Result, ensure};
use tests::architecture::Architecture;
use tests::guests::{Guest, Running, await_beats};
use tests::host::{Host, HostConfig, PATIENCE, Process, Side};
use tests::link::SHARE;
use tests::operator::{self, Update};

on_each_architecture![a_guest_is_not_given_to_a_host_whose_processor_lacks_what_it_was_promised];
on_one_architecture! {
    aarch64,
    a_vm_whose_process_always_dies_is_kept_until_somebody_tries_again_and_the_other_runs
    vms_that_can_never_be_restored_are_kept_until_they_are_given_up_and_the_other_runs
    nothing_is_restored_twice_and_a_host_that_booted_afresh_says_so
    an_update_that_nobody_has_finished_is_finished_before_another
    memory_that_a_restore_may_not_have_stays_where_it_is_until_it_may
}

fn two_oracles(host: &mut Host) -> Result<[Running; 2]> {
    let mut guests = [Guest::oracle("first", 64).start(host)?, Guest::oracle("second", 64).start(host)?];
    await_beats(host, &mut guests, 2)?;
    Ok(guests)
}

fn a_vm_whose_process_always_dies_is_kept_until_somebody_tries_again_and_the_other_runs(
    architecture: Architecture,
) -> Result<()> {
    Host::with(HostConfig::new("killed-always", architecture, 1024)?, |host| {
        let [mut first, mut second] = two_oracles(host)?;
        let faults = [1, 2, 3, 4, 5, 6].map(|attempt| format!("vm.machine-built/first=kill@{attempt}")).join(",");
        let append = format!("KHO_VMM_FAULT={faults}");
        let update = Update { append: &append, ..Update::default() };
        let (restored, ended) = operator::live_update(host, Side::Newer, &update)?;
        ensure!(ended.code == Some(operator::KEPT) && restored.result == "kept", "{ended}");
        let vm = restored.vm("first")?;
        ensure!(vm.state == "kept" && vm.attempts == 3 && vm.reason.is_some(), "{vm:?}");
        second.await_beats(host, 3)?;
        expect_kept(host, "first")?;
        // Whatever kills it is not mended yet.
        let said = host.run(&["vmm", "restore", "first", "--json"])?;
        ensure!(said.code == Some(operator::KEPT) && said.stdout.contains("6 attempts"), "{said}");
        let said = host.run(&["vmm", "stop", "first"])?;
        ensure!(said.code == Some(1) && said.stderr.contains("vmm discard first"), "{said}");
        expect_rescue(host, "first", true)?;
        expect_kept(host, "first")?;
        host.run(&["vmm", "restore", "first"])?.success()?;
        await_beats(host, std::slice::from_mut(&mut first), 2)?;
        // Now nobody keeps anything, and the next update finds both.
        let said = host.run(&["vmm", "restore", "first"])?;
        ensure!(said.code == Some(1) && said.stderr.contains("no VM is kept"), "{said}");
        operator::live_update_of_all(host, Side::Older, &Update::default())?;
        await_beats(host, &mut [first, second], 2)
    })
}

fn vms_that_can_never_be_restored_are_kept_until_they_are_given_up_and_the_other_runs(
    architecture: Architecture,
) -> Result<()> {
    Host::with(HostConfig::new("flipped", architecture, 1024)?, |host| {
        let [first, mut second] = two_oracles(host)?;
        let mut third = Guest::oracle("third", 64).start(host)?;
        third.await_beats(host, 1)?;
        let env = [("KHO_VMM_FAULT", "update.document-written/first=flip,update.preserved/third=flip")];
        let (restored, ended) = operator::live_update(host, Side::Newer, &Update { env: &env, ..Update::default() })?;
        ensure!(ended.code == Some(operator::KEPT) && restored.result == "kept", "{ended}");
        let vm = restored.vm("first")?;
        let reason = vm.reason.as_deref().unwrap_or_default();
        ensure!(vm.state == "kept" && reason.contains("checksum"), "{vm:?}");
        ensure!(vm.attempts <= 1, "a document that can never be accepted was tried again: {vm:?}");
        let vm = restored.vm("third")?;
        let reason = vm.reason.as_deref().unwrap_or_default();
        ensure!(vm.state == "kept" && reason.contains("cannot retrieve file"), "{vm:?}");
        second.await_beats(host, 3)?;
        for name in ["first", "third"] {
            expect_kept(host, name)?;
        }
        expect_rescue(host, "first", false)?;
        // Whoever restores does so as long as there is something to restore.
        let said = host.run(&["vmm", "restore", "--all"])?;
        ensure!(said.code == Some(1) && said.stderr.contains("vmm list"), "{said}");
        for guest in [first, third] {
            guest.check_unharmed()?;
            host.run(&["vmm", "discard", &guest.guest.name])?.success()?;
        }
        host.wait_until("the host to be ready for another update", PATIENCE, |host| {
            let said = host.run(&["vmm", "check"])?;
            Ok((said.code == Some(0) && !said.stdout.contains("first")).then_some(()))
        })?;
        let names = operator::list(host)?;
        ensure!(names.len() == 1 && names[0]["name"] == "second", "{names:?}");
        second.await_beats(host, 1)
    })
}

fn a_guest_is_not_given_to_a_host_whose_processor_lacks_what_it_was_promised(architecture: Architecture) -> Result<()> {
    // Parameters that make a kernel say that its processor has less than it has, and how that is told.
    let (append, told) = match architecture {
        Architecture::X86_64 => ("clearcpuid=adx", "the processor lacks features that the guest was given: leaf 0x7.0"),
        Architecture::Aarch64 => ("arm64.nobti", "ID_AA64PFR1_EL1"),
    };
    Host::with(HostConfig::new("lacking", architecture, 1024)?, |host| {
        let mut oracle = Guest::oracle("oracle", 64).start(host)?;
        oracle.await_beats(host, 1)?;
        let (restored, ended) = operator::live_update(host, Side::Newer, &Update { append, ..Update::default() })?;
        ensure!(ended.code == Some(operator::KEPT), "{ended}");
        let vm = restored.vm("oracle")?;
        ensure!(vm.state == "kept" && vm.reason.as_deref().is_some_and(|reason| reason.contains(told)), "{vm:?}");
        ensure!(vm.attempts <= 1, "a processor stays what it is: {vm:?}");
        expect_rescue(host, "oracle", true)?;
        oracle.check_unharmed()
    })
}

fn memory_that_a_restore_may_not_have_stays_where_it_is_until_it_may(architecture: Architecture) -> Result<()> {
    /// Enough for one of the guests, and for what restores.
    const SCRIPT: &str = "cd /sys/fs/cgroup && echo +memory > cgroup.subtree_control && mkdir small && cd small && \
        echo 110M > memory.max && echo $$ > cgroup.procs && exec vmm restore --all --json";
    Host::with(HostConfig::new("not-allowed", architecture, 1024)?, |host| {
        let mut guests = two_oracles(host)?;
        unrestored(host, Side::Newer)?;
        let restore = host.spawn(&["sh", "-c", SCRIPT])?;
        let ended = host.wait(&restore)?;
        let restored = operator::restored(&ended)?;
        ensure!(ended.code == Some(operator::KEPT) && restored.vms.len() == 2, "{ended}");
        let kept: Vec<_> = restored.vms.iter().filter(|vm| vm.state == "kept").collect();
        let [vm] = kept.as_slice() else { anyhow::bail!("not one is kept: {ended}") };
        let reason = vm.reason.as_deref().unwrap_or_default();
        ensure!(reason.contains("/sys/fs/cgroup/small") && reason.contains("memory.max"), "{vm:?}");
        let said = host.run(&["vmm", "restore", &vm.name])?;
        ensure!(said.code == Some(operator::KEPT) && said.stdout.contains("memory.max"), "{said}");
        host.write("/sys/fs/cgroup/small/memory.max", "max")?;
        host.run(&["vmm", "restore", &vm.name])?.success()?;
        await_beats(host, &mut guests, 2)
    })
}

fn nothing_is_restored_twice_and_a_host_that_booted_afresh_says_so(architecture: Architecture) -> Result<()> {
    Host::with(HostConfig::new("nothing", architecture, 1024)?, |host| {
        let said = host.run(&["vmm", "restore", "--all", "--json"])?;
        ensure!(said.code == Some(operator::NOTHING_HANDED_OVER), "{said}");
        ensure!(operator::restored(&said)?.result == "nothing", "{said}");
        let mut oracle = Guest::oracle("oracle", 64).start(host)?;
        oracle.await_beats(host, 2)?;
        operator::live_update_of_all(host, Side::Newer, &Update::default())?;
        let pid = operator::pid(host, "oracle")?;
        let said = host.run(&["vmm", "restore", "--all", "--json"])?;
        ensure!(said.code != Some(0), "a second restore found something: {said}");
        oracle.await_beats(host, 2)?;
        ensure!(operator::pid(host, "oracle")? == pid, "another process runs the VM now");
        Ok(())
    })
}

fn an_update_that_nobody_has_finished_is_finished_before_another(architecture: Architecture) -> Result<()> {
    Host::with(HostConfig::new("unfinished", architecture, 1024)?, |host| {
        let mut oracle = Guest::oracle("oracle", 64).start(host)?;
        oracle.await_beats(host, 2)?;
        unrestored(host, Side::Newer)?;
        expect_told(host, "warning", "vmm restore --all")?;
        let process = start_unrestored(host, Side::Older)?;
        let said = host.wait(&process)?;
        ensure!(said.code == Some(1) && said.stderr.contains("had not been restored"), "{said}");
        host.wait_until("the VM to run", PATIENCE, |host| {
            let list = operator::list(host)?;
            Ok(list.iter().any(|vm| vm["name"] == "oracle" && vm["state"] == "running").then_some(()))
        })?;
        oracle.await_beats(host, 2)
    })
}

/// An update to a kernel under which nobody restores by himself.
fn start_unrestored(host: &mut Host, to: Side) -> Result<Process> {
    let (kernel, initrd, line) = (Host::image(to), format!("{SHARE}/initrd"), host.command_line().to_owned());
    host.spawn(&["vmm", "update", "--kernel", &kernel, "--initrd", &initrd, "--append", &line])
}

/// The same, until it has happened.
fn unrestored(host: &mut Host, to: Side) -> Result<()> {
    let boots = host.boots();
    start_unrestored(host, to)?;
    host.await_boot(boots + 1)?;
    host.arrived(to)
}

/// An operator who asks is told of the last update, and what to do.
fn expect_told(host: &mut Host, verdict: &str, help: &str) -> Result<()> {
    let said = host.run(&["vmm", "check"])?;
    let mut lines = said.stdout.lines().skip_while(|line| !line.contains("last-update"));
    let told = lines.next().is_some_and(|line| line.starts_with(verdict));
    ensure!(told && lines.next().is_some_and(|line| line.contains(help)), "{said}");
    Ok(())
}

/// Its memory is there still, and the operator is told why.
fn expect_kept(host: &mut Host, name: &str) -> Result<()> {
    let list = operator::list(host)?;
    let vm = list.iter().find(|vm| vm["name"] == name).with_context(|| format!("{name} is not among {list:?}"))?;
    ensure!(vm["state"] == "kept", "{vm}");
    expect_told(host, "NOT OK", "vmm list")?;
    // Shared memory of the guest's size, which no process maps.
    let bytes = host.memory("Shmem")?;
    ensure!(bytes >= 128 << 20, "{bytes} bytes of shared memory are too few for two guests of 64 MiB");
    Ok(())
}

/// All that is left of it can be written to a disk.
fn expect_rescue(host: &mut Host, name: &str, with_document: bool) -> Result<()> {
    let file = format!("/run/{name}.core");
    let said = host.run(&["vmm", "rescue", name, "--to", &file, "--json"])?.success()?;
    let result = operator::result_line(&said.stdout)?;
    ensure!(result["memory_bytes"] == 64 << 20 && result["document_error"].is_null() == with_document, "{said}");
    let counted = host.run(&["wc", "-c", &file])?.success()?.stdout;
    let size: u64 = counted.split_whitespace().next().context("nothing was counted")?.parse()?;
    ensure!(size > 64 << 20, "{size} bytes are less than the guest's memory");
    let again = host.run(&["vmm", "rescue", name, "--to", &file])?;
    ensure!(again.code == Some(1) && again.stderr.contains("is there already"), "{again}");
    host.run(&["rm", &file])?.success()?;
    Ok(())
}
