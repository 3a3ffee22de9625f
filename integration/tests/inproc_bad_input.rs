//! Bad input over real rings: each row of [`rows`] is one command that must be refused with one errno and must leave
//! everything as it was; afterwards the guest must still work, and nothing may be left behind.
//!
//! The scene: contexts 1 and 2 of one guest, a dead context 3, a blob attached to context 1 only, one fault of context 1
//! that waits for an answer through the whole table, and one that was answered.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "bad_input/rows.rs"]
mod rows;
#[path = "bad_input/scene.rs"]
mod scene;

use rows::Row;
use scene::Scene;
use virtio_gpu_svm::protocol::control::SvmResp;
use virtio_gpu_svm::protocol::errno::{EINVAL, name};
use zerocopy::FromBytes;

/// Sends a row and says what is wrong with what came of it.
fn refused_as_expected(scene: &mut Scene, row: &Row) -> Result<(), String> {
    let before = scene.snapshot();
    let answer = scene.guest.command(&row.command, 4096).map_err(|cause| format!("{cause:#}"))?;
    let (head, _) = SvmResp::read_from_prefix(&answer).map_err(|_| format!("answered with {answer:?}"))?;
    if head.status.get() != -row.errno {
        return Err(format!("status {}, not {}", name(head.status.get()), name(row.errno)));
    }
    let after = scene.snapshot();
    if before != after {
        return Err(format!("changed the daemon's state:\n{before:#}\n{after:#}"));
    }
    Ok(())
}

fn check(rows: impl Fn(&Scene) -> Vec<Row>) {
    let mut scene = Scene::set_up();
    let rows = rows(&scene);
    let mut wrong = vec![];
    for row in &rows {
        if let Err(what) = refused_as_expected(&mut scene, row) {
            wrong.push(format!("{}: {what}", row.name));
        }
    }
    assert!(wrong.is_empty(), "{} of {} rows:\n{}", wrong.len(), rows.len(), wrong.join("\n"));
    scene.finish();
}

#[test]
fn bad_control_commands_are_refused_without_effect() {
    check(rows::control);
}

#[test]
fn bad_pages_and_answers_are_refused_without_effect() {
    check(rows::pages);
}

#[test]
fn bad_requests_of_processes_are_refused_without_effect() {
    check(rows::requests);
}

#[test]
fn commands_cut_or_extended_at_any_byte_are_refused_without_effect() {
    check(|scene| {
        let mut rows = vec![];
        for good in rows::good_commands(scene) {
            for len in 0..good.command.len() {
                let name = format!("{} cut to {len} bytes", good.name);
                rows.push(Row { name, command: good.command[..len].to_vec(), errno: EINVAL });
            }
            for more in [1, 4, 8, 24] {
                let name = format!("{} with {more} bytes more", good.name);
                rows.push(Row { name, command: [&good.command[..], &vec![0; more]].concat(), errno: EINVAL });
            }
        }
        rows
    });
}

#[test]
fn payloads_cut_at_any_byte_are_refused_without_effect() {
    check(|scene| {
        let mut rows = vec![];
        for (name, payload) in rows::good_payloads(scene) {
            for len in 0..payload.len() {
                let name = format!("{name} cut to {len} bytes");
                rows.push(Row { name, command: rows::submit(1, &payload[..len]), errno: EINVAL });
            }
        }
        rows
    });
}

#[test]
fn good_commands_of_these_tables_are_accepted() {
    let mut scene = Scene::set_up();
    for (name, payload) in rows::good_payloads(&scene) {
        let (head, _) = scene.guest.submit(1, &payload, 4096).unwrap();
        assert_eq!(head.status.get(), 0, "{name}");
    }
    for good in rows::good_commands(&scene) {
        let answer = scene.guest.command(&good.command, 4096).unwrap();
        let (head, _) = SvmResp::read_from_prefix(&answer).unwrap();
        assert_eq!(head.status.get(), 0, "{}", good.name);
    }
}

#[test]
fn responses_never_exceed_the_room_and_short_room_has_the_same_effect() {
    let mut scene = Scene::set_up();
    let good = rows::supply(1, &[scene.run(scene::A2, scene.free_gpa(0), 1)]);
    for room in [0, 1, 23, 24, 25, 47, 48, 49, 63, 64, 65] {
        let answer = scene.guest.command(&good, room).unwrap();
        assert!(answer.len() <= room as usize, "{} bytes in {room}", answer.len());
    }
    scene.finish();
}
