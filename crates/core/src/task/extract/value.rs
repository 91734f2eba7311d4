//! One value of a field: how it is read, told to a model, and how many tokens it takes.

use serde_json::Value;
use serde_json::value::RawValue;

use super::super::classify::lines;
use super::super::kind::one_line;
use super::super::value::Type;
use super::fields::Field;
use crate::codes::Legend;
use crate::{CountTokens, prompt};

/// Most values of a list, if nothing is said.
const MOST_ITEMS: u64 = 10;
/// Words of a text, if nothing is said, and tokens of a word.
const WORDS: u64 = 30;
const WORD: f64 = 2.0;
/// Tokens of the signs around a value of a list.
const SIGNS: usize = 2;

impl Field {
    /// Reads a value. See [`Type::read`].
    pub(super) fn value(&self, json: &str, legend: &Legend, is_strict: bool) -> Result<String, String> {
        if !self.is_array {
            return self.scalar(json, legend, is_strict);
        }
        let want = || format!("a list of which each is {}", self.of.wanted());
        let items: Vec<&RawValue> = serde_json::from_str(json).map_err(|_| want())?;
        let most = self.max_items.unwrap_or(MOST_ITEMS) as usize;
        if items.len() > most {
            return Err(format!("a list of at most {most}"));
        }
        let item = |item: &&RawValue| {
            let text = self.scalar(item.get(), legend, is_strict)?;
            Ok(if self.of.is_json() { text } else { Value::from(text).to_string() })
        };
        let items: Vec<String> = items.iter().map(item).collect::<Result<_, String>>().map_err(|_| want())?;
        Ok(format!("[{}]", items.join(",")))
    }

    fn scalar(&self, json: &str, legend: &Legend, is_strict: bool) -> Result<String, String> {
        if self.of != Type::Labels {
            return self.of.read(json, self.time_zone.as_deref(), is_strict);
        }
        let label = serde_json::from_str::<String>(json).ok().and_then(|code| legend.resolve(&code));
        let label = label.and_then(|i| self.labels.get(i)).map(|l| l.label.clone());
        label.ok_or_else(|| self.of.told().to_owned())
    }

    /// Returns true if a value of this field could be read as one of the other.
    pub(super) fn resembles(&self, other: &Self, (mine, others): (&Legend, &Legend)) -> bool {
        if self.of == Type::Jsonb && !self.is_array || other.of == Type::Jsonb && !other.is_array {
            return true;
        }
        if self.is_array || other.is_array {
            return self.is_array == other.is_array;
        }
        let is_text = |of| matches!(of, Type::Text | Type::Date | Type::Timestamptz | Type::Labels);
        let is_number = |of| matches!(of, Type::Integer | Type::Bigint | Type::Numeric | Type::Real);
        // A label may look like anything.
        let reads = |field: &Self, legend: &Legend, text: &str| {
            field.scalar(&Value::from(text).to_string(), legend, false).is_ok()
        };
        match (self.of, other.of) {
            (Type::Labels, _) => mine.names().any(|name| reads(other, others, name)),
            (_, Type::Labels) => others.names().any(|name| reads(self, mine, name)),
            (a, b) if a == b => true,
            (Type::Text, of) | (of, Type::Text) => is_text(of),
            (a, b) => is_number(a) && is_number(b),
        }
    }

    /// Returns true if a key could be one of its values.
    pub(super) fn may_be_a_key(&self) -> bool {
        !self.is_array && matches!(self.of, Type::Text | Type::Labels | Type::Jsonb)
    }

    pub(super) fn told(&self, legend: &Legend) -> String {
        let words = self.max_words.map_or(String::new(), |n| format!(" of at most {n} words"));
        let zone = if self.time_zone.is_some() { ", or without the offset in local time" } else { "" };
        let one = match self.of {
            Type::Labels => {
                let is_code = legend.codes().iter().zip(&self.labels).any(|(c, l)| *c != l.label);
                format!("one of these {}", if is_code { "codes" } else { "labels" })
            }
            of => format!("{}{words}{zone}", of.told()),
        };
        let one = match self.is_array {
            true => format!("a list of at most {}, each {one}", self.max_items.unwrap_or(MOST_ITEMS)),
            false => one,
        };
        let description = one_line(&self.description);
        let sign = if description.is_empty() { "" } else { ". " };
        let legend = lines(&self.labels, legend);
        let legend: String = legend.lines().map(|line| format!("  {line}\n")).collect();
        format!("{}: {one}{sign}{description}\n{legend}", self.name)
    }

    /// The form of a value, which is none.
    pub(super) fn form(&self, legend: &Legend) -> String {
        let is_a_label = self.of == Type::Labels && legend.resolve(self.of.form().trim_matches('"')).is_some();
        let form = if is_a_label { "\"…\"" } else { self.of.form() };
        if self.is_array { format!("[{form}]") } else { form.to_owned() }
    }

    /// Tokens of a value: usual and most.
    pub(super) fn tokens(&self, legend: &Legend, count: CountTokens) -> (f64, usize) {
        let one = match self.of {
            Type::Text => {
                let most = self.max_words.unwrap_or(WORDS) as f64 * WORD;
                (most / 2.0, most as usize)
            }
            Type::Jsonb => (16.0, 64),
            Type::Labels => {
                let all: Vec<usize> = legend.codes().iter().map(|c| count(&prompt::quote(c))).collect();
                let most = all.iter().copied().max().unwrap_or(1);
                (all.iter().sum::<usize>() as f64 / all.len().max(1) as f64, most)
            }
            of => (count(of.sample()) as f64, count(of.sample()) + 2),
        };
        if !self.is_array {
            return one;
        }
        let items = self.max_items.unwrap_or(MOST_ITEMS) as usize;
        (1.0 + (one.0 + SIGNS as f64) * (items as f64 / 3.0).max(1.0), 1 + (one.1 + SIGNS) * items)
    }
}
