//! What must survive, what is to come of it, and the tests that make it happen.

/// A fault.
pub struct Row {
    /// What goes wrong.
    pub fault: &'static str,
    /// What is to come of it.
    pub outcome: &'static str,
    /// Binary and name of each test that makes it happen. Names are without the modules that say where a test runs, and `tests`.
    pub tests: &'static [&'static str],
}

const fn row(fault: &'static str, outcome: &'static str, tests: &'static [&'static str]) -> Row {
    Row { fault, outcome, tests }
}

const NEXT_KERNEL: &str =
    "e2e check::next_kernel::a_next_kernel_that_would_lose_the_guests_is_refused_before_any_is_touched";
const THIS_HOST: &str = "e2e check::this_host::a_host_that_is_not_ready_is_told_what_to_do";
const FAULTS_BEFORE: &str = "e2e faults::before_commit::no_fault_at_any_phase_before_the_reboot_harms_a_guest";
const FAULTS_AFTER: &str = "e2e faults::after_commit::no_fault_at_any_phase_after_the_reboot_loses_a_guest";
const FAULTS_AT_RANDOM: &str = "e2e faults::random::random_faults_at_random_phases_lose_no_guest";
const IN_THE_WAY: &str = "e2e before_commit::what_is_in_the_way_of_an_update_is_named_and_guests_run_on";
const UNFINISHED: &str = "e2e after_commit::an_update_that_nobody_has_finished_is_finished_before_another";
const NEVER_RESTORED: &str =
    "e2e after_commit::vms_that_can_never_be_restored_are_kept_until_they_are_given_up_and_the_other_runs";
const ALWAYS_DIES: &str =
    "e2e after_commit::a_vm_whose_process_always_dies_is_kept_until_somebody_tries_again_and_the_other_runs";
const ENDS_MEANWHILE: &str = "e2e faults::endings::a_guest_that_ends_under_an_update_ends_once_and_the_others_go_on";
const ENDINGS: &str = "e2e endings::each_way_a_guest_can_end_has_its_exit_status";
const DISKS: &str = "e2e disks::what_a_guest_writes_is_read_back_after_live_updates_whether_it_was_flushed_or_not";
const LOAD: &str = "e2e load::a_guest_under_every_load_at_once_loses_nothing_in_live_updates";
const NO_TWICE: &str = "e2e after_commit::nothing_is_restored_twice_and_a_host_that_booted_afresh_says_so";

/// All of them, by the time at which they happen.
pub const SECTIONS: [(&str, &[Row]); 3] =
    [("Before commit", &BEFORE_COMMIT), ("After commit", &AFTER_COMMIT), ("Hostile guests, always", &HOSTILE_GUESTS)];

