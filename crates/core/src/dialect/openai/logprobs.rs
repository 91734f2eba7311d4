//! The probabilities of the labels in a chat's answer, where its tokens have theirs (`"logprobs": true`).
//!
//! Source: OpenAI's published API description (`/chat/completions`, `choices[].logprobs.content`): a token's text, the
//! natural logarithm of its probability, and its bytes, if they are no text by themselves.
//!
//! A row's is that of all tokens which its string and the closing mark are in, given what stands before. What is thought
//! before the answer has none.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::thinking;

/// A row's number in an answer has so many digits.
const DIGITS: usize = 3;

/// The numbers of rows in a text, each with the probability of the string behind it: `"417":"billing"`. None, where the
/// tokens are not those of the text, and for a number that has different strings.
pub(super) fn confidences(text: &str, tokens: &Value) -> Vec<(u16, f64)> {
    let Some((tokens, said)) = ends(text, tokens).zip(text.strip_suffix(&*thinking::spoken(text))) else {
        return Vec::new();
    };
    let mut found: BTreeMap<u16, Option<(&str, f64)>> = BTreeMap::new();
    let mut tokens = tokens.iter().peekable();
    let mut rest = text.get(said.len()..).unwrap_or_default();
    while let Some((_, behind)) = rest.split_once('"') {
        rest = behind;
        let Some((id, value)) = number(behind) else { continue };
        let length = value.find(['"', '\\']).unwrap_or(value.len());
        rest = value.get(length..).unwrap_or_default();
        // A string that is cut off, or has an escape in it, is no code.
        let Some(behind) = rest.strip_prefix('"') else { continue };
        let (start, end) = (text.len() - value.len(), text.len() - behind.len());
        rest = behind;
        while tokens.next_if(|(ends, _)| *ends <= start).is_some() {}
        let mut sum = 0.0;
        while let Some((_, log)) = tokens.next_if(|(ends, _)| *ends < end) {
            sum += log;
        }
        // The last one may hold what stands behind the string too.
        sum += tokens.peek().map_or(0.0, |(_, log)| *log);
        let written = value.get(..length).unwrap_or_default();
        let probability = f64::exp(sum).clamp(0.0, 1.0);
        let of_this = found.entry(id).or_insert(Some((written, probability)));
        let least = of_this.filter(|(before, _)| *before == written);
        *of_this = least.map(|(_, before)| (written, before.min(probability)));
    }
    found.into_iter().filter_map(|(id, of)| Some((id, of?.1))).collect()
}

/// The number of a row at the beginning of a text, and the text behind the quotation mark of its string.
fn number(text: &str) -> Option<(u16, &str)> {
    let (digits, rest) = text.split_at_checked(DIGITS)?;
    let is_number = digits.bytes().all(|b| b.is_ascii_digit());
    let value = rest.strip_prefix('"')?.trim_start().strip_prefix(':')?.trim_start().strip_prefix('"')?;
    Some((digits.parse().ok().filter(|_| is_number)?, value))
}

