//! Numbers as bytes: 26 of them are thirteen little-endian bfloat16.

use half::bf16;

/// How an adapter's numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NumberType {
    /// 2 bytes a number.
    Bf16,
    /// 4 bytes a number.
    F32,
}

impl NumberType {
    /// The name in JSON: `bf16` or `f32`.
    pub fn name(self) -> &'static str {
        match self {
            NumberType::Bf16 => "bf16",
            NumberType::F32 => "f32",
        }
    }

    /// The type of a name.
    pub fn from_name(name: &str) -> Option<Self> {
        [NumberType::Bf16, NumberType::F32].into_iter().find(|dtype| dtype.name() == name)
    }

    /// Bytes a number.
    pub fn size(self) -> usize {
        match self {
            NumberType::Bf16 => 2,
            NumberType::F32 => 4,
        }
    }
}

/// Bytes or numbers that are not an adapter of the scheme.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// Neither length that the scheme could have.
    #[error("expected {expected}, got {actual} bytes")]
    Length {
        /// E.g. `26 bytes (13 numbers of bf16)`.
        expected: String,
        /// How many came.
        actual: usize,
    },
    /// Another count of numbers than the scheme has.
    #[error("expected {expected} numbers, got {actual}")]
    Count {
        /// What the scheme has.
        expected: usize,
        /// How many came.
        actual: usize,
    },
    /// NaN or an infinity, or a number that becomes one in the type it is stored in.
    #[error("number {index} is not finite in {}", .dtype.name())]
    NotFinite {
        /// Which number, from 0.
        index: usize,
        /// The type it is stored in.
        dtype: NumberType,
    },
}

/// Checks bytes against a scheme's count of numbers.
///
/// # Errors
/// A wrong length, which names the right one; NaN or an infinity, which names its place.
pub fn check(bytes: &[u8], dtype: NumberType, numbers: usize) -> Result<(), CodecError> {
    if Some(bytes.len()) != numbers.checked_mul(dtype.size()) {
        let size = numbers.saturating_mul(dtype.size());
        let expected = format!("{size} bytes ({numbers} numbers of {})", dtype.name());
        return Err(CodecError::Length { expected, actual: bytes.len() });
    }
    match numbers_of(bytes, dtype).position(|number| !number.is_finite()) {
        None => Ok(()),
        Some(index) => Err(CodecError::NotFinite { index, dtype }),
    }
}

/// The numbers in bytes that [`check`] has passed; a trailing partial number is dropped.
pub fn numbers_of(bytes: &[u8], dtype: NumberType) -> impl Iterator<Item = f32> + '_ {
    bytes.chunks_exact(dtype.size()).map(move |bytes| match *bytes {
        [a, b] => bf16::from_le_bytes([a, b]).to_f32(),
        [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
        _ => unreachable!("a number has 2 or 4 bytes"),
    })
}

/// Decodes and checks bytes: the numbers of an adapter, group-major, groups in numeric order.
///
/// # Errors
/// As [`check`].
pub fn decode(bytes: &[u8], dtype: NumberType, numbers: usize) -> Result<Vec<f32>, CodecError> {
    check(bytes, dtype, numbers)?;
    Ok(numbers_of(bytes, dtype).collect())
}

/// Encodes numbers, rounding once, half to even.
///
/// # Errors
/// A number that is not finite in that type.
pub fn encode(numbers: &[f32], dtype: NumberType) -> Result<Vec<u8>, CodecError> {
    encode_all(numbers.iter().copied(), dtype, f32::is_finite, |number, out| match dtype {
        NumberType::Bf16 => {
            let rounded = bf16::from_f32(number);
            out.extend_from_slice(&rounded.to_le_bytes());
            rounded.is_finite()
        }
        NumberType::F32 => {
            out.extend_from_slice(&number.to_le_bytes());
            true
        }
    })
}

/// Encodes a client's JSON numbers. As [`encode`], from f64 with a single rounding.
///
/// # Errors
/// Another count than `expected`; a number that is not finite in that type.
pub fn encode_json(numbers: &[f64], dtype: NumberType, expected: usize) -> Result<Vec<u8>, CodecError> {
    if numbers.len() != expected {
        return Err(CodecError::Count { expected, actual: numbers.len() });
    }
    encode_all(numbers.iter().copied(), dtype, f64::is_finite, |number, out| match dtype {
        NumberType::Bf16 => {
            let rounded = bf16::from_f64(number);
            out.extend_from_slice(&rounded.to_le_bytes());
            rounded.is_finite()
        }
        NumberType::F32 => {
            let rounded = number as f32;
            out.extend_from_slice(&rounded.to_le_bytes());
            rounded.is_finite()
        }
    })
}

