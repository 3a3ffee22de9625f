//! Numbers for people: sizes, times, address ranges.

/// Bytes of a page of the protocol.
const PAGE_SIZE: u64 = virtio_gpu_svm::protocol::PAGE_SIZE;

/// Bytes in the largest unit of which there is at least one: `12 KiB`, `1.5 MiB`.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    let Some(exponent) = count.checked_ilog2().map(|bits| bits / 10).filter(|exponent| *exponent > 0) else {
        return format!("{count} B");
    };
    let exponent = exponent.min(5);
    let unit = 1_u64 << (10 * exponent);
    let name = UNITS.iter().zip(1..).find(|(_, at)| *at == exponent).map_or("", |(name, _)| name);
    let tenths = u128::from(count) * 10 / u128::from(unit);
    match tenths % 10 {
        0 => format!("{} {name}", tenths / 10),
        tenth => format!("{}.{tenth} {name}", tenths / 10),
    }
}

/// Pages, exactly, and their size: `3 (12 KiB)`.
pub fn pages(count: u64) -> String {
    match count.checked_mul(PAGE_SIZE) {
        Some(0) => "0".to_owned(),
        Some(size) => format!("{count} ({})", bytes(size)),
        None => count.to_string(),
    }
}

/// A duration in the unit that suits it: `850 ns`, `12.3 us`, `4.0 ms`, `2.5 s`.
pub fn duration(ns: u64) -> String {
    let (unit, name) = match ns {
        0..1_000 => return format!("{ns} ns"),
        1_000..1_000_000 => (1_000, "us"),
        1_000_000..1_000_000_000 => (1_000_000, "ms"),
        _ => (1_000_000_000, "s"),
    };
    format!("{}.{} {name}", ns / unit, ns % unit * 10 / unit)
}

/// Seconds, for times a person waits: `42 s`, `3 min 5 s`, `2 h 10 min`, `5 d 3 h`.
pub fn uptime(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86400 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {} h", seconds / 86400, seconds % 86400 / 3600),
    }
}

/// A half-open range of addresses: `0x1000..0x3000`.
pub fn range(start: u64, end: u64) -> String {
    format!("{start:#x}..{end:#x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_keep_one_digit() {
        let told = [0, 1023, 1024, 1536, 12 << 10, (1 << 20) + (1 << 19), 5 << 30, u64::MAX].map(bytes);
        assert_eq!(told, ["0 B", "1023 B", "1 KiB", "1.5 KiB", "12 KiB", "1.5 MiB", "5 GiB", "16383.9 PiB"]);
    }

    #[test]
    fn page_counts_are_exact() {
        assert_eq!(
            [0, 3, 513, u64::MAX].map(pages),
            ["0", "3 (12 KiB)", "513 (2 MiB)", "18446744073709551615"]
        );
    }

    #[test]
    fn durations_choose_their_unit() {
        let told = [999, 1_000, 12_345, 4_000_000, 2_500_000_000].map(duration);
        assert_eq!(told, ["999 ns", "1.0 us", "12.3 us", "4.0 ms", "2.5 s"]);
    }

    #[test]
    fn uptimes_have_two_parts() {
        let told = [59, 185, 7800, 442_800].map(uptime);
        assert_eq!(told, ["59 s", "3 min 5 s", "2 h 10 min", "5 d 3 h"]);
    }
}
