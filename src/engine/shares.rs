//! Whose turn it is. Of every key (a tenant, as far as the service is concerned) and class: how much it was served, and what waits.
//!
//! These are the virtual token counters of "Fairness in Serving Large Language Models" (VTC, arXiv 2401.00588, Algorithm 2): a key pays 1 for a prompt token and 2 for a
//! completion token, divided by its weight, when it is computed; the key that has paid least is next. A key that had nothing waiting is lifted to the
//! least of those that want more than they have, so that time in which it wanted nothing gives it no claim. Tokens from the prefix cache cost nothing, and nobody pays twice for
//! tokens that are computed again after a preemption.
//!
//! Beside the paper: prompt tokens that are about to be computed count when the next is chosen, so that a step in which many places are free does not give them all to
//! one key; and they are charged when they are computed, so that a request that goes away before that costs nothing.

use std::{
    collections::{BTreeMap, VecDeque},
    num::NonZeroU32,
};

use super::{
    api::{Priority, ShareKey},
    sequence::{Sequence, SequenceId},
};

/// What a prompt token costs.
const PROMPT_COST: usize = 1;
/// What a completion token costs.
const COMPLETION_COST: usize = 2;
/// Units of a counter that cost 1 makes at weight 1: a cost is exact to one part in 2^32 / weight. A counter has 128 bits, so it holds 2^96 tokens: it never
/// overflows, and need not be brought back to zero.
const UNIT: u128 = 1 << 32;

/// The class and key of an account.
pub(super) type Owner = (Priority, ShareKey);

/// Who pays for a sequence.
pub(super) fn owner(sequence: &Sequence) -> Owner {
    (sequence.id.priority, sequence.share.key)
}

/// What a sequence has cost so far.
pub(super) fn cost(sequence: &Sequence) -> usize {
    sequence.paid * PROMPT_COST + sequence.generated() * COMPLETION_COST
}

/// Something that keys divide by their weights.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    pub(super) whole: usize,
    /// Of all keys together.
    pub(super) weights: u64,
}

impl Part {
    /// The part of a key of this weight, rounded up.
    pub(super) fn ceil(self, weight: NonZeroU32) -> usize {
        self.times(weight).div_ceil(u128::from(self.weights.max(1))) as usize
    }

    /// The same, rounded down.
    pub(super) fn floor(self, weight: NonZeroU32) -> usize {
        (self.times(weight) / u128::from(self.weights.max(1))) as usize
    }

    fn times(self, weight: NonZeroU32) -> u128 {
        self.whole as u128 * u128::from(weight.get())
    }
}

/// What is known about a key in a class.
#[derive(Debug)]
pub(super) struct Account {
    pub(super) weight: NonZeroU32,
    /// What it paid, or was lifted to.
    paid: u128,
    /// Prompt tokens of running sequences that are not paid yet.
    unpaid: usize,
    /// Running sequences.
    pub(super) running: usize,
    /// In order of arrival.
    pub(super) waiting: VecDeque<Sequence>,
    /// Those before this one wait for another's prefix, in this round.
    pub(super) next: usize,
    /// It had nothing here when its oldest sequence came, which waits for its first place.
    pub(super) fresh: bool,
    /// Nothing more of it is admitted in this round.
    pub(super) out: bool,
    /// Blocks of running sequences, shared ones of each; as counted last.
    pub(super) blocks: usize,
    /// Prompt rows that running sequences still need; as counted last.
    pub(super) rows: usize,
    /// Rows that it may still have in the step.
    granted: usize,
}

impl Account {
    fn new(weight: NonZeroU32) -> Self {
        Self {
            weight,
            paid: 0,
            unpaid: 0,
            running: 0,
            waiting: VecDeque::new(),
            next: 0,
            fresh: false,
            out: false,
            blocks: 0,
            rows: 0,
            granted: 0,
        }
    }

    /// How much it was served, by weight, with the prompts that it will be served next.
    pub(super) fn level(&self) -> u128 {
        self.paid + self.price(self.unpaid * PROMPT_COST)
    }

    /// A cost, or any other number, by weight.
    pub(super) fn price(&self, cost: usize) -> u128 {
        cost as u128 * UNIT / u128::from(self.weight.get())
    }

    fn is_active(&self) -> bool {
        self.running > 0 || !self.waiting.is_empty()
    }
}

