//! The report is complete: each object of it has every field, whatever the figures are.

use serde_json::Value;
use std::process::Command;

const KEYS: [&str; 9] =
    ["goal", "id", "met", "name", "ours", "params", "ratio", "reference", "reference_name"];

#[test]
fn report_of_one_metric_has_all_fields_in_each_line() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("report.json");
    let output = Command::new(env!("CARGO_BIN_EXE_bench-report"))
        .args(["--quick", "--metric", "P2", "--rounds", "1", "--slice-ms", "1", "--sizes", "2,8", "--json"])
        .arg(&file)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = std::fs::read_to_string(&file).unwrap();
    let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(
        rows.iter().map(|row| row["params"]["depth"].as_u64()).collect::<Vec<_>>(),
        [Some(2), Some(8)]
    );
    for row in &rows {
        assert_eq!(row.as_object().unwrap().keys().map(String::as_str).collect::<Vec<_>>(), KEYS);
        assert_eq!(row["id"], "P2");
        for side in ["ours", "reference", "ratio"] {
            assert!(row[side].as_f64().unwrap() > 0.0, "{side} of {row}");
        }
        assert!(row["met"].is_boolean() && row["params"]["unit"].is_string(), "{row}");
    }
    // A header, and a row for people each.
    assert_eq!(String::from_utf8(output.stdout).unwrap().lines().count(), 1 + rows.len());
}

#[test]
fn every_metric_is_measured() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("report.json");
    let output = Command::new(env!("CARGO_BIN_EXE_bench-report"))
        .args(["--quick", "--rounds", "1", "--slice-ms", "1", "--json"])
        .arg(&file)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = std::fs::read_to_string(&file).unwrap();
    let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for metric in integration::bench::METRICS {
        let measured = rows.iter().filter(|row| row["id"] == metric.id && row["ours"].is_number());
        assert!(measured.count() > 0, "{} has no figure", metric.id);
    }
}

#[test]
fn unknown_metric_is_refused_by_name() {
    let output = Command::new(env!("CARGO_BIN_EXE_bench-report")).args(["--metric", "P99"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no metric P99"));
}
