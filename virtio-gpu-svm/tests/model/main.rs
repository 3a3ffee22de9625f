//! The race of fault, answer, invalidation, unmap, exit and reset, of pages asked for ahead and of fences, under
//! schedules of shuttle's choice, on the software GPU as it is: core, scheduler and page table are the library's own sources (`virtio-gpu-svm-model`), engines are
//! threads of the schedule, and they may be held up with a translation in hand.
//!
//! A model guest owns pages with tags, and lets a page go only when PROTOCOL allows it; then it fills it with a canary.
//! A canary that is gone, a result that nobody of the process wrote, a job that fails without cause, without an end, with
//! two or out of its turn, a fault without an outcome, a wait that nobody ends: each is a violation. `seeded_*` put an error into core or guest and fail unless
//! the same checks find it.
//!
//! `SVM_SCHEDULES=n` asks for n schedules over all scenarios (10^5 where nothing is said), `SVM_SEED=n` for others.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod ahead;
mod check;
mod fences;
mod machine;
mod process;
mod scenarios;
mod wire;

use check::{hold, seeded};
use virtio_gpu_svm_model::seeded::Bug;

#[test]
fn answers_and_invalidations_keep_pages_apart() {
    hold("answer against invalidation", scenarios::invalidation, 2);
}
#[test]
fn unmapped_page_is_judged_by_what_stands_there() {
    hold("unmap against fault", scenarios::unmap, 1);
}
#[test]
fn destroyed_context_is_quiet_when_it_has_retired() {
    hold("exit", scenarios::exit, 2);
}
#[test]
fn jobs_are_found_by_engines_that_look() {
    hold("engines that look", scenarios::looking, 1);
}
#[test]
fn new_incarnation_is_told_when_the_old_one_is_quiet() {
    hold("reset", scenarios::reset, 2);
}
#[test]
fn frozen_guest_is_not_touched_and_goes_on() {
    hold("freeze", scenarios::freeze, 1);
}
#[test]
fn both_gpu_vms_of_an_address_space_follow_it() {
    hold("two GPU VMs", scenarios::two_vms, 2);
}
#[test]
fn cut_leaf_leaves_nothing_stale() {
    hold("large leaf", scenarios::large_leaf, 2);
}
#[test]
fn parked_job_translates_again() {
    hold("parked job", scenarios::parked, 1);
}
#[test]
fn throttled_faults_are_all_let_in() {
    hold("throttle", scenarios::throttle, 1);
}
#[test]
fn destroyed_gpu_vm_holds_no_page_beyond_its_invalidation() {
    hold("GPU VM destroyed", scenarios::teardown, 2);
}
#[test]
fn removed_memory_is_not_used_any_more() {
    hold("memory removed", scenarios::unplug, 2);
}
#[test]
fn unreferenced_blob_is_not_used_any_more() {
    hold("unref", scenarios::unref, 2);
}
#[test]
fn jobs_that_cannot_fault_find_what_moves() {
    hold("held", ahead::held, 2);
}
#[test]
fn held_gpu_vm_of_a_frozen_guest_waits_for_both() {
    hold("held, frozen", ahead::held_frozen, 2);
}
#[test]
fn gpu_vm_that_cannot_fault_is_unmapped_beside_its_jobs() {
    hold("held, unmapped", ahead::held_unmapped, 2);
}
#[test]
fn jobs_that_cannot_fault_find_what_changes_beside_them() {
    hold("held, mixed", ahead::held_mixed, 3);
}
#[test]
fn gpu_vm_without_a_page_is_lost_and_holds_nobody() {
    hold("held, lost", ahead::held_lost, 2);
}
#[test]
fn removed_memory_is_replaced_before_jobs_go_on() {
    hold("held, memory removed", ahead::held_unplugged, 2);
}
#[test]
fn large_leaf_is_whole_before_jobs_go_on() {
    hold("held, large leaf", ahead::held_leaf, 1);
}
#[test]
fn prefetch_is_advice() {
    hold("prefetch", ahead::prefetched, 2);
}
#[test]
fn fenced_work_has_its_turn() {
    hold("fences", fences::fences, 2);
}
#[test]
fn points_of_a_destroyed_gpu_vm_are_reached() {
    hold("fences, GPU VM destroyed", fences::fences_destroyed, 2);
}
#[test]
fn fenced_work_ends_with_its_process() {
    hold("fences, exit and reset", fences::fences_cut, 2);
}
#[test]
fn bind_that_cannot_fault_ends_with_its_pages() {
    hold("fences, held", fences::fences_held, 2);
}
#[test]
fn failed_bind_ends_what_is_behind_it() {
    hold("fences, bind fails", fences::fences_failed, 2);
}
#[test]
fn groups_are_answered_in_part() {
    hold("groups", scenarios::groups, 2);
}