/// All accounts, with the sequences that wait.
#[derive(Debug, Default)]
pub(super) struct Shares {
    accounts: BTreeMap<Owner, Account>,
    waiting: usize,
    /// Keys by level. Reused.
    order: Vec<(u128, ShareKey)>,
}

impl Shares {
    /// Sequences that wait, for the first time or again.
    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// The accounts of a class.
    pub(super) fn class(&self, priority: Priority) -> impl Iterator<Item = (ShareKey, &Account)> {
        let all = (priority, ShareKey(0))..=(priority, ShareKey(u64::MAX));
        self.accounts.range(all).map(|(&(_, key), account)| (key, account))
    }

    /// The same, to write.
    pub(super) fn class_mut(&mut self, priority: Priority) -> impl Iterator<Item = &mut Account> {
        let all = (priority, ShareKey(0))..=(priority, ShareKey(u64::MAX));
        self.accounts.range_mut(all).map(|(_, account)| account)
    }

    /// One account.
    pub(super) fn get(&self, owner: Owner) -> Option<&Account> {
        self.accounts.get(&owner)
    }

    /// The same, to write.
    pub(super) fn get_mut(&mut self, owner: Owner) -> Option<&mut Account> {
        self.accounts.get_mut(&owner)
    }

    /// Weights of the keys that have anything here.
    pub(super) fn weights(&self, priority: Priority) -> u64 {
        let active = self.class(priority).filter(|(_, account)| account.is_active());
        active.map(|(_, account)| u64::from(account.weight.get())).sum()
    }

    /// A round begins: everybody may be admitted again.
    pub(super) fn begin(&mut self) {
        [Priority::Interactive, Priority::Background].into_iter().for_each(|priority| self.forget(priority));
        for account in self.accounts.values_mut() {
            (account.next, account.out) = (0, false);
        }
    }

    /// Forgets keys without sequences, unless they were served more than one that has some: all of them, when none has.
    fn forget(&mut self, priority: Priority) {
        let active = self.class(priority).filter(|(_, account)| account.is_active());
        let least = active.map(|(_, account)| account.level()).min();
        self.accounts.retain(|owner, account| {
            owner.0 != priority || account.is_active() || least.is_some_and(|least| account.paid > least)
        });
    }

    /// Queues a sequence that has just come. `places`: those that its class divides.
    pub(super) fn arrive(&mut self, sequence: Sequence, places: usize) {
        let owner = owner(&sequence);
        self.forget(owner.0);
        let floor = self.floor(owner, places);
        let account = self.accounts.entry(owner).or_insert_with(|| Account::new(sequence.share.weight));
        account.weight = sequence.share.weight;
        account.fresh |= !account.is_active();
        if account.waiting.is_empty() {
            account.paid += floor.saturating_sub(account.level());
        }
        self.enqueue(sequence);
    }

    /// The least level of the other keys that wait or have their part of the places: everybody else has what it wants, however little that was. Without such
    /// keys that of those who run.
    fn floor(&self, (priority, key): Owner, places: usize) -> u128 {
        let part = Part { whole: places, weights: self.weights(priority) };
        let others = || self.class(priority).filter(|&(other, _)| other != key).map(|(_, account)| account);
        let busy =
            |account: &&Account| !account.waiting.is_empty() || account.running >= part.ceil(account.weight).max(1);
        let least = others().filter(busy).map(Account::level).min();
        least.or_else(|| others().filter(|account| account.running > 0).map(Account::level).min()).unwrap_or(0)
    }

    /// Queues a sequence that ran, at its place.
    pub(super) fn suspend(&mut self, sequence: Sequence) {
        self.leave(&sequence);
        if let Some(account) = self.accounts.get_mut(&owner(&sequence)) {
            account.out = true;
        }
        self.enqueue(sequence);
    }

    fn enqueue(&mut self, sequence: Sequence) {
        let Some(account) = self.accounts.get_mut(&owner(&sequence)) else { return };
        let at = account.waiting.partition_point(|other| other.id < sequence.id);
        account.waiting.insert(at, sequence);
        self.waiting += 1;
    }

    /// Takes a waiting sequence of a key.
    pub(super) fn take(&mut self, owner: Owner, at: usize) -> Option<Sequence> {
        let sequence = self.accounts.get_mut(&owner)?.waiting.remove(at)?;
        self.waiting -= 1;
        Some(sequence)
    }

