//! What is accepted, what is refused, and in which words.

use super::*;

fn refused(text: &str) -> String {
    Config::parse(text, "test.toml").unwrap_err().to_string()
}

#[test]
fn empty_text_gives_two_soft_devices() {
    let config = Config::parse("", "test.toml").unwrap();
    let devices = config.devices();
    let names: Vec<_> = devices.iter().map(|d| d.name.as_str()).collect();
    assert_eq!(names, ["soft0", "soft1"]);
    assert!(devices.iter().all(|d| d.engines == 1 && d.va_bits() == 48 && d.ledger == 0));
    assert_eq!(config.limits, Limits::default());
}

#[test]
fn reference_file_states_the_defaults() {
    let text = include_str!("../svmd.toml");
    let written = Config::parse(text, "svmd.toml").unwrap();
    let default = Config::default();
    assert_eq!(written.devices(), default.devices());
    assert_eq!(written.limits, default.limits);
    let missing = Limits::BOUNDS.iter().find(|(name, ..)| !text.contains(&format!("\n{name} = ")));
    assert_eq!(missing, None);
    assert_eq!(written.daemon, default.daemon);
    assert!(written.guest.is_empty());
}

/// The commented examples of the reference file must not rot either.
#[test]
fn reference_file_uncommented_is_valid() {
    let text: String = include_str!("../svmd.toml")
        .lines()
        .map(|line| line.strip_prefix("#= ").unwrap_or(line))
        .flat_map(|line| [line, "\n"])
        .collect();
    let config = Config::parse(&text, "svmd.toml").unwrap();
    assert_eq!(config.guest.len(), 1);
    assert!(config.daemon.control_socket.is_some());
    let stated: Vec<_> = config.devices().iter().filter_map(|device| device.workers).collect();
    assert_eq!(stated, [DEFAULT_WORKERS]);
}

#[test]
fn unknown_key_is_named() {
    for text in [
        "colour = 1",
        "[daemon]\ncolour = 1",
        "[limits]\ncolour = 1",
        "[[device]]\nkind='soft'\nname='a'\ncolour=1",
    ] {
        let message = refused(text);
        assert!(message.contains("colour") && message.starts_with("test.toml"), "{message}");
    }
}

#[test]
fn hostmmu_has_defaults_of_its_own() {
    let config = Config::parse("[[device]]\nkind = 'hostmmu'\nname = 'a'", "test.toml").unwrap();
    let device = &config.devices()[0];
    assert_eq!((device.va_bits(), device.workers(), device.job_limit_ms()), (46, 256, 60_000));
}

#[test]
fn bad_values_name_their_key() {
    let device = |rest: &str| format!("[[device]]\nkind = 'soft'\nname = 'a'\n{rest}");
    let cases = [
        (device("engines = 0"), "device[0].engines"),
        (device("engines = 65"), "device[0].engines"),
        (device("va_bits = 21"), "device[0].va_bits"),
        (device("va_bits = 58"), "device[0].va_bits"),
        (device("ledger = 16777217"), "device[0].ledger"),
        (device("busy_poll_us = 1001"), "device[0].busy_poll_us"),
        (device("fault_model = 'none'\naddress_model = 'identity'"), "device[0].address_model"),
        ("[[device]]\nkind = 'hostmmu'\nname = 'a'\nva_bits = 47".to_owned(), "device[0].va_bits"),
        ("[[device]]\nkind = 'hostmmu'\nname = 'a'\nengines = 2".to_owned(), "device[0].engines"),
        ("[[device]]\nkind = 'hostmmu'\nname = 'a'\nworkers = 0".to_owned(), "device[0].workers"),
        ("[[device]]\nkind = 'hostmmu'\nname = 'a'\nworkers = 32769".to_owned(), "device[0].workers"),
        (device("workers = 256"), "device[0].workers"),
        (
            "[[device]]\nkind = 'hostmmu'\nname = 'a'\nfault_model = 'replayable'".to_owned(),
            "device[0].fault_model",
        ),
        (
            "[[device]]\nkind = 'hostmmu'\nname = 'a'\naddress_model = 'any'".to_owned(),
            "device[0].address_model",
        ),
        ("[[device]]\nkind = 'hostmmu'\nname = 'a'\nbusy_poll_us = 0".to_owned(), "device[0].busy_poll_us"),
        (device("") + "\n" + &device(""), "device[1].name"),
        ("[[device]]\nkind = 'soft'\nname = 'a b'".to_owned(), "device[0].name"),
        ("[limits]\njobs = 0".to_owned(), "limits.jobs"),
        ("[daemon]\ncontrol_users = [1000, 65534]".to_owned(), "daemon.control_users"),
        ("[daemon]\ncontrol_socket_ro_mode = 0o770".to_owned(), "daemon.control_socket_ro_mode"),
        ("[daemon]\ncontrol_socket_ro_mode = 0o060".to_owned(), "daemon.control_socket_ro_mode"),
        ("[daemon]\ncontrol_socket = '/x'\ncontrol_socket_ro = '/x'".to_owned(), "daemon.control_socket_ro"),
        ("[limits]\nmappings = 65537".to_owned(), "limits.mappings"),
        ("[limits]\ntable_bytes = 1".to_owned(), "limits.table_bytes"),
        ("[limits]\ntotal_jobs = 0".to_owned(), "limits.total_jobs"),
        ("[[guest]]\nname='g'\nsocket='/x'\nlimits = { jobs = 0 }".to_owned(), "guest[0].limits.jobs"),
        ("[[guest]]\nname='g'\nsocket='/x'\nlimits = { colour = 1 }".to_owned(), "guest[0].limits.colour"),
        ("[[guest]]\nname='g'\nsocket='/x'\ndevices=['gpu9']".to_owned(), "guest[0].devices"),
        ("[[guest]]\nname='g'\nsocket='/x'\ndevices=[]".to_owned(), "guest[0].devices"),
        ("[[guest]]\nname='g'\nsocket='/x'\n[[guest]]\nname='g'\nsocket='/y'".to_owned(), "guest[1].name"),
    ];
    for (text, key) in cases {
        let message = refused(&text);
        assert!(message.starts_with(key), "{text}: {message}");
    }
}

