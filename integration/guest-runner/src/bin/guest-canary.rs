//! Fills the guest's free memory with a pattern that depends on the position, keeps it, and checks it on command: whatever
//! a device writes to pages that it should have let go of shows up here.
//!
//! Takes commands as lines on standard input and answers each with one line of JSON:
//! * `fill MIB`: allocates until no more than MIB are free; may be repeated, for memory that was freed since.
//! * `verify`: reads all of it and counts the bytes that are not as they were written.

use std::io::{self, BufRead, Write};
use std::process::ExitCode;

use serde_json::{Value, json};

const CHUNK_BYTES: usize = 1 << 20;
const CHUNK_WORDS: usize = CHUNK_BYTES / size_of::<u64>();
/// The kernel ends processes when less is free.
const LEAST_RESERVE_MIB: u64 = 8;

#[derive(Default)]
struct Canary {
    chunks: Vec<Vec<u64>>,
}

/// What a check found.
#[derive(Debug, PartialEq, Eq)]
struct Damage {
    bytes: u64,
    /// Offset of the first, in the order of allocation.
    first: Option<u64>,
}

impl Canary {
    fn grow(&mut self) {
        let position = self.words();
        self.chunks.push((position..).take(CHUNK_WORDS).map(pattern).collect());
    }

    fn words(&self) -> u64 {
        self.chunks.iter().map(|chunk| chunk.len() as u64).sum()
    }

    fn bytes(&self) -> u64 {
        self.words() * size_of::<u64>() as u64
    }

    fn verify(&self) -> Damage {
        let mut damage = Damage { bytes: 0, first: None };
        let words = self.chunks.iter().flatten();
        for (position, word) in (0u64..).zip(words) {
            let difference = word ^ pattern(position);
            if difference != 0 {
                damage.bytes += difference.to_le_bytes().iter().filter(|byte| **byte != 0).count() as u64;
                damage.first.get_or_insert(position * size_of::<u64>() as u64);
            }
        }
        damage
    }

    fn fill(&mut self, reserve_mib: u64) -> io::Result<()> {
        let reserve_kib = reserve_mib.max(LEAST_RESERVE_MIB) * 1024;
        let chunk_kib = CHUNK_BYTES as u64 / 1024;
        while free_kib()? > reserve_kib + chunk_kib {
            self.grow();
        }
        Ok(())
    }

    fn on_line(&mut self, line: &str) -> io::Result<Value> {
        let mut words = line.split_whitespace();
        match (words.next(), words.next().map(str::parse), words.next()) {
            (Some("fill"), Some(Ok(reserve_mib)), None) => {
                self.fill(reserve_mib)?;
                Ok(json!({"canary": "filled", "bytes": self.bytes(), "free_kib": free_kib()?}))
            }
            (Some("verify"), None, None) => {
                let damage = self.verify();
                let (corrupt, first) = (damage.bytes, damage.first);
                Ok(
                    json!({"canary": "verified", "bytes": self.bytes(), "corrupt_bytes": corrupt, "first": first}),
                )
            }
            _ => Ok(json!({"canary": "refused", "error": "commands are: fill MIB, verify"})),
        }
    }
}

fn pattern(position: u64) -> u64 {
    // An odd factor, so that no two positions have the same word.
    position.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn free_kib() -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemFree:"));
    let number = line.and_then(|line| line.split_whitespace().next()).and_then(|number| number.parse().ok());
    number.ok_or_else(|| io::Error::other("no MemFree in /proc/meminfo"))
}

fn main() -> ExitCode {
    let mut canary = Canary::default();
    let mut answer_lines = || -> io::Result<()> {
        for line in io::stdin().lock().lines() {
            writeln!(io::stdout(), "{}", canary.on_line(&line?)?)?;
        }
        Ok(())
    };
    match answer_lines() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest-canary: {error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_bytes_are_counted_and_the_first_is_placed() {
        let mut canary = Canary::default();
        canary.grow();
        canary.grow();
        assert_eq!(canary.verify(), Damage { bytes: 0, first: None });
        canary.chunks[1][3] ^= 0xff00_0001;
        canary.chunks[1][9] ^= 1 << 63;
        let first = Some(CHUNK_BYTES as u64 + 24);
        assert_eq!(canary.verify(), Damage { bytes: 3, first });
    }

    #[test]
    fn unknown_command_is_refused() {
        let answer = Canary::default().on_line("fill much").unwrap();
        assert_eq!(answer["canary"], "refused");
    }
}
