//! Results for people. What the daemon left out is shown as `-`, so that an older or newer daemon is still readable.

use crate::cli::{Command, ContextCommand, GuestCommand};
use crate::table::Table;
use crate::units;
use serde_json::{Value, json};
use std::fmt::Write;

const NOTHING: &str = "-";

/// The result of a command as text, with the end of its last line.
pub fn result(command: &Command, result: &Value) -> String {
    match command {
        Command::Info => info(result),
        Command::Devices => devices(result),
        Command::Guests => guests(result),
        Command::Guest(GuestCommand::Add { name, guest_socket, .. }) => match result["created"].as_bool() {
            Some(false) => format!("guest {name} was there already\n"),
            _ => format!("added guest {name}; connect its VMM to {guest_socket}\n"),
        },
        Command::Guest(GuestCommand::Remove { name }) => match result["removed"].as_bool() {
            Some(false) => format!("guest {name} was not there\n"),
            _ => format!("removed guest {name}\n"),
        },
        Command::Guest(GuestCommand::Show { .. }) => guest(result),
        Command::Contexts { .. } => contexts(result),
        Command::Context(ContextCommand::Show { .. }) => context(result),
        Command::Context(ContextCommand::Evict { .. }) => {
            format!("evicted pages: {}\n", pages(&result["evicted_pages"]))
        }
        Command::Faults { .. } => faults(result),
        Command::Stats => stats(result),
        Command::Ledger { .. } => ledger(result),
        Command::Discover => methods(result),
        Command::Shutdown => "svmd is ending\n".to_owned(),
        Command::Events { .. } | Command::Raw { .. } => format!("{result:#}\n"),
    }
}

/// An event in one line.
pub fn event(event: &Value) -> String {
    let mut line = format!("{:>6}  {:<18}", text(&event["seq"]), text(&event["kind"]));
    for (name, value) in event.as_object().into_iter().flatten() {
        if !matches!(name.as_str(), "seq" | "kind") {
            line.push_str(&format!("  {name}={}", text(value)));
        }
    }
    line.push('\n');
    line
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => NOTHING.to_owned(),
        // Names may come from a guest: nothing in them may steer the terminal.
        Value::String(text) => text.chars().map(|c| if c.is_control() { '?' } else { c }).collect(),
        other => other.to_string(),
    }
}

fn with(value: &Value, show: impl Fn(u64) -> String) -> String {
    value.as_u64().map_or_else(|| NOTHING.to_owned(), show)
}

fn pages(value: &Value) -> String {
    with(value, units::pages)
}

fn hex(value: &Value) -> String {
    with(value, |n| format!("{n:#x}"))
}

fn range(start: &Value, end: &Value) -> String {
    match (start.as_u64(), end.as_u64()) {
        (Some(start), Some(end)) => units::range(start, end),
        _ => NOTHING.to_owned(),
    }
}

fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn list(value: &Value) -> String {
    let items: Vec<String> = items(value).map(text).collect();
    if items.is_empty() { NOTHING.to_owned() } else { items.join(", ") }
}

/// Lines `name  value`, the values under each other.
fn facts(facts: &[(&str, String)]) -> String {
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut lines = String::new();
    for (name, value) in facts {
        // Writing to a String cannot fail.
        writeln!(lines, "{name:<width$}  {value}").ok();
    }
    lines
}

/// The counters that have counted something.
fn counters(counters: &Value) -> String {
    let mut table = Table::new(&["counter", ">count"]);
    for (name, count) in counters.as_object().into_iter().flatten().filter(|(_, count)| **count != 0) {
        table.row([name.replace('_', " "), text(count)]);
    }
    table.text(2, "all counters are 0")
}

fn info(info: &Value) -> String {
    let protocol = &info["protocol"];
    facts(&[
        ("daemon", format!("{} {}", text(&info["name"]), text(&info["version"]))),
        ("pid", text(&info["pid"])),
        ("uptime", with(&info["uptime_s"], units::uptime)),
        ("protocol", format!("{}.{}", text(&protocol["version_major"]), text(&protocol["version_minor"]))),
        ("capset", format!("{} version {}", text(&protocol["capset_id"]), text(&protocol["capset_version"]))),
        ("devices", list(&info["devices"])),
        ("guests", text(&info["guests"])),
        ("sandbox", text(&info["sandbox"])),
    ])
}

