//! Vectors on their way: the bytes of their numbers in single precision, the lowest byte first, in base64.
//!
//! As decimal text a vector takes three times the room, and to write and read its numbers takes longer than all else that
//! is done with a row. No list in JSON can be taken for one: base64 has no bracket.

use serde_json::Value;

const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
/// What is no digit.
const NONE: u8 = 0xff;
/// The value of each byte as a digit. Some write base64 as URLs want it.
const VALUES: [u8; 256] = {
    let mut values = [NONE; 256];
    let mut i = 0;
    while i < DIGITS.len() {
        values[DIGITS[i] as usize] = i as u8;
        i += 1;
    }
    (values[b'-' as usize], values[b'_' as usize]) = (62, 63);
    values
};

/// Bytes of the text of a vector with so many numbers.
pub const fn bytes(dimensions: usize) -> usize {
    (dimensions * 4).div_ceil(3) * 4
}

/// Writes a vector.
pub fn encode(numbers: &[f32]) -> String {
    let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    let mut text = String::with_capacity(self::bytes(numbers.len()));
    for three in bytes.chunks(3) {
        let [a, b, c] = std::array::from_fn(|i| u32::from(three.get(i).copied().unwrap_or_default()));
        let bits = a << 16 | b << 8 | c;
        for i in 0..4 {
            let digit = DIGITS.get((bits >> (18 - 6 * i)) as usize & 63).copied().unwrap_or_default();
            text.push(if i <= three.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

/// Reads a vector; `None` if the text is none.
pub fn decode(text: &str) -> Option<Vec<f32>> {
    let bytes = from_base64(text)?;
    let (numbers, rest) = bytes.as_chunks::<4>();
    rest.is_empty().then(|| numbers.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}

/// The bytes of a text in base64; `None` if it is none.
fn from_base64(text: &str) -> Option<Vec<u8>> {
    let text = text.trim_end_matches('=').as_bytes();
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3 + 2);
    let value = |byte: &u8| VALUES.get(usize::from(*byte)).copied().unwrap_or(NONE);
    let (fours, rest) = text.as_chunks::<4>();
    for four in fours {
        let [a, b, c, d] = four.each_ref().map(value);
        if a | b | c | d > 63 {
            return None;
        }
        let bits = u32::from(a) << 18 | u32::from(b) << 12 | u32::from(c) << 6 | u32::from(d);
        let [_, all @ ..] = bits.to_be_bytes();
        bytes.extend_from_slice(&all);
    }
    let last = rest.iter().map(value).collect::<Vec<u8>>();
    match last.as_slice() {
        [] => {}
        [a, b] if *a | *b < 64 => bytes.push(a << 2 | b >> 4),
        [a, b, c] if *a | *b | *c < 64 => bytes.extend([a << 2 | b >> 4, b << 4 | c >> 2]),
        _ => return None,
    }
    Some(bytes)
}

/// A value that is a vector or a list in JSON, as a list in JSON; `None` if it is a damaged vector.
pub fn to_json(value: &str) -> Option<String> {
    if value.starts_with('[') {
        return Some(value.to_owned());
    }
    // A number that is not finite becomes null.
    serde_json::to_string(&decode(value)?).ok()
}

/// A value that is a vector or a list of numbers in JSON, as a vector; `None` if it is neither.
pub fn from_json(value: &str) -> Option<String> {
    if !value.starts_with('[') {
        return Some(value.to_owned());
    }
    serde_json::from_str::<Vec<f32>>(value).ok().map(|numbers| encode(&numbers))
}

/// A vector as providers write it: a list of numbers, or base64.
pub(crate) fn read(said: &Value) -> Option<Vec<f32>> {
    match said {
        Value::String(text) => decode(text),
        Value::Array(numbers) => numbers.iter().map(|n| n.as_f64().map(|n| n as f32)).collect(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn base64_is_read_as_written_by_others() {
        for (text, bytes) in [
            ("", ""),
            ("Zg==", "f"),
            ("Zm8=", "fo"),
            ("Zm9v", "foo"),
            ("Zm9vYmFy", "foobar"),
            ("Zg", "f"),
            ("Zm8", "fo"),
        ] {
            assert_eq!(from_base64(text).as_deref(), Some(bytes.as_bytes()));
        }
        assert_eq!(from_base64("-_-_"), from_base64("+/+/"));
        for bad in ["Z", "Zm9v Zg", "Zä", "Zm9vZ", "Zm9v=Zg", "Zm9v[", "Z\u{0}==", "Z!", "Zm!"] {
            assert_eq!(from_base64(bad), None, "{bad}");
        }
        assert_eq!(read(&json!("AACAPwAAAMA=")), Some(vec![1.0, -2.0]));
        assert_eq!(read(&json!("AACAPwAA")), None);
        assert_eq!((encode(&[1.0, -2.0]).as_str(), encode(&[]).as_str()), ("AACAPwAAAMA=", ""));
    }

    #[test]
    fn lists_and_vectors_become_one_another() {
        assert_eq!(to_json("AACAPwAAAMA=").as_deref(), Some("[1.0,-2.0]"));
        assert_eq!(to_json("[1, 2]").as_deref(), Some("[1, 2]"));
        assert_eq!(from_json("[1.0, -2]").as_deref(), Some("AACAPwAAAMA="));
        assert_eq!(from_json("AACAPwAAAMA=").as_deref(), Some("AACAPwAAAMA="));
        for bad in ["[1", "[null]", "[\"1\"]", "[[1]]"] {
            assert_eq!(from_json(bad), None, "{bad}");
        }
        assert_eq!(to_json("AACA"), None);
    }

    proptest! {
        /// To the last bit, whatever the bits.
        #[test]
        fn a_vector_is_read_as_it_was_written(bits in proptest::collection::vec(any::<u32>(), 0..40)) {
            let vector: Vec<f32> = bits.iter().map(|bits| f32::from_bits(*bits)).collect();
            let text = encode(&vector);
            prop_assert_eq!(text.len(), bytes(vector.len()));
            let read: Vec<u32> = decode(&text).unwrap().into_iter().map(f32::to_bits).collect();
            prop_assert_eq!(read, bits);
        }

        #[test]
        fn decimals_keep_every_number(vector in proptest::collection::vec(proptest::num::f32::NORMAL, 0..20)) {
            let text = encode(&vector);
            prop_assert_eq!(from_json(&to_json(&text).unwrap()), Some(text));
        }

        #[test]
        fn never_panics(text in "\\PC{0,40}", coded in "[A-Za-z0-9+/=_-]{0,40}") {
            for text in [text, coded] {
                let _ = (read(&json!(text)), to_json(&text), from_json(&text));
            }
        }
    }
}
