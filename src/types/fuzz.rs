//! What the property fuzzers of all rooms share: valid inputs, spoilt. `PROPTEST_CASES=100000 cargo nextest run fuzz` lets them run long.

use proptest::prelude::*;

/// So many cases, or as many as the environment asks for.
pub(crate) fn cases(usual: u32) -> ProptestConfig {
    match std::env::var_os("PROPTEST_CASES") {
        Some(_) => ProptestConfig::default(),
        None => ProptestConfig::with_cases(usual),
    }
}

/// One change of a file.
#[derive(Debug, Clone)]
pub(crate) enum Edit {
    /// A byte overwritten.
    Byte(prop::sample::Index, u8),
    /// Eight bytes overwritten: where a length or a count stands, one that is hostile.
    Length(prop::sample::Index, u64),
    /// A piece copied over another place.
    Copy(prop::sample::Index, prop::sample::Index, u8),
    /// Everything after this cut off.
    Cut(prop::sample::Index),
}

/// Some changes, now and then a cut.
pub(crate) fn edits() -> impl Strategy<Value = Vec<Edit>> {
    let hostile = prop_oneof![
        Just(0u64),
        Just(u64::MAX),
        Just(u64::MAX / 2),
        Just(1 << 40),
        (0u32..64).prop_map(|bits| 1u64 << bits),
        0u64..1000
    ];
    let edit = prop_oneof![
        6 => any::<(prop::sample::Index, u8)>().prop_map(|(at, byte)| Edit::Byte(at, byte)),
        3 => (any::<prop::sample::Index>(), hostile).prop_map(|(at, length)| Edit::Length(at, length)),
        2 => any::<(prop::sample::Index, prop::sample::Index, u8)>().prop_map(|(from, to, n)| Edit::Copy(from, to, n)),
        1 => any::<prop::sample::Index>().prop_map(Edit::Cut),
    ];
    prop::collection::vec(edit, 1..8)
}

/// Applies edits within the first `reach` bytes, where a format's header is.
pub(crate) fn spoil(bytes: &[u8], edits: &[Edit], reach: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for edit in edits {
        let within = bytes.len().min(reach);
        if within == 0 {
            break;
        }
        match edit {
            Edit::Byte(at, byte) => bytes[at.index(within)] = *byte,
            Edit::Length(at, length) => {
                let at = at.index(within);
                bytes[at..].iter_mut().zip(length.to_le_bytes()).for_each(|(byte, new)| *byte = new);
            }
            Edit::Copy(from, to, n) => {
                let (from, to) = (from.index(within), to.index(within));
                let piece = bytes[from..].iter().take(usize::from(*n)).copied().collect::<Vec<_>>();
                bytes[to..].iter_mut().zip(piece).for_each(|(byte, new)| *byte = new);
            }
            Edit::Cut(at) => bytes.truncate(at.index(bytes.len())),
        }
    }
    bytes
}