/// Where each token ends in a text, in bytes, and the logarithm of its probability. `None`: they are of another text.
fn ends(text: &str, tokens: &Value) -> Option<Vec<(usize, f64)>> {
    let mut end = 0;
    let mut all = Vec::new();
    for token in tokens.as_array()? {
        // What ends an answer may have a token of its own, which is no part of the text.
        if end == text.len() {
            break;
        }
        let log = token["logprob"].as_f64().filter(|log| *log <= 0.0)?;
        let bytes: Option<Vec<u8>> = token["bytes"]
            .as_array()
            .map(|bytes| bytes.iter().filter_map(|byte| byte.as_u64()?.try_into().ok()).collect());
        let bytes = bytes.unwrap_or_else(|| token["token"].as_str().unwrap_or_default().as_bytes().to_vec());
        if !text.as_bytes().get(end..)?.starts_with(&bytes) {
            return None;
        }
        end += bytes.len();
        all.push((end, log));
    }
    (end == text.len()).then_some(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    /// Tokens with these texts and probabilities.
    fn tokens(all: &[(&str, f64)]) -> Value {
        all.iter()
            .map(|(token, p)| json!({"token": token, "logprob": p.ln(), "bytes": null, "top_logprobs": []}))
            .collect()
    }

    fn of(all: &[(&str, f64)]) -> Vec<(u16, f64)> {
        let text: String = all.iter().map(|(token, _)| *token).collect();
        let round = |(id, p): (u16, f64)| (id, (p * 1e6).round() / 1e6);
        confidences(&text, &tokens(all)).into_iter().map(round).collect()
    }

    #[test]
    fn a_label_has_the_probability_of_its_tokens() {
        let plain = [
            ("{\"", 0.9),
            ("417", 0.5),
            ("\":\"", 0.5),
            ("B", 0.8),
            ("\",\"", 0.5),
            ("902", 0.5),
            ("\":\"", 0.5),
            ("A", 0.25),
            ("\"}", 1.0),
        ];
        assert_eq!(of(&plain), [(417, 0.4), (902, 0.25)]);
        // Several tokens; one that reaches into what is around; white space.
        let more = [("{\n \"417\": ", 0.5), ("\"bil", 0.5), ("ling", 0.5), ("\",", 0.5), (" \"118\" :\"x\"}", 0.5)];
        assert_eq!(of(&more), [(118, 0.5), (417, 0.125)]);
        // A number that comes twice has the lesser, with two labels none.
        assert_eq!(of(&[("{\"417\":\"a\",\"417\":\"", 1.0), ("a", 0.5), ("\"}", 1.0)]), [(417, 0.5)]);
        assert_eq!(of(&[("{\"417\":\"a\",\"417\":\"", 1.0), ("b", 0.5), ("\"}", 1.0)]), []);
        // What is thought is no answer.
        let thought =
            [("<think>\"417\":\"", 1.0), ("b", 0.1), ("\"</think>{\"417\":\"", 1.0), ("a", 0.5), ("\"}", 1.0)];
        assert_eq!(of(&thought), [(417, 0.5)]);
        // vLLM lists the token that ends an answer.
        let text = "{\"417\":\"a\"}";
        let ended = json!([
            {"token": text, "logprob": -0.5}, {"token": "<|im_end|>", "logprob": -9.0, "bytes": b"<|im_end|>"},
        ]);
        assert_eq!(confidences(text, &ended), [(417, f64::exp(-0.5))]);
        // Bytes that are no text by themselves.
        let parts = json!([
            {"token": "{\"417\":\"", "logprob": 0.0, "bytes": null},
            {"token": "\\xc3", "logprob": -0.5, "bytes": [0xc3]}, {"token": "\\xbc", "logprob": -0.5, "bytes": [0xbc]},
            {"token": "\"}", "logprob": 0.0, "bytes": [34, 125]},
        ]);
        let found = confidences("{\"417\":\"ü\"}", &parts);
        assert!(matches!(found[..], [(417, p)] if (p - f64::exp(-1.0)).abs() < 1e-9), "{found:?}");
    }

    #[test]
    fn what_is_not_of_the_text_says_nothing() {
        let text = "{\"417\":\"a\"}";
        let good = tokens(&[("{\"417\":\"", 0.5), ("a", 0.5), ("\"}", 0.5)]);
        assert_eq!(confidences(text, &good).len(), 1);
        for bad in [
            json!(null),
            json!([]),
            json!({"content": []}),
            json!([{"token": text, "logprob": 0.5}]),
            json!([{"token": text, "logprob": null}]),
            json!([{"token": text}]),
            json!([{"token": "{\"417\":\"b\"}", "logprob": -1}]),
            json!([{"token": "{\"417\":\"a", "logprob": -1}]),
        ] {
            assert_eq!(confidences(text, &bad), [], "{bad}");
        }
        for none in [
            "{\"417\":1}",
            "{\"417\":null}",
            "{\"41\":\"a\"}",
            "{\"4177\":\"a\"}",
            "{\"+41\":\"a\"}",
            "{\"417\":\"a",
            "{\"417\":\"a\\n\"}",
            "417: a",
        ] {
            assert_eq!(confidences(none, &tokens(&[(none, 0.5)])), [], "{none}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(parts in proptest::collection::vec("\"|[0-9]{3}|:|\\\\|ü|[a-c {}]", 0..40)) {
            let all: Vec<(&str, f64)> = parts.iter().map(|part| (part.as_str(), 0.5)).collect();
            for (id, p) in of(&all) {
                prop_assert!(id < 1_000 && (0.0..=1.0).contains(&p));
            }
        }
    }
}
