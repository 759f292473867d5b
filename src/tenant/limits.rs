//! How much one tenant may use: the server's defaults, and what an admin set for it.

/// A bound that an admin set for one tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// No bound, whatever the default is.
    Unlimited,
    /// At most so many.
    Most(u64),
}

/// What a bound may be at most: every JSON reader has it exactly, and it fits the store's numbers.
pub const MAX_BOUND: u64 = (1 << 53) - 1;

/// The largest weight.
pub const MAX_WEIGHT: u32 = 1000;

/// A number that is no bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be -1 (no limit) or from 0 to {MAX_BOUND}")]
pub struct BoundError;

impl Bound {
    /// -1 is no bound.
    ///
    /// # Errors
    /// A number below -1, or above [`MAX_BOUND`].
    pub fn from_number(number: i64) -> Result<Self, BoundError> {
        match u64::try_from(number) {
            Ok(most) if most <= MAX_BOUND => Ok(Self::Most(most)),
            Err(_) if number == -1 => Ok(Self::Unlimited),
            _ => Err(BoundError),
        }
    }

    /// The number that [`Self::from_number`] reads.
    pub fn number(self) -> i64 {
        match self {
            Self::Unlimited => -1,
            Self::Most(most) => i64::try_from(most).unwrap_or(i64::MAX),
        }
    }
}

macro_rules! limits {
    ($($(#[$words:meta])* $name:ident,)*) => {
        /// How much one tenant may use. None: no bound.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub struct Limits {
            $($(#[$words])* pub $name: Option<u64>,)*
            /// Its share of the engine beside the other tenants', 1 to [`MAX_WEIGHT`].
            pub weight: u32,
        }

        /// What an admin set for one tenant. None: the server's default.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct Overrides {
            $($(#[$words])* pub $name: Option<Bound>,)*
            /// Its share of the engine beside the other tenants', 1 to [`MAX_WEIGHT`].
            pub weight: Option<u32>,
        }

        /// What to change of a tenant's [`Overrides`]. The outer None leaves as it is, the inner one goes back to the default.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct LimitChanges {
            $($(#[$words])* pub $name: Option<Option<Bound>>,)*
            /// Its share of the engine beside the other tenants', 1 to [`MAX_WEIGHT`].
            pub weight: Option<Option<u32>>,
        }

        impl Default for Limits {
            /// No bounds.
            fn default() -> Self {
                Self { $($name: None,)* weight: 1 }
            }
        }

        impl Limits {
            /// These as defaults under what was set for a tenant.
            pub fn under(self, overrides: &Overrides) -> Self {
                let bound = |default, set: Option<Bound>| match set {
                    None => default,
                    Some(Bound::Unlimited) => None,
                    Some(Bound::Most(most)) => Some(most),
                };
                Self {
                    $($name: bound(self.$name, overrides.$name),)*
                    weight: overrides.weight.unwrap_or(self.weight),
                }
            }
        }

        impl Overrides {
            /// The names of the bounds, in the order of [`Self::bounds`].
            pub const NAMES: [&'static str; [$(stringify!($name)),*].len()] = [$(stringify!($name)),*];

            /// Every bound, in the order of [`Self::NAMES`].
            pub fn bounds(&self) -> [Option<Bound>; Self::NAMES.len()] {
                [$(self.$name),*]
            }

            /// From bounds in the order of [`Self::NAMES`].
            pub fn new(bounds: [Option<Bound>; Self::NAMES.len()], weight: Option<u32>) -> Self {
                let [$($name),*] = bounds;
                Self { $($name,)* weight }
            }

            /// Changes what is to be changed.
            pub fn change(&mut self, changes: &LimitChanges) {
                $(if let Some(bound) = changes.$name { self.$name = bound; })*
                if let Some(weight) = changes.weight {
                    self.weight = weight;
                }
            }
        }

        impl LimitChanges {
            /// What is changed, by name: the new number, or None for the default. For the audit log.
            pub fn named(&self) -> Vec<(&'static str, Option<i64>)> {
                let mut named = Vec::new();
                $(if let Some(bound) = self.$name { named.push((stringify!($name), bound.map(Bound::number))); })*
                named.extend(self.weight.map(|weight| ("weight", weight.map(i64::from))));
                named
            }
        }
    };
}

limits! {
    /// Adapters that it may have.
    adapters,
    /// Bytes of its adapters (numbers of every generation, and metadata), its files, and its jobs (what they were asked, and their data until they end) together.
    stored_bytes,
    /// Requests under way at once.
    concurrent_requests,
    /// Requests a minute.
    requests_per_minute,
    /// Tokens a minute: prompts, and as many completion tokens as were asked for until the request ends.
    tokens_per_minute,
    /// Training jobs that run at once.
    running_jobs,
    /// Training jobs under way: queued, running or paused.
    queued_jobs,
    /// Tokens of completions and demonstrations that its jobs may train on in a day (UTC).
    trained_tokens_per_day,
}

/// What a tenant's stored things may come to; the store checks it in the transaction that writes them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Room {
    /// Adapters at most.
    pub adapters: Option<u64>,
    /// Bytes at most.
    pub bytes: Option<u64>,
}

impl Limits {
    /// What bounds its stored things.
    pub fn room(&self) -> Room {
        Room { adapters: self.adapters, bytes: self.stored_bytes }
    }
}

/// What a tenant used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Requests to metered routes that were let in.
    pub requests: u64,
    /// Each prompt once, whatever the number of choices.
    pub prompt_tokens: u64,
    /// Tokens sampled.
    pub completion_tokens: u64,
    /// Tokens of completions and demonstrations in training.
    pub trained_tokens: u64,
}

impl Usage {
    /// Adds another's counts.
    pub fn add(&mut self, other: &Usage) {
        self.requests += other.requests;
        self.prompt_tokens += other.prompt_tokens;
        self.completion_tokens += other.completion_tokens;
        self.trained_tokens += other.trained_tokens;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_numbers_and_minus_one_is_none() {
        for bound in [Bound::Unlimited, Bound::Most(0), Bound::Most(7), Bound::Most(MAX_BOUND)] {
            assert_eq!(Bound::from_number(bound.number()), Ok(bound));
        }
        for number in [-2, i64::MIN, i64::MAX, MAX_BOUND as i64 + 1] {
            assert_eq!(Bound::from_number(number), Err(BoundError), "{number}");
        }
    }

    #[test]
    fn what_was_set_counts_over_the_default_and_the_rest_stays() {
        let defaults = Limits { adapters: Some(5), requests_per_minute: Some(9), ..Limits::default() };
        let mut set = Overrides::default();
        assert_eq!(defaults.under(&set), defaults);
        let changes = LimitChanges {
            adapters: Some(Some(Bound::Unlimited)),
            tokens_per_minute: Some(Some(Bound::Most(0))),
            weight: Some(Some(7)),
            ..LimitChanges::default()
        };
        set.change(&changes);
        let own = defaults.under(&set);
        assert_eq!((own.adapters, own.requests_per_minute, own.tokens_per_minute), (None, Some(9), Some(0)));
        assert_eq!(own.weight, 7);
        assert_eq!(changes.named(), [("adapters", Some(-1)), ("tokens_per_minute", Some(0)), ("weight", Some(7))]);
        assert_eq!(Overrides::new(set.bounds(), set.weight), set);
        set.change(&LimitChanges { adapters: Some(None), ..LimitChanges::default() });
        assert_eq!((defaults.under(&set).adapters, set.weight), (Some(5), Some(7)));
    }
}
