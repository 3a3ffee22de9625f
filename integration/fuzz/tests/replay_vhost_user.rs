//! Replays the saved inputs of the target that counts descriptors, in a process of its own.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod corpus;

#[test]
fn saved_messages_of_vmms_hold() {
    corpus::replay("vhost_user");
}
