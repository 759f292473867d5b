//! Vectors of f32 in JSON, exactly: eight hexadecimal digits a number, its bits. Decimal text would be read through f64 and is not defined for infinities.

use serde::{Deserialize, Deserializer, Serializer, de::Error};

/// Writes the numbers' bits as one string.
pub(crate) fn serialize<S: Serializer>(numbers: &[f32], serializer: S) -> Result<S::Ok, S::Error> {
    use std::fmt::Write;
    let mut text = String::with_capacity(8 * numbers.len());
    for number in numbers {
        write!(text, "{:08x}", number.to_bits()).map_err(serde::ser::Error::custom)?;
    }
    serializer.serialize_str(&text)
}

/// Reads what [`serialize`] wrote.
pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<f32>, D::Error> {
    let text = String::deserialize(deserializer)?;
    if !text.len().is_multiple_of(8) || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(D::Error::custom("numbers are eight hexadecimal digits each"));
    }
    let number = |digits: &[u8]| {
        let digits = std::str::from_utf8(digits).map_err(D::Error::custom)?;
        u32::from_str_radix(digits, 16).map(f32::from_bits).map_err(D::Error::custom)
    };
    text.as_bytes().chunks(8).map(number).collect()
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    #[derive(Serialize, Deserialize)]
    struct Holder(#[serde(with = "super")] Vec<f32>);

    #[test]
    fn every_bit_survives() {
        let numbers = vec![0.0, -0.0, 1.0 / 3.0, f32::MIN_POSITIVE / 2.0, f32::MAX, f32::INFINITY, 1e-45];
        let text = serde_json::to_string(&Holder(numbers.clone())).unwrap();
        let back: Holder = serde_json::from_str(&text).unwrap();
        assert!(back.0.iter().zip(&numbers).all(|(a, b)| a.to_bits() == b.to_bits()));
        for wrong in ["\"123\"", "\"zzzzzzzz\"", "\"é1234567\"", "\"+1234567\"", "7"] {
            assert!(serde_json::from_str::<Holder>(wrong).is_err(), "{wrong}");
        }
    }
}