#[test]
fn seeded_missing_flush_is_caught() {
    seeded(Bug::SkipFlush, scenarios::invalidation);
}
#[test]
fn seeded_flush_before_zap_is_caught() {
    seeded(Bug::FlushBeforeZap, scenarios::invalidation);
}
#[test]
fn seeded_done_before_flush_is_caught() {
    seeded(Bug::DoneBeforeFlush, scenarios::invalidation);
}
#[test]
fn seeded_stale_answer_is_caught() {
    seeded(Bug::InstallStale, scenarios::invalidation);
}
#[test]
fn seeded_wrong_leaf_is_caught() {
    seeded(Bug::WrongLeaf, scenarios::invalidation);
}
#[test]
fn seeded_early_reuse_of_an_asid_is_caught() {
    seeded(Bug::ReuseAsid, scenarios::exit);
}
#[test]
fn seeded_pin_dropped_before_done_is_caught() {
    seeded(Bug::DropPin, scenarios::invalidation);
}
#[test]
fn seeded_resume_after_teardown_is_caught() {
    seeded(Bug::ResumeAfterTeardown, scenarios::teardown);
}
#[test]
fn seeded_lost_wake_up_is_caught() {
    seeded(Bug::LoseWakeUp, scenarios::throttle);
}
#[test]
fn seeded_zap_of_one_gpu_vm_is_caught() {
    seeded(Bug::ZapOneVm, scenarios::two_vms);
}
#[test]
fn seeded_half_of_a_leaf_left_mapped_is_caught() {
    seeded(Bug::LeaveHalf, scenarios::large_leaf);
}
#[test]
fn seeded_translation_kept_by_a_parked_job_is_caught() {
    seeded(Bug::KeepParked, scenarios::parked);
}
#[test]
fn seeded_queues_stopped_after_the_unbind_are_caught() {
    seeded(Bug::UnbindBeforeHold, ahead::held);
}
#[test]
fn seeded_release_before_the_last_answer_is_caught() {
    seeded(Bug::ReleaseAsked, ahead::held);
}
#[test]
fn seeded_thaw_of_a_held_gpu_vm_is_caught() {
    seeded(Bug::ThawHeld, ahead::held_frozen);
}
#[test]
fn seeded_release_under_stopped_rings_is_caught() {
    seeded(Bug::RunFrozen, ahead::held_frozen);
}
#[test]
fn seeded_bind_of_a_part_of_a_leaf_is_caught() {
    seeded(Bug::BindPart, ahead::held_leaf);
}
#[test]
fn seeded_refusal_of_who_joined_a_prefetch_is_caught() {
    seeded(Bug::RefuseJoined, ahead::prefetched);
}
#[test]
fn seeded_start_behind_an_open_bind_is_caught() {
    seeded(Bug::StartBehindBind, fences::fences_failed);
}
#[test]
fn seeded_skipped_wait_is_caught() {
    seeded(Bug::SkipWait, fences::fences);
}
#[test]
fn seeded_lost_point_of_a_destroyed_gpu_vm_is_caught() {
    seeded(Bug::LosePoint, fences::fences_destroyed);
}
#[test]
fn seeded_waiter_that_is_not_released_is_caught() {
    seeded(Bug::WakeOne, scenarios::groups);
}
#[test]
fn seeded_look_that_is_not_taken_is_caught() {
    seeded(Bug::IgnoreInbox, scenarios::invalidation);
}
#[test]
fn seeded_answer_before_the_last_record_is_caught() {
    seeded(Bug::AnswerEarly, scenarios::groups);
}
