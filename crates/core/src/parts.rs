//! The parts of a body, counted before it is read: what takes two bytes there takes a hundred in memory.

/// Most parts of a body that is read: twice the numbers of the largest answer with vectors.
pub const MOST: usize = 1 << 18;
/// A list or an object takes as much as so many values.
const CONTAINER: usize = 4;

/// The values of a body in JSON, about, without reading them; of a stream of events those of the largest.
pub fn count(body: &[u8]) -> usize {
    let (mut most, mut parts) = (0, 0);
    let (mut is_text, mut is_escaped) = (false, false);
    for (at, byte) in body.iter().enumerate() {
        match byte {
            // No text of JSON has an end of a line in it.
            b'\n' | b'\r' if body.get(at + 1..).is_some_and(|rest| rest.starts_with(b"data:")) => {
                most = most.max(std::mem::take(&mut parts));
                (is_text, is_escaped) = (false, false);
            }
            _ if is_escaped => is_escaped = false,
            b'\\' if is_text => is_escaped = true,
            b'"' => is_text = !is_text,
            b',' | b':' if !is_text => parts += 1,
            b'[' | b'{' if !is_text => parts += CONTAINER,
            _ => {}
        }
    }
    most.max(parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    #[test]
    fn texts_have_no_parts_and_events_are_counted_apart() {
        for (body, parts) in [
            (r#"{"a": [1, 2, 3]}"#, 4 + 1 + 4 + 2),
            (r#""[{,:,\"[,\\""#, 0),
            (r#"["\\", "[[[["]"#, 4 + 1),
            ("", 0),
            ("data: {\"a\": \"\n\ndata: {}\n\ndata: [1, 2]\n", 1 + 4 + 1),
        ] {
            assert_eq!(count(body.as_bytes()), parts, "{body}");
        }
        let vectors = json!({"data": vec![json!({"index": 0, "embedding": vec![0.5; 8_192]}); 15]}).to_string();
        assert!(vectors.len() > MOST && count(vectors.as_bytes()) <= MOST / 2 + 1_000);
    }

    /// The values of a value, it included, and those that hold others.
    fn values(of: &Value) -> (usize, usize) {
        let sum = |all: &mut dyn Iterator<Item = &Value>| {
            all.map(values).fold((1, 1), |sum, of| (sum.0 + of.0, sum.1 + of.1))
        };
        match of {
            Value::Array(all) => sum(&mut all.iter()),
            Value::Object(map) => sum(&mut map.values()),
            _ => (1, 0),
        }
    }

    proptest! {
        #[test]
        fn no_value_is_missed(texts in proptest::collection::vec("\\PC{0,5}", 0..5), depth in 0..4usize) {
            let mut json = json!(texts);
            for text in texts.iter().take(depth) {
                let key = text.as_str();
                json = json!({"a": [json, 1, text], key: {}});
            }
            let (all, holding) = values(&json);
            // Of an object with one member the colon, of one with several the commas too.
            prop_assert!(count(json.to_string().as_bytes()) + 1 >= all + holding);
        }

        #[test]
        fn never_panics(body in proptest::collection::vec(any::<u8>(), 0..60)) {
            count(&body);
        }
    }
}
