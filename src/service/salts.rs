//! Under which salts a generation's requests ran, so that deleting an adapter can erase its cached KV.

use std::collections::{HashMap, HashSet, VecDeque};

use crate::types::{CacheSalt, Generation, TenantId};

/// An adapter's generation and its owner: deleting one's own adapter must not touch an equal one of another tenant, nor show that there is one.
pub(super) type Owned = (TenantId, Generation);

/// Salts remembered. More than there are cached blocks on most machines: what falls out has hardly any KV left.
const CAPACITY: usize = 1 << 16;

/// Which salts (tenant, scale, mix) each generation was used under, oldest forgotten first.
#[derive(Debug, Default)]
pub(super) struct Salts {
    /// Empty for a salt that was taken and waits in `order` to fall out.
    generations: HashMap<CacheSalt, Vec<Owned>>,
    of_generation: HashMap<Owned, HashSet<CacheSalt>>,
    order: VecDeque<CacheSalt>,
}

impl Salts {
    /// Notes a use. Gives the salt that was forgotten for it, whose KV must be purged now.
    pub(super) fn note(&mut self, salt: CacheSalt, generations: impl Iterator<Item = Owned>) -> Option<CacheSalt> {
        if self.generations.get(&salt).is_some_and(|generations| !generations.is_empty()) {
            return None;
        }
        let generations: Vec<Owned> = generations.collect();
        for generation in &generations {
            self.of_generation.entry(*generation).or_default().insert(salt);
        }
        if self.generations.insert(salt, generations).is_none() {
            self.order.push_back(salt);
        }
        if self.order.len() <= CAPACITY {
            return None;
        }
        let oldest = self.order.pop_front()?;
        for generation in self.generations.remove(&oldest).unwrap_or_default() {
            self.forget(generation, oldest);
        }
        Some(oldest)
    }

    /// The salts of a generation, which it no longer has.
    pub(super) fn take(&mut self, generation: Owned) -> Vec<CacheSalt> {
        let salts = self.of_generation.remove(&generation).unwrap_or_default();
        for salt in &salts {
            let all = self.generations.get_mut(salt).map(std::mem::take).unwrap_or_default();
            for other in all {
                self.forget(other, *salt);
            }
        }
        salts.into_iter().collect()
    }

    fn forget(&mut self, generation: Owned, salt: CacheSalt) {
        if let Some(salts) = self.of_generation.get_mut(&generation) {
            salts.remove(&salt);
            if salts.is_empty() {
                self.of_generation.remove(&generation);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn salt(number: u64) -> CacheSalt {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        CacheSalt(bytes)
    }

    #[test]
    fn a_generation_has_every_salt_that_it_was_used_under() {
        let owner = TenantId(1);
        let (a, b) = ((owner, Generation([1; 16])), (owner, Generation([2; 16])));
        let mut salts = Salts::default();
        for (number, of) in [(1, vec![a]), (2, vec![b]), (3, vec![a, b]), (1, vec![a])] {
            assert_eq!(salts.note(salt(number), of.into_iter()), None);
        }
        let mut of_a = salts.take(a);
        of_a.sort_by_key(|salt| salt.0);
        assert_eq!(of_a, [salt(1), salt(3)]);
        assert_eq!(salts.take(b), [salt(2)], "the mix went with its other half");
        assert!(salts.take(a).is_empty());
        // An equal adapter of another tenant keeps its own.
        let theirs = (TenantId(2), Generation([1; 16]));
        assert_eq!(salts.note(salt(9), [theirs].into_iter()), None);
        assert!(salts.take(a).is_empty());
        assert_eq!(salts.take(theirs), [salt(9)]);
        // Used again after it was taken.
        assert_eq!(salts.note(salt(1), [a].into_iter()), None);
        assert_eq!(salts.take(a), [salt(1)]);
        assert_eq!(salts.order.len(), 4);
    }

    #[test]
    fn what_is_forgotten_is_handed_out_to_be_purged() {
        let mut salts = Salts::default();
        let generation = |number: u64| (TenantId(1), Generation((number as u128).to_le_bytes()));
        for number in 0..CAPACITY as u64 {
            assert_eq!(salts.note(salt(number), [generation(number)].into_iter()), None);
        }
        let next = CAPACITY as u64;
        assert_eq!(salts.note(salt(next), [generation(next)].into_iter()), Some(salt(0)));
        assert!(salts.take(generation(0)).is_empty());
        assert_eq!((salts.generations.len(), salts.of_generation.len()), (CAPACITY, CAPACITY));
    }
}
