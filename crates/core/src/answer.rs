//! Reading an answer: which row got which label. The text is foreign; anything may be in it.
//!
//! Every answer carries the id of its row, so a model that drops, repeats or invents one can't shift the others.
//! The reader walks all JSON in the text (prose and code fences around it do not matter), keeps each complete pair of
//! an id and a code, also of a text that was cut off, and then holds the pairs against the ids that were asked.

use std::collections::HashMap;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use crate::codes::Legend;

/// What an answer says about one row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The index of the row's label.
    Label(usize),
    /// The answer does not name the row.
    Missing,
    /// The answer names the row with a code that is not in the legend.
    UnknownCode,
    /// The answer names the row more than once, and not with the same code.
    Contradicted,
}

/// Most places in a text at which JSON is looked for: bounds the work on hostile texts.
const MOST_STARTS: usize = 16;
/// Deepest nesting that is walked.
const MOST_DEPTH: usize = 8;

/// Holds `text` against the ids that were asked; the verdicts are in the order of `ids`.
pub fn read(text: &str, ids: &[u16], legend: &Legend) -> Vec<Verdict> {
    let index: HashMap<u16, usize> = ids.iter().enumerate().map(|(i, id)| (*id, i)).collect();
    let mut verdicts = vec![Verdict::Missing; ids.len()];
    for (id, code) in pairs(text) {
        let Some(slot) = parse_id(&id).and_then(|id| index.get(&id)).and_then(|i| verdicts.get_mut(*i)) else {
            continue;
        };
        let now = legend.resolve(&code).map_or(Verdict::UnknownCode, Verdict::Label);
        *slot = match *slot {
            Verdict::Missing => now,
            before if before == now => now,
            _ => Verdict::Contradicted,
        };
    }
    verdicts
}

/// Whether a text is an answer in words, with nothing in it that could be JSON.
pub fn is_prose(text: &str) -> bool {
    !text.trim().is_empty() && !text.contains(['{', '['])
}

fn parse_id(s: &str) -> Option<u16> {
    (s.len() == 3 && s.bytes().all(|b| b.is_ascii_digit())).then(|| s.parse().ok()).flatten()
}

/// Every complete pair of an id and a code, in the order of the text.
fn pairs(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut at = 0;
    for _ in 0..MOST_STARTS {
        let Some(start) = text.get(at..).and_then(|rest| rest.find('{')) else { break };
        let before = found.len();
        let mut json = serde_json::Deserializer::from_str(&text[at + start..]);
        let whole = Walk { found: &mut found, key: None, depth: 0 }.deserialize(&mut json);
        // Past the object, so that a second one is seen; past the brace if what follows it was no JSON at all. An
        // object that broke off after some pairs is not entered again: its parts would be counted twice.
        at += start
            + match whole {
                Ok(()) => consumed(&text[at + start..]),
                Err(_) if found.len() > before => {
                    // A number that ends where the text was cut may go on.
                    if found
                        .last()
                        .is_some_and(|(_, code)| text.ends_with(code.as_str()) && code.parse::<f64>().is_ok())
                    {
                        found.pop();
                    }
                    return found;
                }
                Err(_) => 1,
            };
    }
    found
}

/// The length in bytes of the JSON value at the beginning of `text`, which is known to parse.
fn consumed(text: &str) -> usize {
    let mut stream = serde_json::Deserializer::from_str(text).into_iter::<serde::de::IgnoredAny>();
    stream.next();
    stream.byte_offset().max(1)
}

/// Walks one JSON value and collects pairs as it meets them, so that those before an error stay.
struct Walk<'a> {
    found: &'a mut Vec<(String, String)>,
    /// The key under which this value stands.
    key: Option<&'a str>,
    depth: usize,
}

