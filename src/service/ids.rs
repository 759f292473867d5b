//! Adapters' public ids: their numbers under a cipher, since a number counts what all tenants write.

use blowfish::{
    Blowfish,
    cipher::{Block, BlockCipherDecrypt as _, BlockCipherEncrypt as _, KeyInit as _},
};

use crate::{
    store::{Result, Store, StoreError},
    types::AdapterId,
};

/// Where the store keeps the key.
const META: &str = "adapter_id_key";

/// A database's key. Whoever has it can count writes, and nothing else.
pub(super) struct AdapterIds(Blowfish);

impl std::fmt::Debug for AdapterIds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AdapterIds")
    }
}

impl AdapterIds {
    /// Reads the store's key, or makes it.
    ///
    /// # Errors
    /// The database's, and [`StoreError::Corrupt`] for a key that is none.
    pub(super) async fn open(store: &Store) -> Result<Self> {
        let key = match store.meta(META).await? {
            Some(key) => key,
            None => store.meta_or_set(META, new_key()?).await?,
        };
        Self::new(key.as_bytes()).ok_or(StoreError::Corrupt("key of adapter ids"))
    }

    fn new(key: &[u8]) -> Option<Self> {
        Some(Self(Blowfish::new_from_slice(key).ok()?))
    }

    /// `adapter-` and 16 hexadecimal digits.
    pub(super) fn show(&self, id: AdapterId) -> String {
        let mut block = Block::<Blowfish>::from(id.0.to_be_bytes());
        self.0.encrypt_block(&mut block);
        format!("adapter-{:016x}", u64::from_be_bytes(block.into()))
    }

    /// The number behind such an id. Any 16 digits have one; whether it is an adapter's is the store's to say.
    pub(super) fn parse(&self, text: &str) -> Option<AdapterId> {
        let digits = text.strip_prefix("adapter-").filter(|digits| digits.len() == 16 && !digits.starts_with('+'))?;
        let number = u64::from_str_radix(digits, 16).ok()?;
        let mut block = Block::<Blowfish>::from(number.to_be_bytes());
        self.0.decrypt_block(&mut block);
        Some(AdapterId(i64::from_be_bytes(block.into())))
    }
}

/// 128 bits in hexadecimal digits.
fn new_key() -> Result<String> {
    let mut key = [0_u8; 16];
    getrandom::fill(&mut key).map_err(|_| StoreError::Corrupt("the system's random numbers"))?;
    Ok(format!("{:032x}", u128::from_be_bytes(key)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_come_back_and_tell_no_order() {
        let ids = AdapterIds::new(b"00112233445566778899aabbccddeeff").unwrap();
        let shown: Vec<_> = (1..100).map(|number| ids.show(AdapterId(number))).collect();
        for (number, id) in (1..100).zip(&shown) {
            assert_eq!(ids.parse(id), Some(AdapterId(number)));
        }
        // 98 steps of a counter would all rise; of a cipher about half do.
        let rising = shown.windows(2).filter(|pair| pair[0] < pair[1]).count();
        assert!((30..70).contains(&rising), "{rising}");
        let other = AdapterIds::new(b"ffeeddccbbaa99887766554433221100").unwrap();
        assert_ne!(other.show(AdapterId(1)), shown[0]);
    }

    #[test]
    fn what_is_no_id_is_none() {
        let ids = AdapterIds::new(b"00112233445566778899aabbccddeeff").unwrap();
        for text in
            ["", "adapter-", "adapter-1", "adapter-zzzzzzzzzzzzzzzz", "adapter-+00000000000002a", "0000000000000001"]
        {
            assert_eq!(ids.parse(text), None, "{text}");
        }
        // Numbers that no adapter has are numbers too.
        assert!(ids.parse("adapter-ffffffffffffffff").is_some());
    }
}
