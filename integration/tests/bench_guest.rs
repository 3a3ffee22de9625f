//! `cargo bench-guest` measures and reports all that it promises, whatever the figures are. Its reference needs userfaultfd
//! of this kernel; where that lacks it is said.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[expect(dead_code, reason = "shared with other tests, which need huge pages")]
#[path = "../../guest-agent/tests/agent/lacking.rs"]
mod lacking;

use daemon::hostmmu;
use lacking::lacking;
use serde_json::Value;
use std::process::Command;

/// In process, of which no part needs a guest's kernel.
const ROWS: [&str; 8] =
    ["first touch", "touch", "fault", "agent's part", "userfaultfd", "answer rate", "page rate", "loop rate"];

/// What it prints. `None`: it cannot run here.
fn bench(arguments: &[&str]) -> Option<String> {
    // hostmmu needs no less of it than the reference does.
    if let Err(error) = hostmmu::probe() {
        lacking(&format!("bench-guest, whose reference is userfaultfd ({error})"));
        return None;
    }
    let quick = ["--place", "in-process", "--rounds", "10", "--processes", "3"];
    let output =
        Command::new(env!("CARGO_BIN_EXE_bench-guest")).args(quick).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8(output.stdout).unwrap())
}

#[test]
fn faults_in_process_are_reported_as_json() {
    let Some(told) = bench(&["--json"]) else { return };
    assert_eq!(told.lines().count(), 1, "{told}");
    let told: Value = serde_json::from_str(&told).unwrap();
    assert!(told["machine"][0].as_str().unwrap().starts_with("host: "), "{told}");
    let rows = told["rows"].as_array().unwrap();
    assert_eq!(rows.iter().map(|row| row["id"].as_str().unwrap()).collect::<Vec<_>>(), ROWS);
    for row in rows {
        assert_eq!(row["place"], "in process");
        let rate = row["unit"] == "1/s";
        assert!(rate || row["p99"].as_f64() >= row["p50"].as_f64(), "{row}");
        let reference = row["reference"].as_str();
        assert_eq!(reference.is_some(), row["ratio_p50"].is_number(), "{row}");
        assert!(reference.is_none_or(|id| ROWS.contains(&id)), "{row}");
    }
    for id in ["first touch", "touch", "agent's part", "userfaultfd", "answer rate", "page rate", "loop rate"]
    {
        let row = rows.iter().find(|row| row["id"] == id).unwrap();
        assert!(row["p50"].as_f64().unwrap() > 0.0, "{row}");
    }
}

#[test]
fn faults_in_process_are_reported_as_a_table() {
    let Some(told) = bench(&[]) else { return };
    assert!(told.starts_with("host: "), "{told}");
    for id in ROWS {
        assert!(told.lines().any(|line| line.contains(&format!(" {id}: "))), "{id} in {told}");
    }
}
