//! What an adapter's numbers mean: the scheme that turns them into one core a site.

mod json;
#[cfg(test)]
mod tests;

use super::{SiteKind, Sites};

/// Numbers an adapter may have. Far above any use (the paper stops at full LoRA-XS of a 7B model); a bound on what one
/// upload can make the server hold.
pub const MAX_NUMBERS: usize = 1 << 18;
/// Numbers a tie group may have.
pub const MAX_U: usize = 4096;
/// Values `sites * u * r * r` that the projections of a scheme may have: 16 MiB of f32, a tenth of a second to draw.
pub const MAX_PROJECTION_VALUES: usize = 1 << 22;
/// Rank a scheme may have, whatever the server's own limit.
pub const MAX_RANK: usize = 256;

/// How numbers become a core (METHOD: `S` are the singular values of the site, `P` fixed random matrices).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Convention {
    /// `sqrt(S) (sum_i v_i P_i) sqrt(S)`, as Hugging Face PEFT computes it.
    Peft,
    /// `S sum_i v_i P_i`, as the TinyLoRA paper writes it (arXiv 2602.04118).
    Paper,
    /// `S R` with all `r * r` entries of R trained (arXiv 2405.17604). Has no `u`, ties, seed or projection.
    LoraXs,
}

impl Convention {
    /// The name in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Convention::Peft => "peft",
            Convention::Paper => "paper",
            Convention::LoraXs => "lora-xs",
        }
    }
}

/// Which targeted sites share one vector of `u` numbers. `n` is the number of targeted sites, numbered in model order.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Ties {
    /// PEFT's tiling with so many groups: `group(i) = min(i / max(1, n / count), count - 1)`.
    /// With more groups than sites the surplus numbers exist and do nothing: 13 groups are 26 bytes on any model.
    Groups {
        /// Tie groups, at least 1.
        count: usize,
    },
    /// The same tiling with `max(1, round_half_even(n (1 - weight_tying)))` groups, in f64 as PEFT computes it.
    Peft {
        /// 0 (no ties) to 1 (one group).
        weight_tying: f64,
    },
    /// Consecutive sites whatever their kind: `group(i) = i / n_tie`.
    Tiled {
        /// Sites a group, at least 1.
        n_tie: usize,
    },
    /// Consecutive layers of the same kind. Groups are numbered kind by kind in the order q, k, v, o, gate, up, down.
    Structured {
        /// Sites a group, at least 1.
        n_tie: usize,
    },
}

/// A set of site kinds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Targets(u8);

impl Targets {
    /// All seven kinds.
    pub const ALL: Targets = Targets(0x7f);
    /// None: not a valid scheme.
    pub const NONE: Targets = Targets(0);

    /// This set and one more kind.
    pub fn with(self, kind: SiteKind) -> Self {
        Self(self.0 | 1 << kind as u8)
    }

    /// Is the kind in the set?
    pub fn contains(self, kind: SiteKind) -> bool {
        self.0 & 1 << kind as u8 != 0
    }

    /// The kinds in the order of a layer.
    pub fn iter(self) -> impl Iterator<Item = SiteKind> {
        SiteKind::ALL.into_iter().filter(move |&kind| self.contains(kind))
    }

    /// How many kinds.
    pub fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// True for the empty set.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// The precision that PEFT's projections were held in: they follow the dtype of the base that the adapter was made on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProjectionDtype {
    /// As drawn.
    F32,
    /// Rounded to bfloat16 (half to even).
    Bf16,
}

/// How an adapter's numbers become cores: everything but the numbers and the basis.
///
/// Fields are public to read; a scheme from outside goes through [`Scheme::from_json`] and [`Scheme::validate`].
#[derive(Debug, Clone, PartialEq)]
pub struct Scheme {
    /// The formula of the core.
    pub convention: Convention,
    /// r: singular triplets of a site that the core acts on.
    pub rank: usize,
    /// Numbers a tie group (1 for LoRA-XS, which has none).
    pub u: usize,
    /// Which sites share numbers.
    pub ties: Ties,
    /// Seed of the projections; site i of the targeted ones draws from `seed + i`.
    pub seed: u64,
    /// Adapted kinds of sites.
    pub targets: Targets,
    /// Precision of the projections.
    pub projection: ProjectionDtype,
}

/// A scheme that cannot be used; [`SchemeError::path`] names the field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SchemeError {
    /// A string that names no scheme.
    #[error("scheme: there is no scheme named '{0}'; known are tiny13, u13-tied and paper16, or give an object")]
    UnknownName(String),
    /// A key that means nothing, which is more likely a misspelling than a wish.
    #[error("{path}: unknown key; known are {known}")]
    UnknownKey {
        /// Where, e.g. `scheme.rnk`.
        path: String,
        /// What could have been meant.
        known: String,
    },
    /// A value of the wrong type or out of range.
    #[error("{path}: {message}")]
    Invalid {
        /// Where, e.g. `scheme.ties.count`.
        path: String,
        /// What is wrong with it.
        message: String,
    },
}