#[test]
fn wrong_types_and_kinds_are_refused() {
    assert!(refused("[daemon]\nlog = 'loud'").contains("loud"));
    assert!(refused("[[device]]\nkind = 'hard'\nname = 'a'").contains("hard"));
    assert!(refused("[limits]\njobs = -1").contains("jobs"));
    assert!(refused("[[device]]\nkind = 'soft'\nname = 'a'\nfault_model = 'some'").contains("some"));
}

#[test]
fn models_of_soft_devices_are_read() {
    let device = |rest: &str| {
        let text = format!("[[device]]\nkind = 'soft'\nname = 'a'\nva_bits = 32\n{rest}");
        let config = Config::parse(&text, "test.toml").unwrap();
        (config.devices()[0].fault_model(), config.devices()[0].address_model())
    };
    assert_eq!(device(""), (FaultModel::Replayable, AddressModel::Any));
    assert_eq!(device("fault_model = 'none'"), (FaultModel::None, AddressModel::Any));
    assert_eq!(device("address_model = 'identity'"), (FaultModel::Replayable, AddressModel::Identity));
}

#[test]
fn misspelt_limit_is_named_with_the_nearest_and_all() {
    let problem = |name: &str| Overrides::new([(name.to_owned(), 1)]).unwrap_err();
    for (wrong, meant) in [
        ("conexts", "contexts"),
        ("context", "contexts"),
        ("log-lines", "log_lines"),
        ("job", "jobs"),
        ("total_pending_fault", "total_pending_faults"),
        ("fault_deadline", "fault_deadline_ms"),
    ] {
        let (name, problem) = problem(wrong);
        assert_eq!(name, wrong);
        assert!(problem.contains(&format!("did you mean {meant}?")), "{wrong}: {problem}");
        assert!(Limits::BOUNDS.iter().all(|(known, ..)| problem.contains(known)), "{wrong}: {problem}");
    }
    for unlike in ["", "colour", "CONTEXTS", &"contexts".repeat(5)] {
        assert!(!problem(unlike).1.contains("did you mean"), "{unlike}");
    }
}

#[test]
fn guest_has_its_own_limits_and_else_those_of_all() {
    let text = "[limits]\njobs = 7\n[[guest]]\nname='g'\nsocket='/x'\nlimits = { contexts = 2, queue_bytes = 65536 }";
    let config = Config::parse(text, "test.toml").unwrap();
    let limits = config.limits.with(&config.guest[0].limits);
    let expected = Limits { jobs: 7, contexts: 2, queue_bytes: 65_536, ..Limits::default() };
    assert_eq!(limits, expected);
}

#[test]
fn every_limit_can_be_set_by_its_name() {
    let names = Limits::BOUNDS.map(|(name, least, _)| (name.to_owned(), least));
    let text = format!("{:?}", Limits::default().with(&Overrides::new(names.clone()).unwrap()));
    for (name, least) in names {
        assert!(text.contains(&format!(" {name}: {least}")), "{name}: {text}");
    }
    assert_eq!(text.matches(": ").count(), Limits::BOUNDS.len(), "{text}");
}

#[test]
fn device_granted_twice_is_refused() {
    let text = "[[guest]]\nname = 'a'\nsocket = '/run/a'\ndevices = ['soft0', 'soft1', 'soft0']";
    let message = refused(text);
    assert!(message.contains("guest[0].devices") && message.contains("soft0"), "{message}");
}