fn devices(result: &Value) -> String {
    let mut table = Table::new(&[
        ">device",
        "name",
        "faults",
        "addresses",
        ">va bits",
        ">engines",
        ">gpu vms",
        ">retiring",
        ">faults raised",
    ]);
    for device in items(&result["devices"]) {
        let names = [
            "device",
            "name",
            "fault_model",
            "address_model",
            "va_bits",
            "engines",
            "gpu_vms",
            "retiring",
            "faults_raised",
        ];
        table.row(names.map(|name| text(&device[name])));
    }
    table.text(0, "no devices")
}

fn guests(result: &Value) -> String {
    let mut table = Table::new(&[
        "name",
        "vmm",
        "devices",
        ">contexts",
        ">memory",
        ">waiting faults",
        ">sessions",
        "socket",
    ]);
    for guest in items(&result["guests"]) {
        let status = &guest["status"];
        table.row([
            text(&guest["name"]),
            vmm(guest).to_owned(),
            list(&guest["devices"]),
            text(&status["contexts"]),
            with(&status["memory_bytes"], units::bytes),
            text(&status["pending_faults"]),
            text(&guest["sessions"]),
            text(&guest["socket"]),
        ]);
    }
    table.text(0, "no guests; svmctl guest add NAME SOCKET adds one")
}

fn vmm(guest: &Value) -> &'static str {
    match (guest["connected"].as_bool(), guest["status"]["frozen"].as_bool()) {
        (Some(true), Some(true)) => "stopped",
        (Some(true), _) => "connected",
        _ => "absent",
    }
}

fn guest(guest: &Value) -> String {
    let status = &guest["status"];
    let mut lines = vec![
        ("guest", text(&guest["name"])),
        ("socket", text(&guest["socket"])),
        ("devices", list(&guest["devices"])),
        ("vmm", vmm(guest).to_owned()),
        ("sessions", text(&guest["sessions"])),
        ("last error", text(&guest["last_error"])),
    ];
    if !status.is_null() {
        let memory = with(&status["memory_bytes"], units::bytes);
        lines.extend([
            ("epoch", hex(&status["epoch"])),
            ("incarnation", hex(&status["incarnation"])),
            ("memory", format!("{memory} in {} regions", text(&status["memory_regions"]))),
            ("contexts", format!("{}, {} retiring", text(&status["contexts"]), text(&status["retiring"]))),
            ("resources", text(&status["resources"])),
            ("waiting faults", text(&status["pending_faults"])),
        ]);
    }
    let deadline =
        json!({ "name": "fault_deadline_ms", "scope": "fault", "limit": guest["fault_deadline_ms"] });
    let poll = json!({ "name": "busy_poll_us", "scope": "empty ring", "limit": guest["busy_poll_us"] });
    let others = [&deadline, &guest["log_lines"], &guest["session_rate"], &poll];
    let rows = items(&guest["limits"]).chain(others);
    format!("{}{}", facts(&lines), limits(rows))
}

/// How far each limit is used; those of a context or GPU VM by the one that uses most.
fn limits<'a>(rows: impl Iterator<Item = &'a Value>) -> String {
    let mut table = Table::new(&["limit", "of a", ">used", ">peak", ">limit", ">refused"]);
    for row in rows.filter(|row| !row.is_null()) {
        let is_bytes = row["name"].as_str().is_some_and(|name| name.ends_with("_bytes"));
        let amount = |value: &Value| if is_bytes { with(value, units::bytes) } else { text(value) };
        table.row([
            text(&row["name"]),
            text(&row["scope"]),
            amount(&row["used"]),
            amount(&row["peak"]),
            amount(&row["limit"]),
            text(&row["refused"]),
        ]);
    }
    table.text(0, "")
}

