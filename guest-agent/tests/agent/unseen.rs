//! A process whose memory the agent may not look at: it hears so, and what to do.
//!
//! The agent here has no right over other processes (CAP_SYS_PTRACE), and the process lets nobody look who has none. A test
//! starts itself again as each.

use crate::broker::Served;
use crate::hostile::{EACCES, Session, hello, this_test};
use guest_agent::agent::AgentOptions;
use guest_agent::client::Client;
use rustix::process::{DumpableBehavior, geteuid, set_dumpable_behavior};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

/// Where the agent listens, in the environment of the process.
const SOCKET: &str = "SVM_TEST_SOCKET";
/// A user without any right.
const NOBODY: u32 = 65534;

fn ask(path: &Path) {
    set_dumpable_behavior(DumpableBehavior::NotDumpable).unwrap();
    let session = Session::silent(path);
    assert_eq!(session.status(&hello(0), &[]), Some(EACCES));
    assert!(session.hear().is_none(), "told, and no more");
    let said = Client::connect(path).unwrap_err().to_string();
    assert!(said.starts_with("HELLO: EACCES") && said.contains("CAP_SYS_PTRACE"), "{said}");
    // That is all that was amiss.
    set_dumpable_behavior(DumpableBehavior::Dumpable).unwrap();
    assert_eq!(Client::connect(path).unwrap().devices().unwrap().len(), 2);
}

#[test]
fn process_whose_memory_the_agent_may_not_look_at_hears_so() {
    const TEST: &str = "unseen::process_whose_memory_the_agent_may_not_look_at_hears_so";
    if let Some(path) = std::env::var_os(SOCKET).map(PathBuf::from) {
        return ask(&path);
    }
    let passed = |command: &mut std::process::Command| {
        let output = command.output().unwrap();
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && stdout.contains("1 passed"), "{output:?}");
    };
    if geteuid().is_root() {
        return passed(this_test(TEST).uid(NOBODY).gid(NOBODY));
    }
    let served = Served::new(AgentOptions::default());
    passed(this_test(TEST).env(SOCKET, served.socket()));
}