    /// Takes a waiting sequence by its id.
    pub(super) fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        let place = |account: &Account| account.waiting.binary_search_by_key(&id, |sequence| sequence.id).ok();
        let (key, at) = self.class(id.priority).find_map(|(key, account)| Some((key, place(account)?)))?;
        self.take((id.priority, key), at)
    }

    /// A sequence runs from now on. Its tokens that came from the cache are free.
    pub(super) fn enter(&mut self, sequence: &mut Sequence) {
        sequence.paid = sequence.paid.max(sequence.computed.min(sequence.prompt));
        if let Some(account) = self.accounts.get_mut(&owner(sequence)) {
            account.fresh = false;
            account.running += 1;
            account.unpaid += sequence.unpaid();
        }
    }

    /// A sequence runs no more.
    pub(super) fn leave(&mut self, sequence: &Sequence) {
        if let Some(account) = self.accounts.get_mut(&owner(sequence)) {
            account.running -= 1;
            account.unpaid -= sequence.unpaid();
        }
    }

    /// Tokens up to `computed` are computed, and so many new ones were chosen.
    pub(super) fn charge(&mut self, sequence: &mut Sequence, chosen: usize) {
        let paid = sequence.paid.max(sequence.computed.min(sequence.prompt));
        let new = paid - std::mem::replace(&mut sequence.paid, paid);
        if let Some(account) = self.accounts.get_mut(&owner(sequence)) {
            account.unpaid -= new;
            account.paid += account.price(new * PROMPT_COST + chosen * COMPLETION_COST);
        }
    }

    /// Divides rows among the keys of a class that ask for more than there are: each its part by weight, and what others leave; the least served first.
    pub(super) fn divide(&mut self, priority: Priority, rows: usize, asked: impl Iterator<Item = (ShareKey, usize)>) {
        self.class_mut(priority).for_each(|account| (account.rows, account.granted) = (0, 0));
        for (key, asked) in asked {
            if let Some(account) = self.accounts.get_mut(&(priority, key)) {
                account.rows += asked;
            }
        }
        let mut order = std::mem::take(&mut self.order);
        let asking = || self.class(priority).filter(|(_, account)| account.rows > 0);
        order.extend(asking().map(|(key, account)| (account.level(), key)));
        order.sort_unstable();
        let weights = asking().map(|(_, account)| u64::from(account.weight.get())).sum();
        let part = Part { whole: rows, weights };
        let mut left = rows;
        let mut grant = |most: &dyn Fn(&Account) -> usize| {
            for &(_, key) in &order {
                let Some(account) = self.accounts.get_mut(&(priority, key)) else { continue };
                let more = most(account).min(account.rows - account.granted).min(left);
                account.granted += more;
                left -= more;
            }
        };
        grant(&|account| part.ceil(account.weight));
        grant(&|_| usize::MAX);
        order.clear();
        self.order = order;
    }

    /// Takes up to so many of the rows that a sequence's key was given.
    pub(super) fn draw(&mut self, sequence: &Sequence, rows: usize) -> usize {
        let Some(account) = self.accounts.get_mut(&owner(sequence)) else { return 0 };
        let drawn = rows.min(account.granted);
        account.granted -= drawn;
        drawn
    }

    /// All sequences that wait.
    pub(super) fn all_waiting(&mut self) -> impl Iterator<Item = &mut Sequence> {
        self.accounts.values_mut().flat_map(|account| &mut account.waiting)
    }
}

#[cfg(test)]
impl Shares {
    /// Everything that is kept twice agrees, whatever runs.
    pub(super) fn check(&self, running: &[Sequence]) {
        assert_eq!(self.waiting, self.accounts.values().map(|account| account.waiting.len()).sum::<usize>());
        for (&at, account) in &self.accounts {
            let theirs = || running.iter().filter(|sequence| owner(sequence) == at);
            assert_eq!(account.running, theirs().count());
            assert_eq!(account.unpaid, theirs().map(Sequence::unpaid).sum::<usize>());
            assert!(account.waiting.iter().all(|sequence| owner(sequence) == at && sequence.blocks.is_empty()));
            assert!(account.waiting.iter().zip(account.waiting.iter().skip(1)).all(|(a, b)| a.id < b.id));
        }
        assert!(running.iter().all(|sequence| self.accounts.contains_key(&owner(sequence))));
    }

    /// Accounts, those of keys without sequences included.
    pub(super) fn len(&self) -> usize {
        self.accounts.len()
    }
}