/// `put` appends a number's bytes and says whether it is still finite.
fn encode_all<T: Copy>(
    numbers: impl ExactSizeIterator<Item = T>,
    dtype: NumberType,
    finite: impl Fn(T) -> bool,
    put: impl Fn(T, &mut Vec<u8>) -> bool,
) -> Result<Vec<u8>, CodecError> {
    let mut out = Vec::with_capacity(numbers.len() * dtype.size());
    for (index, number) in numbers.enumerate() {
        if !finite(number) || !put(number, &mut out) {
            return Err(CodecError::NotFinite { index, dtype });
        }
    }
    Ok(out)
}

/// Tells bf16 from f32 by the length: what an adapter inside a request (`base+<base64url>`) has to be told by.
///
/// # Errors
/// A length that is neither, naming both.
pub fn type_of_length(bytes: usize, numbers: usize) -> Result<NumberType, CodecError> {
    let of = |dtype: NumberType| numbers.checked_mul(dtype.size()) == Some(bytes) && numbers > 0;
    [NumberType::Bf16, NumberType::F32].into_iter().find(|&dtype| of(dtype)).ok_or_else(|| CodecError::Length {
        expected: format!("{} bytes (bf16) or {} bytes (f32)", numbers.saturating_mul(2), numbers.saturating_mul(4)),
        actual: bytes,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn thirteen_numbers_are_26_little_endian_bytes() {
        let numbers: Vec<f32> = (0..13).map(|i| i as f32 * 0.125 - 0.5).collect();
        let bytes = encode(&numbers, NumberType::Bf16).unwrap();
        assert_eq!(bytes.len(), 26);
        assert_eq!(bytes[..2], [0x00, 0xbf], "-0.5 is 0xbf00");
        assert_eq!(decode(&bytes, NumberType::Bf16, 13).unwrap(), numbers);
        assert_eq!(type_of_length(26, 13), Ok(NumberType::Bf16));
        assert_eq!(type_of_length(52, 13), Ok(NumberType::F32));
        let error = type_of_length(25, 13).unwrap_err().to_string();
        assert_eq!(error, "expected 26 bytes (bf16) or 52 bytes (f32), got 25 bytes");
    }

    #[test]
    fn refuses_what_is_not_finite_and_says_where() {
        let nan = [0, 0, 0xc0, 0x7f];
        assert_eq!(check(&nan, NumberType::Bf16, 2).unwrap_err().to_string(), "number 1 is not finite in bf16");
        assert!(check(&f32::INFINITY.to_le_bytes(), NumberType::F32, 1).is_err());
        assert!(encode(&[1.0, f32::NAN], NumberType::F32).is_err());
        assert!(encode(&[f32::MAX], NumberType::F32).is_ok());
        assert!(encode(&[f32::MAX], NumberType::Bf16).is_err(), "rounds to an infinity");
        assert!(encode_json(&[1e39], NumberType::F32, 1).is_err(), "rounds to an infinity");
        assert!(encode_json(&[], NumberType::F32, 1).is_err());
        assert!(check(&[], NumberType::Bf16, 13).is_err());
        assert!(check(&[0; 26], NumberType::Bf16, usize::MAX).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_decode_to_finite_numbers_that_encode_back_or_are_refused(
            bytes in proptest::collection::vec(any::<u8>(), 0..64), numbers in 0usize..20, wide: bool
        ) {
            let dtype = if wide { NumberType::F32 } else { NumberType::Bf16 };
            match decode(&bytes, dtype, numbers) {
                Ok(values) => {
                    prop_assert_eq!(values.len(), numbers);
                    prop_assert!(values.iter().all(|value| value.is_finite()));
                    prop_assert_eq!(encode(&values, dtype).unwrap(), bytes);
                }
                Err(CodecError::Length { actual, .. }) => {
                    prop_assert_eq!(actual, bytes.len());
                    prop_assert_ne!(bytes.len(), numbers * dtype.size());
                }
                Err(CodecError::NotFinite { index, .. }) => {
                    prop_assert!(!numbers_of(&bytes, dtype).nth(index).unwrap().is_finite());
                }
                Err(error) => prop_assert!(false, "{error}"),
            }
        }

        #[test]
        fn json_numbers_round_once(number in -1e30f64..1e30) {
            let bytes = encode_json(&[number], NumberType::Bf16, 1).unwrap();
            let rounded = numbers_of(&bytes, NumberType::Bf16).next().unwrap();
            prop_assert!((f64::from(rounded) - number).abs() <= number.abs() / 256.0 + 1e-38);
        }
    }
}
