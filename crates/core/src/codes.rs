//! Codes: what stands for a label in a request and its answer, and how an answer's code is resolved.
//!
//! Output tokens cost most, so a code should be one token; but a code that does not look like its label costs a small
//! model its accuracy (measured with a 1.5B model: headlines' topics 0.58 with words, 0.26 with letters). So: the
//! label itself if it is one token, else a distinguishing beginning of it, bare letters last.

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};

use crate::CountTokens;
use crate::options::Codes;

/// A beginning shorter than this many characters tells a model too little.
const SHORTEST_BEGINNING: usize = 3;

/// A label and what it means.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Label {
    /// The text that is written to the target.
    pub label: String,
    /// Its description for the model, or empty.
    #[serde(default)]
    pub description: String,
}

/// The codes of a task's labels, in the labels' order.
#[derive(Debug, Clone)]
pub struct Legend {
    codes: Vec<String>,
    /// Lower-cased code or label → the label's index. A key that would mean two labels is not in it.
    resolve: HashMap<String, usize>,
}

impl Legend {
    /// Chooses the codes.
    pub fn new(labels: &[Label], kind: Codes, count: CountTokens) -> Self {
        let names: Vec<&str> = labels.iter().map(|l| l.label.as_str()).collect();
        let codes = match kind {
            Codes::Words => names.iter().map(|s| (*s).to_owned()).collect(),
            Codes::Letters => letters(&names),
            Codes::Auto => auto(&names, count).unwrap_or_else(|| letters(&names)),
        };
        let mut resolve: HashMap<String, Option<usize>> = HashMap::new();
        let mut add = |key: &str, i: usize| {
            resolve
                .entry(key.to_lowercase())
                .and_modify(|old| {
                    if *old != Some(i) {
                        *old = None;
                    }
                })
                .or_insert(Some(i));
        };
        for (i, (code, name)) in codes.iter().zip(&names).enumerate() {
            add(code, i);
            add(name, i);
        }
        let resolve = resolve.into_iter().filter_map(|(k, v)| v.map(|v| (k, v))).collect();
        Self { codes, resolve }
    }

    /// The codes, in the labels' order.
    pub fn codes(&self) -> &[String] {
        &self.codes
    }

    /// The index of the label that `answer` names by its code or in full, without regard to case or surrounding
    /// spaces; `None` if it is in neither or could be two.
    pub fn resolve(&self, answer: &str) -> Option<usize> {
        self.resolve.get(&answer.trim().to_lowercase()).copied()
    }

    /// All codes and labels, in lower case.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.resolve.keys().map(String::as_str)
    }

    /// Returns true if a code or label begins with `answer` and is longer, so that an answer that was cut off might
    /// mean it.
    pub fn goes_on(&self, answer: &str) -> bool {
        let answer = answer.trim().to_lowercase();
        self.resolve.keys().any(|key| key.len() > answer.len() && key.starts_with(&answer))
    }
}

/// `A` … `Z`, `AA`, `AB`, … without those that are a label, which an answer might mean instead.
fn letters(names: &[&str]) -> Vec<String> {
    let taken: HashSet<String> = names.iter().map(|n| n.trim().to_lowercase()).collect();
    (0..).map(letter).filter(|code| !taken.contains(&code.to_lowercase())).take(names.len()).collect()
}

fn letter(mut i: usize) -> String {
    let mut out = Vec::new();
    loop {
        out.push(b'A' + (i % 26) as u8);
        i /= 26;
        if i == 0 {
            break;
        }
        i -= 1;
    }
    out.iter().rev().map(|b| char::from(*b)).collect()
}

/// For every label itself or the longest beginning of it that is one token and begins no other label. `None` if some
/// label has neither and would take more than three tokens: then letters are cheaper for all of them.
fn auto(names: &[&str], count: CountTokens) -> Option<Vec<String>> {
    let lower: Vec<String> = names.iter().map(|n| n.to_lowercase()).collect();
    names
        .iter()
        .enumerate()
        .map(|(i, name)| {
            if count(name) <= 1 {
                return Some((*name).to_owned());
            }
            let beginning = name
                .char_indices()
                .map(|(at, _)| at)
                .skip(SHORTEST_BEGINNING)
                .map(|end| &name[..end])
                .filter(|p| p.trim_end() == *p)
                .filter(|p| !lower.iter().enumerate().any(|(j, other)| j != i && other.starts_with(&p.to_lowercase())))
                .filter(|p| count(p) == 1)
                .last();
            match beginning {
                Some(p) => Some(p.to_owned()),
                None if count(name) <= 3 => Some((*name).to_owned()),
                None => None,
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn labels(names: &[&str]) -> Vec<Label> {
        names.iter().map(|n| Label { label: (*n).into(), description: String::new() }).collect()
    }

    /// Four characters a token.
    fn quarter(s: &str) -> usize {
        s.chars().count().div_ceil(4)
    }

    #[test]
    fn auto_prefers_the_label_then_its_beginning_then_letters() {
        let l = Legend::new(&labels(&["bug", "shipping delay", "shop opening hours"]), Codes::Auto, &quarter);
        assert_eq!(l.codes(), ["bug", "ship", "shop"]);
        let l = Legend::new(&labels(&["very positive indeed", "very positive"]), Codes::Auto, &quarter);
        assert_eq!(l.codes(), ["A", "B"]);
    }

    #[test]
    fn a_code_resolves_by_code_and_by_label_and_is_no_other_label() {
        let l = Legend::new(&labels(&["b", "A", "third"]), Codes::Letters, &quarter);
        assert_eq!(l.codes(), ["C", "D", "E"]);
        assert_eq!((l.resolve("A"), l.resolve("B")), (Some(1), Some(0)));
        assert_eq!(l.resolve(" e "), Some(2));
        assert_eq!(l.resolve("Third"), Some(2));
        assert_eq!(l.resolve("fourth"), None);
    }

    #[test]
    fn letters_go_on_after_z() {
        assert_eq!([0, 25, 26, 27, 51, 52, 701, 702].map(letter), ["A", "Z", "AA", "AB", "AZ", "BA", "ZZ", "AAA"]);
    }

    proptest! {
        #[test]
        fn codes_are_distinct_and_resolve_to_their_label(names in proptest::collection::hash_set("[a-z]{1,3}( [a-z]{1,9})?", 2..40)) {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            for kind in [Codes::Auto, Codes::Words, Codes::Letters] {
                let legend = Legend::new(&labels(&names), kind, &quarter);
                for (i, code) in legend.codes().iter().enumerate() {
                    prop_assert_eq!(legend.resolve(code), Some(i), "{}", code);
                }
            }
        }
    }
}