impl SchemeError {
    pub(super) fn invalid(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid { path: path.into(), message: message.into() }
    }

    /// The offending field, e.g. `scheme.rank`.
    pub fn path(&self) -> &str {
        match self {
            Self::UnknownName(_) => "scheme",
            Self::UnknownKey { path, .. } | Self::Invalid { path, .. } => path,
        }
    }
}

/// A targeted site and what the scheme says about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Assignment {
    /// Number of the site in [`Sites`].
    pub site: usize,
    /// Number among the targeted sites (PEFT's `layer_idx`): shifts the seed of the projection.
    pub layer_idx: usize,
    /// Which slice of the numbers it uses.
    pub group: usize,
}

impl Default for Scheme {
    /// `tiny13`.
    fn default() -> Self {
        Self::tiny13()
    }
}

impl Scheme {
    /// The named schemes, the default first.
    pub const PRESETS: [&'static str; 3] = ["tiny13", "u13-tied", "paper16"];

    /// PEFT's core and projections, r 2, u 1, 13 groups, seed 42: 13 numbers on every model.
    pub fn tiny13() -> Self {
        Self {
            convention: Convention::Peft,
            rank: 2,
            u: 1,
            ties: Ties::Groups { count: 13 },
            seed: 42,
            targets: Targets::ALL,
            projection: ProjectionDtype::F32,
        }
    }

    /// `tiny13` with its 13 numbers in one group that all sites share.
    pub fn u13_tied() -> Self {
        Self { u: 13, ties: Ties::Groups { count: 1 }, ..Self::tiny13() }
    }

    /// The paper's own: its core, tiled ties of 16 sites (13 groups on the 196 sites of a 7B model).
    pub fn paper16() -> Self {
        Self { convention: Convention::Paper, ties: Ties::Tiled { n_tie: 16 }, ..Self::tiny13() }
    }

    /// LoRA-XS of a rank; the fields that do not apply have one fixed value, so that equal schemes are equal.
    pub fn lora_xs(rank: usize, targets: Targets) -> Self {
        Self {
            convention: Convention::LoraXs,
            rank,
            u: 1,
            ties: Ties::Tiled { n_tie: 1 },
            seed: 0,
            targets,
            projection: ProjectionDtype::F32,
        }
    }

    /// The scheme of a name.
    pub fn preset(name: &str) -> Option<Self> {
        match name {
            "tiny13" => Some(Self::tiny13()),
            "u13-tied" => Some(Self::u13_tied()),
            "paper16" => Some(Self::paper16()),
            _ => None,
        }
    }

    /// The name of this scheme, if it has one.
    pub fn name(&self) -> Option<&'static str> {
        Self::PRESETS.into_iter().find(|name| Self::preset(name).as_ref() == Some(self))
    }

    /// Number of targeted sites.
    pub fn targeted(&self, sites: &Sites) -> usize {
        sites.layers.saturating_mul(self.targets.len())
    }

    /// Number of tie groups (of targeted sites for LoRA-XS).
    pub fn groups(&self, sites: &Sites) -> usize {
        let n = self.targeted(sites);
        match self.ties {
            Ties::Groups { count } => count.max(1),
            Ties::Peft { weight_tying } => peft_groups(n, weight_tying),
            Ties::Tiled { n_tie } => n.div_ceil(n_tie.max(1)),
            Ties::Structured { n_tie } => self.targets.len() * sites.layers.div_ceil(n_tie.max(1)),
        }
    }

    /// Numbers of a group: `u`, or `r * r` for LoRA-XS.
    pub fn group_size(&self) -> usize {
        match self.convention {
            Convention::LoraXs => self.rank.saturating_mul(self.rank),
            _ => self.u,
        }
    }

    /// How many numbers an adapter of this scheme has, group-major.
    pub fn numbers(&self, sites: &Sites) -> usize {
        self.groups(sites).saturating_mul(self.group_size())
    }

    /// Every targeted site with its group, in model order.
    pub fn assignments(&self, sites: &Sites) -> Vec<Assignment> {
        let (n, groups) = (self.targeted(sites), self.groups(sites));
        let tile = (n / groups.max(1)).max(1);
        let targeted = (0..sites.len()).filter(|&site| self.targets.contains(sites.at(site).1));
        targeted
            .enumerate()
            .map(|(layer_idx, site)| {
                let group = match self.ties {
                    Ties::Groups { .. } | Ties::Peft { .. } => (layer_idx / tile).min(groups - 1),
                    Ties::Tiled { n_tie } => layer_idx / n_tie.max(1),
                    Ties::Structured { n_tie } => {
                        let (layer, kind) = sites.at(site);
                        let kinds_before = self.targets.iter().take_while(|&other| other != kind).count();
                        kinds_before * sites.layers.div_ceil(n_tie.max(1)) + layer / n_tie.max(1)
                    }
                };
                Assignment { site, layer_idx, group }
            })
            .collect()
    }