const BEFORE_COMMIT: [Row; 16] = [
    row(
        "next kernel's image missing, unreadable, no kernel, too large for scratch",
        "refused before any guest is touched",
        &[NEXT_KERNEL],
    ),
    row(
        "next kernel has another KHO, LUO or memfd version, or no LIVEUPDATE; its command line lacks `kho=on liveupdate=on`",
        "refused before any guest is touched, with both versions",
        &[NEXT_KERNEL, "vmm host::check::next_kernel::another_version_of_any_format_is_refused"],
    ),
    row(
        "next kernel has another page size or architecture",
        "refused before any guest is touched",
        &[NEXT_KERNEL, "vmm host::check::next_kernel::an_unknown_page_size_is_a_warning_and_another_a_failure"],
    ),
    row(
        "`/dev/liveupdate` busy or absent, an earlier update not finished",
        "refused, with who holds it where that can be told",
        &[THIS_HOST, UNFINISHED],
    ),
    row("a session's name is taken", "refused with the name, undone", &[IN_THE_WAY]),
    row(
        "not enough free memory to fill the holes in guests' memory",
        "refused with the bytes needed and free",
        &[THIS_HOST, "vmm host::check::machines::holes_must_fit_into_what_is_free"],
    ),
    row(
        "a guest's memory has other seals, is in huge pages (hugetlb), or vm.memfd_noexec forbids what it is made with",
        "refused with the remedy",
        &[
            THIS_HOST,
            "vmm memory::ram_can_neither_grow_nor_shrink",
            "vmm memory::memfd_of_other_size_place_or_seals_is_refused",
        ],
    ),
    row("one of several VMs fails to prepare or to freeze, or takes too long", "all undone", &[FAULTS_BEFORE]),
    row(
        "a VM's process is killed in prepare, in freeze, after freeze",
        "all undone, the others run on",
        &[FAULTS_BEFORE],
    ),
    row(
        "`vmm update` is killed in any phase (SIGTERM, SIGINT, SIGKILL)",
        "all undone, VMs notice it by themselves",
        &[FAULTS_BEFORE, FAULTS_AT_RANDOM, "vmm control::server::vm_runs_on_when_the_update_dies_frozen"],
    ),
    row("the reboot call fails", "all undone", &[FAULTS_BEFORE]),
    row("disk full, read-only `/run`, a VM's socket gone", "undone or refused, or it does not matter", &[IN_THE_WAY]),
    row(
        "a guest writes, kicks queues, resets itself, powers off, triple-faults during prepare and freeze",
        "the update goes on, each takes effect once, on one side",
        &[ENDS_MEANWHILE, LOAD, "vmm vm::lifecycle::every_event_leads_where_the_table_says_or_nowhere"],
    ),
    row(
        "I/O in flight at freeze",
        "drained before the document is written; nothing acknowledged is lost, nothing is done twice",
        &[
            DISKS,
            LOAD,
            "vmm device::virtio::block::stopped_disk_has_nothing_in_flight_and_goes_on_with_what_was_left_in_the_queue",
        ],
    ),
    row("data that a guest has written and not flushed, at freeze", "on the disk before commit", &[DISKS]),
    row(
        "balloon or free page report while memory is preserved",
        "deferred or forgotten, the guest sees no error",
        &[
            "e2e balloon::a_guest_gives_memory_back_through_live_updates_and_gets_it_again",
            "vmm device::virtio::balloon::what_is_put_in_while_held_is_given_back_after_the_release_unless_it_was_taken_out",
            "vmm device::virtio::balloon::report_while_held_is_forgotten_as_the_guest_may_use_the_memory_at_once",
        ],
    ),
];

const AFTER_COMMIT: [Row; 12] = [
    row(
        "a VM's process dies before its first KVM_RUN, or the process that restores it dies at any time",
        "started again from the same memory; after three tries kept and reported, the others run",
        &[FAULTS_AFTER, FAULTS_AT_RANDOM, ALWAYS_DIES],
    ),
    row(
        "document truncated, a bit flipped, too long, of another version or architecture",
        "that VM refused with the reason, its memory kept, the others run",
        &[
            NEVER_RESTORED,
            "contract damage::every_single_bit_flip_is_refused",
            "contract damage::a_truncation_at_any_length_is_refused",
            "contract damage::a_body_truncated_at_any_length_before_it_was_sealed_is_refused",
            "contract hostile::another_version_is_refused_in_every_node",
            "contract hostile::a_foreign_architecture_is_refused",
            "contract layout::a_body_beyond_the_cap_is_not_sealed",
        ],
    ),
    row(
        "document well formed and hostile",
        "refused, memory kept",
        &[
            "contract damage::random_bytes_in_a_good_seal_are_refused",
            "contract damage::changes_in_a_good_seal_are_refused_or_make_another_machine",
            "contract hostile::ram_that_overlaps_is_refused",
            "contract hostile::ram_that_overflows_is_refused",
            "contract hostile::registers_that_contradict_themselves_are_refused",
            "contract hostile::device_words_and_queue_numbers_that_cannot_be_are_refused",
            "vmm device::virtio::balloon::state_that_is_not_of_this_ram_is_refused",
        ],
    ),
    row(
        "a memfd with memory missing, of another size, or under a token that nobody knows",
        "refused, what exists is kept",
        &[NEVER_RESTORED, "vmm memory::memfd_of_other_size_place_or_seals_is_refused"],
    ),
    row(
        "the processor's features or the counter's frequency differ from the document's",
        "refused with the difference before the guest runs; TSC scaling where there is some",
        &[
            "e2e after_commit::a_guest_is_not_given_to_a_host_whose_processor_lacks_what_it_was_promised",
            "vmm arch::x86_64::cpuid::lost_feature_is_named_and_a_gained_one_is_none",
            "vmm arch::x86_64::vcpu::tsc_frequencies_of_one_processor_differ_by_an_estimate_only",
            "vmm arch::aarch64::counter::only_the_counter_that_ran_on_is_accepted",
        ],
    ),
    row(
        "disk image missing, another one, or locked by somebody else",
        "refused, memory kept; a retry works once it is there",
        &[
            "e2e disks::an_image_in_use_is_refused_to_a_second_vm_and_a_swapped_one_to_its_own",
            "vmm device::virtio::block::image::other_image_than_before_is_refused_with_what_differs",
        ],
    ),
    row(
        "tap, socket or folder of a backend missing",
        "refused, memory kept; a retry works once it is there",
        &[
            "e2e network::a_tap_in_use_is_refused_to_a_second_vm_and_a_vm_whose_tap_is_missing_is_kept_while_others_run",
            "e2e vsock::a_vm_whose_socket_has_no_folder_is_refused_and_kept_until_it_has_one",
        ],
    ),
    row(
        "`vmm restore --all` twice, or while another one runs",
        "the second refuses, no guest runs twice",
        &[NO_TWICE, NEVER_RESTORED],
    ),
    row(
        "a restore in a control group with too little `memory.max`",
        "found out before anything is retrieved",
        &["e2e after_commit::memory_that_a_restore_may_not_have_stays_where_it_is_until_it_may"],
    ),
    row("a restored guest triple-faults", "stopped and reported, never started anew", &[ENDINGS]),
    row(
        "a second, third, tenth live update of the same guest",
        "like the first",
        &["e2e generations::the_tenth_live_update_of_a_host_is_like_the_first"],
    ),
    row(
        "the host boots afresh instead",
        "`vmm restore` says that nothing was handed over, with a status of its own",
        &[NO_TWICE],
    ),
];

