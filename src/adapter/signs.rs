//! The signs under which an imported checkpoint's singular vectors differ from ours.

/// One sign a site and singular pair: D = diag(+-1). A core made under other signs is `D C D` under ours.
///
/// D and -D mean the same, so a site's first sign is always +; equal masks are equal bytes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SignMask {
    rank: u32,
    /// Bit `site * rank + k`, least significant first; 1 is a minus.
    bits: Box<[u8]>,
}

/// Bytes that are no sign mask of the model and rank.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a sign mask of {sites} sites and rank {rank} has {expected} bytes, not {actual}")]
pub struct SignMaskError {
    sites: usize,
    rank: usize,
    expected: usize,
    actual: usize,
}

impl SignMask {
    /// From `[sites, rank]` flags, true for a minus. None if D is plus or minus the identity everywhere.
    pub fn new(sites: usize, rank: usize, negative: impl Fn(usize, usize) -> bool) -> Option<Self> {
        let mut bits = vec![0u8; (sites * rank).div_ceil(8)];
        for site in 0..sites {
            for k in 1..rank {
                let bit = site * rank + k;
                bits[bit / 8] |= u8::from(negative(site, k) != negative(site, 0)) << (bit % 8);
            }
        }
        bits.iter().any(|&byte| byte != 0).then(|| Self { rank: rank as u32, bits: bits.into() })
    }

    /// +1 or -1: how the k-th singular pair of the checkpoint relates to ours. +1 outside the mask.
    pub fn sign(&self, site: usize, k: usize) -> f32 {
        let bit = site * self.rank as usize + k;
        match self.bits.get(bit / 8) {
            Some(byte) if k < self.rank as usize && byte >> (bit % 8) & 1 == 1 => -1.0,
            _ => 1.0,
        }
    }

    /// The rank it was made for.
    pub fn rank(&self) -> usize {
        self.rank as usize
    }

    /// Is it of so many sites and this rank?
    pub fn fits(&self, sites: usize, rank: usize) -> bool {
        self.rank() == rank && self.bits.len() == sites.saturating_mul(rank).div_ceil(8)
    }

    /// What a store keeps.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bits
    }

    /// What a store kept.
    ///
    /// # Errors
    /// Another length than a mask of so many sites and this rank has.
    pub fn from_bytes(bytes: &[u8], sites: usize, rank: usize) -> Result<Self, SignMaskError> {
        let expected = sites.saturating_mul(rank).div_ceil(8);
        if bytes.len() != expected {
            return Err(SignMaskError { sites, rank, expected, actual: bytes.len() });
        }
        Ok(Self { rank: rank as u32, bits: bytes.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_relative_signs_and_nothing_else() {
        assert_eq!(SignMask::new(3, 2, |_, _| false), None);
        assert_eq!(SignMask::new(3, 2, |_, _| true), None, "D and -D are one");
        let mask = SignMask::new(5, 3, |site, k| (site + k) % 3 == 0).unwrap();
        for site in 0..5 {
            let sign = |k: usize| if (site + k).is_multiple_of(3) { -1.0 } else { 1.0 };
            assert!((0..3).all(|k| mask.sign(site, k) == sign(k) * sign(0)));
        }
        assert_eq!(mask.sign(0, 3), 1.0, "beyond the rank");
        assert_eq!(SignMask::from_bytes(mask.as_bytes(), 5, 3).unwrap(), mask);
        assert!(SignMask::from_bytes(mask.as_bytes(), 6, 3).is_err());
    }
}