fn contexts(result: &Value) -> String {
    let mut table = Table::new(&[
        "guest",
        ">ctx",
        "name",
        "vms (device:asid)",
        ">known pages",
        ">resident pages",
        ">mappings",
        ">tables",
        ">waiting",
        ">jobs",
        ">faults",
    ]);
    for context in items(&result["contexts"]) {
        let vms: Vec<String> = items(&context["vms"])
            .map(|vm| {
                // A mark on what its process cannot use any more; context show tells why.
                let mark = if vm["state"] == "usable" { "" } else { "!" };
                format!("{}:{}{mark}", text(&vm["device"]), text(&vm["asid"]))
            })
            .collect();
        table.row([
            text(&context["guest"]),
            text(&context["ctx_id"]),
            text(&context["name"]),
            if vms.is_empty() { NOTHING.to_owned() } else { vms.join(" ") },
            pages(&context["known_pages"]),
            pages(&context["resident_pages"]),
            text(&context["mappings"]),
            with(&context["table_bytes"], units::bytes),
            text(&context["pending_faults"]),
            text(&context["jobs"]),
            text(&context["counters"]["faults_raised"]),
        ]);
    }
    table.text(0, "no contexts")
}

fn context(context: &Value) -> String {
    let invalidations =
        format!("{} accepted, {} done", text(&context["inval_seq"]), text(&context["inval_done_seq"]));
    let mut lines = facts(&[
        ("context", format!("{} of guest {}", text(&context["ctx_id"]), text(&context["guest"]))),
        ("name", text(&context["name"])),
        ("generation", text(&context["generation"])),
        ("known pages", pages(&context["known_pages"])),
        ("invalidations", invalidations),
        ("waiting faults", text(&context["pending_faults"])),
        ("jobs in flight", text(&context["jobs"])),
    ]);
    let mut table = Table::new(&["holds", ">used", ">limit"]);
    for row in items(&context["limits"]) {
        table.row([text(&row["name"]), text(&row["used"]), text(&row["limit"])]);
    }
    lines.push_str(&table.text(2, ""));
    for vm in items(&context["vms"]) {
        lines.push_str(&gpu_vm(vm));
    }
    lines.push_str("counters\n");
    lines.push_str(&counters(&context["counters"]));
    lines
}

fn gpu_vm(vm: &Value) -> String {
    let mut table = Table::new(&["cpu addresses", "", "gpu addresses", "access", ">size", ">resident"]);
    for mapping in items(&vm["mappings"]) {
        let source = match mapping["resource_id"].as_u64() {
            Some(resource) => format!("blob {resource} at {}", hex(&mapping["offset"])),
            None if mapping["kind"] == "null" => "nothing".to_owned(),
            None => range(&mapping["cpu_start"], &mapping["cpu_end"]),
        };
        let how = if mapping["kind"] == "mirror" { "mirrored ->" } else { "->" };
        let length = mapping["gpu_end"].as_u64().zip(mapping["gpu_start"].as_u64());
        let length = length.and_then(|(end, start)| end.checked_sub(start));
        table.row([
            source,
            how.to_owned(),
            range(&mapping["gpu_start"], &mapping["gpu_end"]),
            if mapping["readonly"] == true { "read" } else { "read, write" }.to_owned(),
            length.map_or_else(|| NOTHING.to_owned(), units::bytes),
            pages(&mapping["resident_pages"]),
        ]);
    }
    let state = match vm["error"].as_i64().and_then(|errno| i32::try_from(errno).ok()) {
        None | Some(0) => text(&vm["state"]),
        Some(errno) => format!(
            "{} ({}; operation {} at {})",
            text(&vm["state"]),
            std::io::Error::from_raw_os_error(errno),
            text(&vm["error_op"]),
            hex(&vm["error_addr"])
        ),
    };
    let held = if vm["held"] == true { ", its queues stand still until all is resident" } else { "" };
    let mut text_of_vm = format!(
        "gpu vm {} on device {}: asid {}, {state}, resident {}, wanted {}, jobs and binds {}, waiting faults {}{held}\n{}",
        text(&vm["vm_id"]),
        text(&vm["device"]),
        text(&vm["asid"]),
        pages(&vm["resident_pages"]),
        pages(&vm["wanted_pages"]),
        text(&vm["jobs"]),
        text(&vm["pending_faults"]),
        table.text(2, "no mappings"),
    );
    text_of_vm.push_str(&waiting_faults(vm));
    text_of_vm
}

