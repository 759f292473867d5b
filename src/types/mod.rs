//! Names that every room may use: identifiers, hashes and the wall clock, no logic.

pub mod clock;
#[cfg(test)]
pub(crate) mod fuzz;

use std::fmt;

pub use mote_kernel::TokenId;

/// A tenant: the owner of keys, adapters, files and jobs. Made by the store; 1 is the built-in tenant of `--no-auth`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TenantId(pub i64);

/// A row of the adapters table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AdapterId(pub i64);

/// What an adapter *is*: the hash of its numbers, full scheme, sign mask and base. Two uploads of the same facts have
/// the same generation; a name points at one generation at a time.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Generation(pub [u8; 16]);

/// BLAKE3 over the adapted weights of a base model (names, shapes, f32 values) and the version of our conventions.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; 32]);

/// The key under which KV blocks may be shared: the hash of tenant, adapter facts (numbers, full scheme, sign mask, scale or mix) and
/// base. Two requests may read one another's cached blocks only if these are equal.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct CacheSalt(pub [u8; 32]);

/// A hash did not have the right number of lower-case hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected} lower-case hexadecimal digits")]
pub struct ParseHashError {
    /// How many digits a hash of this kind has.
    pub expected: usize,
}

macro_rules! hex_hash {
    ($name:ident, $bytes:literal) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
        impl std::str::FromStr for $name {
            type Err = ParseHashError;
            fn from_str(text: &str) -> Result<Self, ParseHashError> {
                let error = ParseHashError { expected: 2 * $bytes };
                let digits = text.as_bytes();
                if digits.len() != 2 * $bytes {
                    return Err(error);
                }
                let nibble = |c: u8| match c {
                    b'0'..=b'9' => Ok(c - b'0'),
                    b'a'..=b'f' => Ok(c - b'a' + 10),
                    _ => Err(error),
                };
                let mut out = [0u8; $bytes];
                for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
                    *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
                }
                Ok(Self(out))
            }
        }
    };
}
hex_hash!(Generation, 16);
hex_hash!(Fingerprint, 32);
hex_hash!(CacheSalt, 32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_round_trip_and_refuse_other_spellings() {
        let generation = Generation([0xab; 16]);
        assert_eq!(generation.to_string().parse(), Ok(generation));
        assert!("AB".repeat(16).parse::<Generation>().is_err());
        assert!("ab".repeat(15).parse::<Generation>().is_err());
        assert!("é".repeat(16).parse::<Generation>().is_err());
    }
}
