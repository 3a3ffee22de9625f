//! First process of a test guest. As pid 1 it mounts, loads modules, starts itself again as the server of the command
//! channel, and reaps orphans; when the server ends, it switches the guest off.
//!
//! What goes wrong is written to the console, of which the host shows the tail.

mod init;
mod serve;

use std::process::ExitCode;

fn main() -> ExitCode {
    let server = std::env::args().nth(1).is_some_and(|argument| argument == init::SERVE);
    let result = if server { serve::run() } else { init::run() };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest-runner: {error}");
            ExitCode::FAILURE
        }
    }
}
