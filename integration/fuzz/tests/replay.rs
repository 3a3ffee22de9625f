//! Replays the saved inputs of every target but the one that counts descriptors.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod corpus;

#[test]
fn saved_commands_hold() {
    corpus::replay("command");
}

#[test]
fn saved_lives_hold() {
    corpus::replay("controlq");
}

#[test]
fn saved_lines_to_the_control_socket_hold() {
    corpus::replay("control_socket");
}
