//! svmctl: the operator's command for a running svmd.
//!
//! Each command is one method of the control socket; `client` carries it, `show` prints its result. Exit status: 0 done,
//! 1 the daemon refused (or the output cannot be written), 2 the command line is wrong, 3 the daemon cannot be reached.

mod cli;
mod client;
mod show;
mod table;
mod units;

use clap::Parser;
use cli::{Cli, Command};
use client::{Client, Error};
use serde_json::{Map, Value};
use std::io::{self, Write};
use std::process::ExitCode;

/// Parameters of a method.
type Params = Map<String, Value>;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has seen enough.
        Err(Error::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("svmctl: {error}");
            ExitCode::from(error.exit_status())
        }
    }
}

fn run(cli: &Cli) -> Result<(), Error> {
    // The command line is checked in full before the daemon is troubled.
    let (method, params) = cli.command.request()?;
    let mut client = Client::connect(&cli.socket)?;
    let result = client.call(&method, params)?;
    if let Command::Events { .. } = cli.command {
        return follow(cli, &mut client);
    }
    print(&if cli.json { format!("{result}\n") } else { show::result(&cli.command, &result) })
}

/// Prints events until the daemon ends.
fn follow(cli: &Cli, client: &mut Client) -> Result<(), Error> {
    while let Some(event) = client.next_event()? {
        print(&if cli.json { format!("{event}\n") } else { show::event(&event) })?;
    }
    Ok(())
}

fn print(text: &str) -> Result<(), Error> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(Error::Output)
}
