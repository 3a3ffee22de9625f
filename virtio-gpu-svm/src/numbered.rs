//! Tables of what we number ourselves: asids, stops, jobs, cookies, regions.
//!
//! The standard library's hash withstands keys that an attacker chooses, and costs a hundred instructions. A guest cannot
//! choose our numbers, but which of them it keeps; so the hash is one multiplication by an odd number that is drawn for each
//! table, of which nobody can know what falls together.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};

/// A table by numbers of our own.
pub(crate) type Numbered<K, V> = HashMap<K, V, Scatter>;

/// Scatters numbers over a table.
#[derive(Clone)]
pub(crate) struct Scatter(u64);

impl Default for Scatter {
    fn default() -> Self {
        Self(RandomState::new().hash_one(0_u64) | 1)
    }
}

impl BuildHasher for Scatter {
    type Hasher = Scattered;
    fn build_hasher(&self) -> Scattered {
        Scattered { factor: self.0, sum: 0 }
    }
}

/// One key's hash.
pub(crate) struct Scattered {
    factor: u64,
    sum: u64,
}

impl Hasher for Scattered {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64((*byte).into()));
    }
    fn write_u32(&mut self, number: u32) {
        self.write_u64(number.into());
    }
    fn write_u64(&mut self, number: u64) {
        self.sum = (self.sum.rotate_left(32) ^ number).wrapping_mul(self.factor);
    }
    fn write_usize(&mut self, number: usize) {
        self.write_u64(u64::try_from(number).unwrap_or(u64::MAX));
    }
    fn finish(&self) -> u64 {
        // All bits of a number decide the upper ones of the product; a table looks at the lowest.
        self.sum.rotate_left(32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The most numbers of these whose hashes end alike, of 4096 ends; with a factor that is not drawn.
    fn most_together(numbers: impl Iterator<Item = u64>) -> usize {
        let scatter = Scatter(0x9e37_79b9_7f4a_7c15);
        let mut ends = vec![0; 4096];
        numbers.for_each(|number| ends[usize::try_from(scatter.hash_one(number) % 4096).unwrap()] += 1);
        ends.into_iter().max().unwrap()
    }

    #[test]
    fn numbers_are_scattered_whichever_are_kept() {
        for shift in [0, 4, 8, 12, 20, 32] {
            let most = most_together((0..4096).map(|n| n << shift));
            assert!(most <= 64, "{most} of 4096 numbers, {} apart, fall together", 1_u64 << shift);
        }
    }

    #[test]
    fn factors_are_odd_and_differ_between_tables() {
        let factors: std::collections::HashSet<_> = (0..16).map(|_| Scatter::default().0).collect();
        assert!(factors.iter().all(|factor| factor % 2 == 1));
        assert_eq!(factors.len(), 16);
    }

    #[test]
    fn both_numbers_of_a_pair_decide() {
        let scatter = Scatter(0x9e37_79b9_7f4a_7c15);
        let hashes: std::collections::HashSet<_> = (0..64_usize)
            .flat_map(|a| (0..64_u32).map(move |b| (a, b)))
            .map(|pair| scatter.hash_one(pair))
            .collect();
        assert_eq!(hashes.len(), 64 * 64);
    }
}