impl Walk<'_> {
    fn leaf(self, value: String) {
        match self.key {
            Some(key) => self.found.push((key.to_owned(), value)),
            // "417billing" in a list
            None => {
                if let Some((id, code)) = value.split_at_checked(3) {
                    self.found.push((id.to_owned(), code.to_owned()));
                }
            }
        }
    }
}

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("an answer")
    }
    fn visit_str<E>(self, v: &str) -> Result<(), E> {
        self.leaf(v.to_owned());
        Ok(())
    }
    fn visit_bool<E>(self, v: bool) -> Result<(), E> {
        self.leaf(v.to_string());
        Ok(())
    }
    fn visit_i64<E>(self, v: i64) -> Result<(), E> {
        self.leaf(v.to_string());
        Ok(())
    }
    fn visit_u64<E>(self, v: u64) -> Result<(), E> {
        self.leaf(v.to_string());
        Ok(())
    }
    fn visit_f64<E>(self, v: f64) -> Result<(), E> {
        self.leaf(v.to_string());
        Ok(())
    }
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        if self.depth >= MOST_DEPTH {
            return Err(A::Error::custom("nested too deep"));
        }
        while seq.next_element_seed(Walk { found: self.found, key: None, depth: self.depth + 1 })?.is_some() {}
        Ok(())
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        if self.depth >= MOST_DEPTH {
            return Err(A::Error::custom("nested too deep"));
        }
        let (mut id, mut code) = (None, None);
        while let Some(key) = map.next_key::<String>()? {
            let mut here = Vec::new();
            let one = map.next_value_seed(Walk { found: &mut here, key: Some(&key), depth: self.depth + 1 });
            // {"i": 417, "c": "billing"}: two leaves make one pair
            match (key.as_str(), here.as_mut_slice()) {
                ("i", [(_, v)]) => id = Some(std::mem::take(v)),
                ("c", [(_, v)]) => code = Some(std::mem::take(v)),
                _ => self.found.append(&mut here),
            }
            one?;
        }
        if let (Some(id), Some(code)) = (id, code) {
            self.found.push((id, code));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Verdict::{Contradicted, Label, Missing, UnknownCode};
    use super::*;
    use crate::options::{AnswerShape, Codes};
    use crate::{prompt, task};
    use proptest::prelude::*;

    fn legend() -> Legend {
        let labels = task::labels_from_json(&serde_json::json!(["billing", "bug", "3", "true"])).unwrap();
        Legend::new(&labels, Codes::Words, &str::len)
    }

    fn check(text: &str, want: [Verdict; 3]) {
        assert_eq!(read(text, &[417, 902, 118], &legend()), want, "{text}");
    }

    #[test]
    fn every_shape_is_read() {
        let want = [Label(0), Label(1), Missing];
        check(r#"{"417":"billing","902":"bug"}"#, want);
        check(r#"{"r":[{"i":417,"c":"billing"},{"c":"bug","i":"902"}]}"#, want);
        check(r#"{"r":["417billing","902bug"]}"#, want);
        check("Sure! Here it is:\n```json\n{ \"417\": \"Billing\",\n \"902\": \"bug\" }\n```\nAnything else?", want);
        check(r#"{"answers":{"417":"billing","902":"bug"}}"#, want);
        check(r#"Rows {417} and {902}: {"417":"billing"} {"902":"bug"}"#, want);
        check(r#"{"417":3,"902":true}"#, [Label(2), Label(3), Missing]);
    }

    #[test]
    fn dropped_invented_doubled_and_unknown_answers_touch_no_other_row() {
        check(r#"{"417":"billing","903":"bug"}"#, [Label(0), Missing, Missing]);
        check(r#"{"417":"billing","902":"bug","417":"billing"}"#, [Label(0), Label(1), Missing]);
        check(r#"{"417":"billing","902":"bug","417":"bug"}"#, [Contradicted, Label(1), Missing]);
        check(r#"{"417":"nonsense","902":"bug"}"#, [UnknownCode, Label(1), Missing]);
        check(r#"{"417":"nonsense","417":"bug"}"#, [Contradicted, Missing, Missing]);
        check(r#"{"417":null,"902":["bug"],"0118":"bug"}"#, [Missing, Missing, Missing]);
        check(r#"{"417":"billing"} on second thought {"417":"bug"}"#, [Contradicted, Missing, Missing]);
    }

    #[test]
    fn what_is_complete_in_a_cut_text_is_kept() {
        check(r#"{"417":"billing","902":"bu"#, [Label(0), Missing, Missing]);
        check(r#"{"r":[{"i":417,"c":"billing"},{"i":902,"c":"#, [Label(0), Missing, Missing]);
        check(r#"{"r":["417billing","902b"#, [Label(0), Missing, Missing]);
        check(r#"{"417":"billing","902":3"#, [Label(0), Missing, Missing]);
        check(r#"{"417":"billing","902":bug}"#, [Label(0), Missing, Missing]);
    }

    #[test]
    fn hostile_texts_are_bounded() {
        let deep = "{\"a\":".repeat(100_000);
        check(&deep, [Missing; 3]);
        check(&"{".repeat(1_000_000), [Missing; 3]);
        check("", [Missing; 3]);
        check("417: billing", [Missing; 3]);
    }

    proptest! {
        #[test]
        fn never_panics(text in ".{0,200}", json in r#"[{}\[\]":,0-9a-z ]{0,200}"#) {
            read(&text, &[417], &legend());
            read(&json, &[417], &legend());
        }

        /// Only an id of the pack with a code of the legend says something: whatever else an answer holds, about other
        /// ids, with other labels or in other words, changes nothing.
        #[test]
        fn nothing_comes_back_but_ids_of_the_pack_with_codes_of_the_legend(
            codes in proptest::collection::vec(0usize..4, 1..20),
            foreign in proptest::collection::vec((0u16..2_000, "[a-z]{0,9}"), 0..20),
            places in proptest::collection::vec(0usize..40, 20),
            around in "[^{]{0,60}",
        ) {
            let ids: Vec<u16> = (100..).take(codes.len()).collect();
            let legend = legend();
            let of = |id: u16, code: &str| format!("\"{id}\":{}", prompt::quote(code));
            let mut pairs: Vec<String> = ids.iter().zip(&codes).map(|(id, c)| of(*id, &legend.codes()[*c])).collect();
            for ((id, code), at) in foreign.iter().zip(places).filter(|((id, _), _)| !ids.contains(id)) {
                pairs.insert(at.min(pairs.len()), of(*id, code));
                pairs.insert(at.min(pairs.len()), of(*id, "bug"));
            }
            let text = format!("{around}{{{}}}{around}", pairs.join(","));
            let whole: Vec<Verdict> = codes.iter().map(|c| Label(*c)).collect();
            prop_assert_eq!(read(&text, &ids, &legend), whole);
        }

        /// What is written in any shape is read back, and a cut at any byte loses rows but never changes one.
        #[test]
        fn a_cut_never_changes_an_answer(codes in proptest::collection::vec(0usize..4, 1..40), cut in 0usize..2000, shape in 0usize..3) {
            let shape = [AnswerShape::Map, AnswerShape::Object, AnswerShape::Compact][shape];
            let ids: Vec<u16> = (100..).take(codes.len()).collect();
            let legend = legend();
            let rows: Vec<(u16, &str)> = ids.iter().zip(&codes).map(|(id, c)| (*id, legend.codes()[*c].as_str())).collect();
            let text = prompt::answer(shape, &rows);
            let whole: Vec<Verdict> = codes.iter().map(|c| Label(*c)).collect();
            prop_assert_eq!(read(&text, &ids, &legend), whole.clone());
            for (got, want) in read(&text[..cut.min(text.len())], &ids, &legend).iter().zip(whole) {
                prop_assert!(*got == Missing || *got == want);
            }
        }
    }
}