const HOSTILE_GUESTS: [Row; 7] = [
    row(
        "descriptors that go in circles, without end, past memory; tables in tables; any rings",
        "the device refuses the request or asks for a reset, and works on",
        &[
            "vmm device::virtio::block::no_descriptors_bring_the_disk_down_or_change_its_size",
            "vmm device::virtio::block::no_ring_brings_the_disk_down",
            "vmm device::virtio::net::any_chains_leave_the_thread_working",
            "vmm device::virtio::net::any_rings_leave_the_thread_working",
            "vmm device::virtio::balloon::any_chains_leave_the_thread_working",
            "vmm device::virtio::vsock::hostile::any_rings_leave_the_thread_working",
        ],
    ),
    row(
        "queues of no size, an odd one or too large a one; outside of memory; changed after they were set up; kicks on none",
        "the device asks for a reset, which helps",
        &[
            "vmm device::virtio::mmio::queue_outside_of_memory_or_of_odd_size_makes_the_device_ask_for_a_reset_and_a_reset_helps",
            "vmm device::virtio::mmio::no_access_of_a_guest_makes_the_transport_panic",
        ],
    ),
    row(
        "features that were not offered, a status that goes back",
        "not agreed to",
        &["vmm device::virtio::mmio::features_that_were_not_offered_or_no_modern_interface_are_not_agreed_to"],
    ),
    row(
        "accesses of odd widths, to addresses where nothing is, past the end of the configuration",
        "read as nothing, written to nowhere",
        &[
            "vmm device::virtio::mmio::no_access_of_a_guest_makes_the_transport_panic",
            "vmm bus::access_reaches_the_device_that_covers_the_address_and_no_other",
            "vmm device::virtio::block::configuration_space_has_the_capacity_and_an_end",
        ],
    ),
    row(
        "floods on the serial port",
        "the oldest output is dropped and counted, the guest does not wait",
        &[
            "vmm device::serial::of_more_than_is_kept_the_oldest_is_dropped_and_counted",
            "vmm device::serial::full_backend_does_not_stop_the_guest",
            "e2e console::a_console_is_left_and_found_again_with_all_that_was_said",
        ],
    ),
    row(
        "floods on the vsock and the network",
        "limited, and answered when the guest takes the answers",
        &[
            "vmm device::virtio::vsock::hostile::flood_of_what_has_to_be_answered_waits_until_the_guest_takes_answers",
            "vmm device::virtio::vsock::hostile::guest_that_connects_for_ever_gets_so_many_and_room_again_when_some_end",
            "vmm device::virtio::net::frame_waits_in_the_tap_until_the_guest_has_a_buffer",
        ],
    ),
    row(
        "a guest that is damaged, and says so",
        "it is seen; what this project's own guest finds is what the other rows rest on",
        &["e2e endings::damage_does_not_go_unnoticed"],
    ),
];
