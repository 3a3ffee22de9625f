use super::*;
use serde_json::json;

fn times(list: &[u64]) -> Times {
    Times::new(list.to_vec()).unwrap()
}

fn row<'a>(rows: &'a [Row], id: &str) -> &'a Row {
    rows.iter().find(|row| row.id == id).unwrap()
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() < 1e-9
}

#[test]
fn percentile_is_the_least_that_so_many_do_not_exceed() {
    let hundred: Vec<u64> = (1..=100).rev().collect();
    assert!(close(times(&hundred).percentile(50), 50.0) && close(times(&hundred).percentile(99), 99.0));
    assert!(close(times(&[7]).percentile(50), 7.0) && close(times(&[7]).percentile(99), 7.0));
    assert!(close(times(&[1, 2, 3]).percentile(50), 2.0) && close(times(&[1, 2, 3]).percentile(99), 3.0));
}

#[test]
fn fault_is_the_first_touch_without_the_job_and_beside_the_loop() {
    let told = json!({
        "userfaultfd": [10_000, 20_000, 40_000], "first_touch": [130_000, 150_000, 300_000], "touch": [90_000, 100_000, 100_000],
    });
    let rows = faults("QEMU", &told, &times(&[5_000, 5_000, 20_000])).unwrap();
    let fault = row(&rows, "fault");
    assert_eq!((fault.p50, fault.p99), (50.0, Some(200.0)));
    assert_eq!((fault.ratio_p50, fault.ratio_p99), (Some(2.5), Some(5.0)));
    let agent = row(&rows, "agent's part");
    assert_eq!(
        (agent.p50, agent.p99, agent.ratio_p50, agent.ratio_p99),
        (5.0, Some(20.0), Some(0.25), Some(0.5))
    );
    assert_eq!(row(&rows, "userfaultfd").ratio_p50, None);
}

#[test]
fn first_touch_that_is_faster_than_others_adds_nothing() {
    let told = json!({ "userfaultfd": [10], "first_touch": [1_000], "touch": [90_000] });
    assert!(close(row(&faults("QEMU", &told, &times(&[1])).unwrap(), "fault").p50, 0.0));
}

#[test]
fn answers_are_those_of_all_processes_and_each_has_a_window_of_pages() {
    // Three rounds of 100 answers: in 1, 2 and 4 ms by the agent, in a quarter of that by loops.
    let told = json!({
        "answers": 100, "device": [1_000_000, 2_000_000, 4_000_000], "userfaultfd": [250_000, 500_000, 1_000_000],
    });
    let rows = answers("in process", &told, 4).unwrap();
    let rates = ["answer rate", "page rate", "loop rate"].map(|id| row(&rows, id).p50);
    assert_eq!(rates, [50_000.0, 800_000.0, 200_000.0]);
    assert_eq!(row(&rows, "answer rate").ratio_p50, Some(0.25));
    assert_eq!(row(&rows, "page rate").ratio_p50, Some(4.0));
    assert_eq!(row(&rows, "answer rate").p99, None);
}

#[test]
fn pins_stand_beside_what_the_kernel_takes_for_both_steps() {
    let told = json!({
        "bytes": 16 << 20, "populate": [3_000_000], "pin": [1_000_000], "unpin": [500_000], "unmap": [500_000],
        "arena": [8_000_000], "arena_gone": [3_000_000], "asked": [12_000_000],
    });
    let rows = pins("QEMU", &told).unwrap();
    assert_eq!((row(&rows, "first ask").p50, row(&rows, "first ask").ratio_p50), (12.0, Some(3.0)));
    assert_eq!((row(&rows, "mmap").p50, row(&rows, "mmap").ratio_p50), (8.0, Some(2.0)));
    assert_eq!((row(&rows, "munmap").p50, row(&rows, "munmap").ratio_p50), (3.0, Some(3.0)));
    // 4096 pages in 8 ms.
    assert_eq!((row(&rows, "pin rate").p50, row(&rows, "pin rate").ratio_p50), (512_000.0, Some(0.5)));
    assert_eq!(row(&rows, "kernel clears").ratio_p50, Some(0.75));
}

#[test]
fn programs_stand_beside_themselves_without_an_agent() {
    let usual = |ns: u64| Usual {
        run: json!({ "malloc": [ns], "mmap": [ns], "thread": [ns], "fork": [ns] }),
        start: json!({ "start": [ns] }),
    };
    let rows = programs("QEMU", &usual(1000), &usual(1100), &usual(3000)).unwrap();
    assert_eq!(rows.len(), 15);
    for kind in ["start", "malloc", "mmap", "thread", "fork"] {
        assert_eq!(row(&rows, &format!("{kind}, beside")).ratio_p50, Some(1.1));
        assert_eq!(row(&rows, &format!("{kind}, run")).ratio_p99, Some(3.0));
    }
}

#[test]
fn what_was_not_told_is_an_error_that_names_it() {
    for (told, name) in [
        (json!({ "answers": 1, "device": [1] }), "userfaultfd"),
        (json!({ "answers": 1, "device": [], "userfaultfd": [1] }), "device"),
        (json!({ "answers": 1, "device": [-1], "userfaultfd": [1] }), "device"),
        (json!({ "device": [1], "userfaultfd": [1] }), "answers"),
    ] {
        let error = format!("{:#}", answers("QEMU", &told, 1).unwrap_err());
        assert!(error.contains(name), "{error}");
    }
    assert!(check_answered(10, 10).is_ok() && check_answered(9, 10).is_err());
}

#[test]
fn table_and_json_have_the_same_figures() {
    let told = json!({ "userfaultfd": [10_000], "first_touch": [130_000], "touch": [90_000] });
    let rows = faults("QEMU", &told, &times(&[5_000])).unwrap();
    let fault = row(&rows, "fault");
    let line = fault.to_string();
    for word in ["QEMU", "40.0", "us", "4.00", "userfaultfd", "fault: "] {
        assert!(line.contains(word), "{word} in {line}");
    }
    let json = json!(fault);
    assert_eq!((&json["p50"], &json["unit"], &json["ratio_p50"]), (&json!(40.0), &json!("us"), &json!(4.0)));
    // Columns stand below their titles.
    assert_eq!(HEADER.find("to reference"), Some(line.find("userfaultfd").unwrap()));
}