/// The faults of a GPU VM that wait for the guest; nothing where there is none.
fn waiting_faults(vm: &Value) -> String {
    let mut table = Table::new(&["waits at", ">pages", "cpu address", "access", ">jobs", ">for"]);
    for fault in items(&vm["faults"]) {
        let access = if fault["prefetch"] == true { "prefetch".to_owned() } else { text(&fault["access"]) };
        table.row([
            hex(&fault["gpu_addr"]),
            text(&fault["pages"]),
            hex(&fault["cpu_addr"]),
            access,
            text(&fault["waiters"]),
            with(&fault["wait_ns"], units::duration),
        ]);
    }
    let shown = items(&vm["faults"]).count();
    let all = vm["pending_faults"].as_u64().and_then(|all| usize::try_from(all).ok()).unwrap_or(shown);
    match (shown, all.saturating_sub(shown)) {
        (0, _) => String::new(),
        (_, 0) => table.text(2, ""),
        (_, more) => format!("{}  and {more} more\n", table.text(2, "")),
    }
}

fn faults(result: &Value) -> String {
    let mut table = Table::new(&[
        "guest",
        ">ctx",
        ">device",
        ">asid",
        "access",
        ">cpu page",
        ">gpu page",
        "outcome",
        ">took",
        ">cookie",
    ]);
    for fault in items(&result["faults"]) {
        table.row([
            text(&fault["guest"]),
            text(&fault["ctx_id"]),
            text(&fault["device"]),
            text(&fault["asid"]),
            text(&fault["access"]),
            hex(&fault["cpu_addr"]),
            hex(&fault["gpu_addr"]),
            text(&fault["outcome"]),
            with(&fault["wait_ns"], units::duration),
            hex(&fault["cookie"]),
        ]);
    }
    table.text(0, "no faults yet")
}

fn stats(stats: &Value) -> String {
    let mut lines = facts(&[
        ("guests connected", text(&stats["guests"])),
        ("contexts", text(&stats["contexts"])),
        ("gpu vms", text(&stats["gpu_vms"])),
        ("gpu vms that wait for their guest", text(&stats["pending_vms"])),
        ("most at any time", text(&stats["peak_pending_vms"])),
    ]);
    lines.push_str("counters\n");
    lines.push_str(&counters(&stats["counters"]));
    lines
}

fn ledger(result: &Value) -> String {
    let mut table = Table::new(&["guest", ">ctx", ">generation", ">asid", ">gpu page", "access"]);
    for entry in items(&result["entries"]) {
        let address =
            entry["page"].as_u64().and_then(|page| page.checked_mul(virtio_gpu_svm::protocol::PAGE_SIZE));
        table.row([
            text(&entry["guest"]),
            text(&entry["ctx_id"]),
            text(&entry["generation"]),
            text(&entry["asid"]),
            address.map_or_else(|| NOTHING.to_owned(), |address| format!("{address:#x}")),
            text(&entry["access"]),
        ]);
    }
    let mut lines = table.text(0, "no faults in the ledger of this device, or its ledger is off");
    if result["overwritten"].as_u64().is_some_and(|count| count > 0) {
        lines.push_str(&format!("{} older entries were overwritten\n", text(&result["overwritten"])));
    }
    lines
}

fn methods(result: &Value) -> String {
    let mut lines = String::new();
    for method in items(&result["methods"]) {
        let params: Vec<String> = items(&method["params"])
            .map(|param| match param["required"].as_bool() {
                Some(true) => text(&param["name"]),
                _ => format!("[{}]", text(&param["name"])),
            })
            .collect();
        let head = format!("{} {}", text(&method["name"]), params.join(" "));
        lines.push_str(&format!("{}\n    {}\n", head.trim_end(), text(&method["summary"])));
    }
    lines.push_str("--json tells parameters, results and errors in full\n");
    lines
}
