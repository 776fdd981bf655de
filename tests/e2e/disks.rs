//! Disks: what a guest has written is there after a live update, flushed or not; and no image has two users, or becomes another.
use anyhow::{Result, ensure};
use tests::architecture::Architecture;
use tests::guests::Guest;
use tests::host::{Host, HostConfig, Side};
use tests::link::SHARE;
use tests::operator::{self, Update};

on_each_architecture![what_a_guest_writes_is_read_back_after_live_updates_whether_it_was_flushed_or_not];
on_one_architecture! { aarch64, an_image_in_use_is_refused_to_a_second_vm_and_a_swapped_one_to_its_own }

const MIB: u32 = 16;

fn what_a_guest_writes_is_read_back_after_live_updates_whether_it_was_flushed_or_not(
    architecture: Architecture,
) -> Result<()> {
    Host::with(HostConfig::new("disks", architecture, 1024)?.with_disk(MIB), |host| {
        let guest = Guest::linux("writer", 192).with("lab.disk=vda lab.rng=1");
        let mut guest = guest.option("disk", "/dev/vda").flag("rng").start(host)?;
        guest.await_beats(host, 3)?;
        for side in [Side::Newer, Side::Older] {
            operator::live_update_of_all(host, side, &Update::default())?;
            // The guest looks for everything itself, its own page cache dropped: a difference is damage.
            guest.await_beats(host, 3)?;
        }
        host.run(&["vmm", "stop", "writer"])?.success()?;
        guest.log.read_on()?;
        guest.check_unharmed()?;
        // A line is said only when its record is there for good.
        let said = guest.log.beats;
        let read = format!("dd if=/dev/vda bs=512 skip=8193 count={said} 2>/dev/null | tr -d '\\0'");
        let found = host.run(&["sh", "-c", &read])?.success()?;
        let expected: String = (1..=said).map(|number| format!("record {number}\n")).collect();
        ensure!(found.stdout == expected, "the guest has said {said} lines, and the image has: {found}");
        Ok(())
    })
}

fn an_image_in_use_is_refused_to_a_second_vm_and_a_swapped_one_to_its_own(architecture: Architecture) -> Result<()> {
    Host::with(HostConfig::new("disks-refused", architecture, 1024)?, |host| {
        let image = format!("{SHARE}/disk.img");
        let size = format!("{MIB}M");
        host.run(&["truncate", "-s", &size, &image])?.success()?;
        let mut guest = Guest::oracle("owner", 64).option("disk", &image).start(host)?;
        guest.await_beats(host, 2)?;
        let second = Guest::oracle("second", 64).option("disk", &image).start(host)?;
        let said = host.wait(&second.process)?;
        ensure!(said.code == Some(1) && said.stderr.contains("such as another VM, uses it"), "{said}");
        guest.await_beats(host, 2)?;
        // The guest goes on with the file that it has, wherever that is now.
        host.run(&["mv", &image, &format!("{image}.old")])?.success()?;
        host.run(&["truncate", "-s", &size, &image])?.success()?;
        let (restored, ended) = operator::live_update(host, Side::Newer, &Update::default())?;
        ensure!(ended.code == Some(operator::KEPT) && restored.result == "kept", "{ended}");
        let vm = restored.vm("owner")?;
        let reason = vm.reason.as_deref().unwrap_or_default();
        ensure!(vm.state == "kept" && reason.contains("not the one that the guest was using"), "{vm:?}");
        ensure!(vm.attempts <= 1, "an image that is another stays another: {vm:?}");
        guest.check_unharmed()?;
        host.run(&["mv", &format!("{image}.old"), &image])?.success()?;
        host.run(&["vmm", "restore", "owner"])?.success()?;
        guest.await_beats(host, 2)
    })
}