    /// Checks the scheme against a model and the largest rank served.
    ///
    /// # Errors
    /// A field out of range, or a scheme with more numbers or projection values than the caps above, named by its path.
    pub fn validate(&self, sites: &Sites, served_rank: usize) -> Result<(), SchemeError> {
        self.check_ranges()?;
        let invalid = |path: &str, message: String| Err(SchemeError::invalid(path, message));
        if self.rank > served_rank {
            return invalid("scheme.rank", format!("{} is above the largest rank served, {served_rank}", self.rank));
        }
        for kind in self.targets.iter() {
            let (outputs, inputs) = sites.shapes[kind as usize];
            if self.rank > outputs.min(inputs) {
                let message = format!("{} is above what site '{}' [{outputs}, {inputs}] has", self.rank, kind.name());
                return invalid("scheme.rank", message);
            }
        }
        if sites.is_empty() {
            return invalid("scheme.targets", "the model has no layers to adapt".into());
        }
        let numbers = self.numbers(sites);
        if numbers > MAX_NUMBERS {
            return invalid("scheme", format!("makes {numbers} numbers; at most {MAX_NUMBERS} are allowed"));
        }
        let values = self.projection_values(sites);
        if values > MAX_PROJECTION_VALUES {
            let message = format!("needs {values} projection values; at most {MAX_PROJECTION_VALUES} are allowed");
            return invalid("scheme.u", message);
        }
        Ok(())
    }

    /// Values in the projections of all targeted sites: `n * u * r * r`, 0 for LoRA-XS.
    pub fn projection_values(&self, sites: &Sites) -> usize {
        match self.convention {
            Convention::LoraXs => 0,
            _ => self.targeted(sites).saturating_mul(self.u).saturating_mul(self.rank).saturating_mul(self.rank),
        }
    }

    /// What can be said without a model.
    pub(super) fn check_ranges(&self) -> Result<(), SchemeError> {
        let range = |path: &str, value: usize, most: usize| match value {
            v if (1..=most).contains(&v) => Ok(()),
            v => Err(SchemeError::invalid(path, format!("{v} is out of range 1..={most}"))),
        };
        range("scheme.rank", self.rank, MAX_RANK)?;
        range("scheme.u", self.u, MAX_U)?;
        match self.ties {
            Ties::Groups { count } => range("scheme.ties.count", count, MAX_NUMBERS)?,
            Ties::Tiled { n_tie } | Ties::Structured { n_tie } => range("scheme.ties.n_tie", n_tie, MAX_NUMBERS)?,
            Ties::Peft { weight_tying } if (0.0..=1.0).contains(&weight_tying) => {}
            Ties::Peft { weight_tying } => {
                let message = format!("{weight_tying} is out of range 0..=1");
                return Err(SchemeError::invalid("scheme.ties.weight_tying", message));
            }
        }
        if self.seed > i64::MAX as u64 {
            return Err(SchemeError::invalid("scheme.seed", format!("{} is above 2^63 - 1", self.seed)));
        }
        if self.targets.is_empty() {
            return Err(SchemeError::invalid("scheme.targets", "at least one kind of site is needed"));
        }
        Ok(())
    }

    /// A fixed-layout encoding: equal bytes, equal scheme. For hashing and interning; not meant to be read back.
    pub fn canonical_bytes(&self) -> [u8; 44] {
        let (kind, amount) = match self.ties {
            Ties::Groups { count } => (0u8, count as u64),
            // Adding 0 turns -0.0 into 0.0: they are equal, so their bytes must be.
            Ties::Peft { weight_tying } => (1, (weight_tying + 0.0).to_bits()),
            Ties::Tiled { n_tie } => (2, n_tie as u64),
            Ties::Structured { n_tie } => (3, n_tie as u64),
        };
        let mut out = [0u8; 44];
        out[..8].copy_from_slice(b"scheme.1");
        out[8] = self.convention as u8;
        out[9..17].copy_from_slice(&(self.rank as u64).to_le_bytes());
        out[17..25].copy_from_slice(&(self.u as u64).to_le_bytes());
        out[25] = kind;
        out[26..34].copy_from_slice(&amount.to_le_bytes());
        out[34..42].copy_from_slice(&self.seed.to_le_bytes());
        out[42] = self.targets.0;
        out[43] = self.projection as u8;
        out
    }
}

/// PEFT's number of tie groups. In f64: `35 * (1 - 0.9)` rounds to 3 there and to 4 in f32.
pub(super) fn peft_groups(n: usize, weight_tying: f64) -> usize {
    ((n as f64 * (1.0 - weight_tying)).round_ties_even() as usize).max(1)
}
