//! Keys: made from the system's randomness, stored as hashes, compared in constant time.

use std::{
    fmt,
    hash::{Hash, Hasher},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use subtle::ConstantTimeEq as _;

/// What every generated key begins with.
const PREFIX: &str = "mote-sk-";

/// Characters of a key that are kept to recognise it by. Of a generated key that is the prefix and 24 of 256 bits.
const VISIBLE: usize = 12;

/// The shortest key an operator may choose, in bytes.
const MIN_CHOSEN: usize = 8;

/// The longest bearer token that is looked at.
const MAX_LEN: usize = 256;

/// A key in the clear. It is shown once and never stored.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(String);

impl ApiKey {
    /// A new key: `mote-sk-` and 256 random bits in base64url.
    ///
    /// # Errors
    /// When the system has no randomness to give.
    pub fn generate() -> Result<Self, getrandom::Error> {
        let mut bits = [0u8; 32];
        getrandom::fill(&mut bits)?;
        Ok(Self(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bits))))
    }

    /// A key that an operator chose (`MOTE_ADMIN_KEY`), or None if it is too short, too long, or holds what a header cannot carry.
    pub fn chosen(text: &str) -> Option<Self> {
        let fits = (MIN_CHOSEN..=MAX_LEN).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
        fits.then(|| Self(text.to_owned()))
    }

    /// The key itself.
    pub fn secret(&self) -> &str {
        &self.0
    }

    /// What is stored instead of the key.
    pub fn hash(&self) -> KeyHash {
        KeyHash::of(&self.0)
    }

    /// The first characters, to recognise the key by; of a short key an operator chose no more than a quarter.
    pub fn visible_prefix(&self) -> &str {
        &self.0[..VISIBLE.min(self.0.len() / 4)]
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(..)")
    }
}

/// BLAKE3 of a key, in a context of its own. A plain hash is enough: a key has 256 random bits, so there is nothing to guess.
#[derive(Clone, Copy, Eq)]
pub struct KeyHash(pub [u8; 32]);

impl KeyHash {
    /// The hash of a bearer token.
    pub fn of(token: &str) -> Self {
        Self(blake3::derive_key("mote api key v1", token.as_bytes()))
    }

    /// Could this be a key at all? Checked before any hashing.
    pub fn plausible(token: &str) -> bool {
        (MIN_CHOSEN..=MAX_LEN).contains(&token.len())
    }
}

impl PartialEq for KeyHash {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

/// Agrees with the comparison above, which looks at all bytes.
impl Hash for KeyHash {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyHash(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_differ_and_hide_themselves() {
        let (a, b) = (ApiKey::generate().unwrap(), ApiKey::generate().unwrap());
        assert_ne!(a.secret(), b.secret());
        assert_eq!(a.secret().len(), PREFIX.len() + 43);
        assert!(a.secret().starts_with(a.visible_prefix()));
        assert!(!format!("{a:?} {:?}", a.hash()).contains(&a.secret()[VISIBLE..]));
        assert_eq!(a.hash(), KeyHash::of(a.secret()));
        assert_ne!(a.hash(), b.hash());
    }

    #[test]
    fn a_chosen_key_must_be_long_and_fit_a_header() {
        assert!(ApiKey::chosen("correct-horse-battery-staple").is_some());
        assert!(ApiKey::chosen("short").is_none());
        assert!(ApiKey::chosen("twenty characters and spaces").is_none());
        assert!(ApiKey::chosen(&"k".repeat(257)).is_none());
        assert!(ApiKey::chosen("schlüsselschlüsselschlüssel").is_none());
    }
}
