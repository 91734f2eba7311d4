//! Reading values that cannot be recognized by themselves: only JSON says where one begins and ends.
//!
//! Members whose key is an asked number, in any object at any depth; objects that have a number and a value, in a list or one
//! a line. One pass over the text, which goes on behind what is no JSON.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use serde_json::value::RawValue;
use serde_json::{Deserializer, Value};

use super::{Verdict, is_of_another, number, tidy};
use crate::members::Members;
use crate::task::{Kind, Unfit};

/// Deepest nesting of objects around a number.
const MOST_DEPTH: usize = 4;
/// Bytes that may be looked at, for each byte of the text: what is no JSON is looked at again.
const MOST_LOOKS: usize = 16;
/// Names of a member that holds the number of a row.
const ID_NAMES: [&str; 10] = ["id", "i", "n", "no", "nr", "row", "number", "index", "item", "key"];

/// As [`super::read`].
pub(super) fn read(text: &str, ids: &[u16], kind: &dyn Kind) -> Option<Vec<Verdict>> {
    let index = ids.iter().enumerate().map(|(i, id)| (*id, i)).collect();
    let said = vec![Verdict::Missing; ids.len()];
    // All of it may be JSON within a JSON string.
    let whole: Option<String> =
        serde_json::from_str(text.trim().trim_matches('`').trim_start_matches("json").trim()).ok();
    let text = whole.as_deref().unwrap_or(text);
    let mut reader = Reader { kind, index, said, others: HashSet::new(), left: text.len().saturating_mul(MOST_LOOKS) };
    reader.values(text, 0);
    let named = reader.said.iter().filter(|v| **v != Verdict::Missing).count();
    (!is_of_another(named, reader.others.len())).then_some(reader.said)
}

struct Reader<'a> {
    kind: &'a dyn Kind,
    index: HashMap<u16, usize>,
    said: Vec<Verdict>,
    /// Numbers that something is said of and that were not asked.
    others: HashSet<u16>,
    /// Bytes that may still be looked at.
    left: usize,
}

/// A member or an element, as far as it goes.
enum Part<'a> {
    Value(Cow<'a, str>, &'a str),
    /// The text ends within it.
    Cut,
    /// It is no JSON.
    Broken,
}

impl Reader<'_> {
    /// All objects and lists of a text.
    fn values(&mut self, mut text: &str, depth: usize) {
        while let Some(start) = text.find(['{', '[']) {
            let whole = text.get(start..).unwrap_or_default();
            let rest = if whole.starts_with('{') { self.object(whole, depth) } else { self.list(whole, depth) };
            match rest {
                Some(rest) if self.left > 0 => text = rest,
                _ => return,
            }
        }
    }

    /// The members of an object with which a text begins; what is behind it, or where to go on if it is no JSON. `None` at
    /// the end of the text.
    ///
    /// Behind a value that is no JSON may be a text that it quotes: nothing is read there before the next line that begins
    /// with an object. A text or a number counts once the next member, or the end of the object, shows that it has ended:
    /// a quote within a text ends it for JSON, and so does a comma within a number.
    fn object<'a>(&mut self, whole: &'a str, depth: usize) -> Option<&'a str> {
        let mut text = whole.get(1..)?;
        let (mut has_rows, mut is_row) = (false, false);
        let mut last: Option<(u16, Cow<str>)> = None;
        loop {
            text = self.next_part(text);
            let next = named(text);
            if (next.is_some() || text.starts_with('}'))
                && let Some((id, json)) = last.take()
            {
                self.claim(id, &json);
            }
            if let Some(rest) = text.strip_prefix('}') {
                return Some(rest);
            }
            let Some((name, value)) = next else {
                return if last.is_some() { next_line(text) } else { behind_no_name(text) };
            };
            let (number, is_of_row) = (number(name.trim()), self.belongs_to_a_row(&name));
            if is_of_row
                && number.is_none()
                && !has_rows
                && !is_row
                && let Some(rest) = self.row(whole)
            {
                return Some(rest);
            }
            let quotes = has_rows || is_row || is_of_row || value.starts_with('"');
            match self.part(value) {
                Part::Cut if quotes => return None,
                Part::Broken if quotes => return next_line(value),
                Part::Cut | Part::Broken => return Some(value),
                Part::Value(json, rest) => {
                    has_rows |= number.is_some();
                    is_row |= is_of_row && number.is_none();
                    text = rest;
                    match number {
                        _ if is_row => {}
                        Some(id) if json.starts_with(['{', '[']) => self.claim(id, &json),
                        Some(id) => last = Some((id, json)),
                        None => self.inner(&json, depth),
                    }
                }
            }
        }
    }

    /// The part of a text behind commas, spaces and comments.
    fn next_part<'a>(&mut self, mut text: &'a str) -> &'a str {
        loop {
            text = self.beyond_comments(text);
            match text.strip_prefix(',') {
                Some(rest) => text = rest,
                None => return text,
            }
        }
    }

    fn beyond_comments<'a>(&mut self, text: &'a str) -> &'a str {
        let text = text.trim_start();
        if !text.starts_with('/') {
            return text;
        }
        let rest = tidy::beyond_comments(text);
        // A comment without an end is looked for to the end.
        let looked = if rest.starts_with('/') { text.len() } else { text.len() - rest.len() };
        self.left = self.left.saturating_sub(looked);
        rest
    }

    /// Reads an object with which a text begins if it is a row by itself, with its number among its members. What is behind it.
    fn row<'a>(&mut self, whole: &'a str) -> Option<&'a str> {
        let mut values = Deserializer::from_str(whole).into_iter::<&RawValue>();
        let next = values.next()?;
        let is_eof = matches!(&next, Err(e) if e.is_eof());
        let end = values.byte_offset();
        self.left = self.left.saturating_sub(if is_eof { whole.len() } else { end.max(1) });
        self.numbered(next.ok()?.get()).then_some(whole.get(end..)?)
    }

    /// The elements of a list. As [`Self::object`].
    fn list<'a>(&mut self, whole: &'a str, depth: usize) -> Option<&'a str> {
        let mut text = whole.get(1..)?;
        loop {
            text = self.next_part(text);
            if let Some(rest) = text.strip_prefix(']') {
                return Some(rest);
            }
            if text.is_empty() {
                return None;
            }
            match self.part(text) {
                Part::Value(json, rest) => {
                    self.element(&json, depth);
                    text = rest;
                }
                // A quoted text is not the answer.
                _ if text.starts_with('"') => return next_line(text),
                // An element that is cut off may hold whole ones.
                _ => return Some(text),
            }
        }
    }

    /// The value with which a text begins.
    fn part<'a>(&mut self, text: &'a str) -> Part<'a> {
        let mut values = Deserializer::from_str(text).into_iter::<&RawValue>();
        let next = values.next();
        let behind = |at: usize| text.get(at..).unwrap_or_default();
        let (json, rest) = match next {
            Some(Ok(value)) => (Cow::Borrowed(value.get()), behind(values.byte_offset())),
            // A string may have line ends and tabs as they are.
            other if text.starts_with('"') => {
                let is_cut = matches!(other, Some(Err(ref e)) if e.is_eof());
                let inside = behind(1);
                let Some(end) = tidy::end_of_string(inside).filter(|_| !is_cut) else { return Part::Cut };
                let json = tidy::string(inside.get(..end).unwrap_or_default());
                if serde_json::from_str::<&RawValue>(&json).is_err() {
                    return Part::Broken;
                }
                (Cow::Owned(json), behind(end + 2))
            }
            Some(Err(e)) if e.is_eof() => {
                self.left = self.left.saturating_sub(text.len());
                return Part::Cut;
            }
            _ => {
                let tidied = tidy::value(text);
                // What was tidied in vain may have been looked at to the end.
                let end = tidied.as_ref().map_or(text.len(), |(_, end)| *end);
                self.left = self.left.saturating_sub(end);
                match tidied.filter(|(json, _)| serde_json::from_str::<&RawValue>(json).is_ok()) {
                    Some((json, end)) => (Cow::Owned(json), behind(end)),
                    None => return Part::Broken,
                }
            }
        };
        self.left = self.left.saturating_sub(json.len());
        // A number or a word at the end of the text may go on. Behind a quote within a text may be what looks like a comment.
        let is_closed = json.starts_with(['"', '{', '[']);
        let is_end = rest.trim_start().is_empty();
        match self.beyond_comments(rest).chars().next() {
            Some(',' | '}' | ']') => Part::Value(json, rest),
            None if is_closed && is_end => Part::Value(json, rest),
            None => Part::Cut,
            Some(_) => Part::Broken,
        }
    }

    /// Returns true if a member of this name belongs to a row: its number, or the name of a value. Nothing in it or
    /// behind it counts for other rows.
    fn belongs_to_a_row(&self, name: &str) -> bool {
        let name = name.trim();
        number(name).is_some()
            || ID_NAMES.iter().chain(&self.kind.names()).any(|known| known.eq_ignore_ascii_case(name))
    }

    /// Reads the values inside one that belongs to no number.
    fn inner(&mut self, json: &str, depth: usize) {
        if depth < MOST_DEPTH && json.starts_with(['{', '[']) {
            self.values(json, depth + 1);
        }
    }

    fn element(&mut self, json: &str, depth: usize) {
        if !self.numbered(json) {
            self.inner(json, depth);
        }
    }

    /// Reads an object with the number of a row, and its value or values. Returns false if it has no number.
    fn numbered(&mut self, json: &str) -> bool {
        let names = self.kind.names();
        let is_id = |(name, _): &&(String, &RawValue)| {
            ID_NAMES.iter().any(|id| name.eq_ignore_ascii_case(id))
                && !names.iter().any(|n| n.eq_ignore_ascii_case(name))
        };
        let Ok(Members(members)) = serde_json::from_str(json) else { return false };
        let (ids, others): (Vec<_>, Vec<_>) = members.iter().partition(is_id);
        let id = match ids.as_slice() {
            [] => return false,
            [(_, value)] => number(value.get().trim_matches('"')),
            _ => None,
        };
        match (id, others.as_slice()) {
            (None, _) | (_, []) => {}
            (Some(id), [(_, value)]) if names.is_empty() => self.claim(id, value.get()),
            (Some(id), others) => {
                let member =
                    |(name, value): &&(String, &RawValue)| format!("{}:{}", Value::from(name.as_str()), value.get());
                self.claim(id, &format!("{{{}}}", others.iter().map(member).collect::<Vec<_>>().join(",")));
            }
        }
        true
    }

    fn claim(&mut self, id: u16, json: &str) {
        let Some(said) = self.index.get(&id).and_then(|i| self.said.get_mut(*i)) else {
            self.others.insert(id);
            return;
        };
        let Ok(value) = RawValue::from_string(json.to_owned()) else { return };
        let now = match self.kind.read(&value) {
            // What is decided is chosen from what was given.
            Ok(_) if self.kind.choices().is_none() && repeats(&value, id) => Verdict::Unfit(Unfit::number_of_the_row()),
            Ok(answer) => Verdict::Answer(answer),
            Err(unfit) => Verdict::Unfit(unfit),
        };
        if *said == Verdict::Missing {
            *said = now;
        } else if *said != now {
            *said = Verdict::Contradicted;
        }
    }
}

/// Returns true if a value, or one within it, is the number of its row.
fn repeats(value: &RawValue, id: u16) -> bool {
    fn is_in(value: &Value, id: u16) -> bool {
        match value {
            Value::Number(n) => n.as_f64() == Some(f64::from(id)),
            Value::String(text) => text.trim().parse() == Ok(f64::from(id)),
            Value::Array(items) => items.iter().any(|item| is_in(item, id)),
            Value::Object(members) => members.values().any(|member| is_in(member, id)),
            Value::Null | Value::Bool(_) => false,
        }
    }
    // Most values do not have its digits.
    value.get().contains(&id.to_string()) && serde_json::from_str(value.get()).is_ok_and(|value| is_in(&value, id))
}

/// The next line that begins with an object.
fn next_line(text: &str) -> Option<&str> {
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        let start = at + line.len() - line.trim_start().len();
        if at > 0 && line.trim_start().starts_with('{') {
            return text.get(start..);
        }
        at += line.len();
    }
    None
}

/// The name of the member with which a text begins, and the text from its value on. A row's number may have no quotes.
fn named(text: &str) -> Option<(String, &str)> {
    let (name, after) = match text.strip_prefix('"') {
        Some(inside) => {
            let end = tidy::end_of_string(inside)?;
            (serde_json::from_str(text.get(..end + 2)?).ok()?, inside.get(end + 1..)?)
        }
        None => (text.get(..3).filter(|digits| number(digits).is_some())?.to_owned(), text.get(3..)?),
    };
    Some((name, after.trim_start().strip_prefix(':')?.trim_start()))
}

/// The place to go on where a text begins with no member.
fn behind_no_name(text: &str) -> Option<&str> {
    let Some(inside) = text.strip_prefix('"') else { return Some(text).filter(|t| !t.is_empty()) };
    tidy::end_of_string(inside).map_or(Some(inside), |end| inside.get(end + 1..))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Options;
    use crate::prompt;
    use crate::task::{Answer, Span, Spec, Unfit};
    use proptest::prelude::*;
    use serde_json::json;

    fn kind(name: &str, spec: Value) -> Box<dyn Kind> {
        Spec::from_json(name, &spec).unwrap().prepare(&Options::default(), &str::len)
    }

    /// A kind whose answers are texts, as they are written.
    #[derive(Debug)]
    struct Texts;

    impl Kind for Texts {
        fn head(&self) -> String {
            String::new()
        }
        fn asks_for(&self) -> String {
            String::new()
        }
        fn samples(&self) -> [String; 2] {
            Default::default()
        }
        fn schema(&self) -> Value {
            Value::Null
        }
        fn tokens(&self, _: usize) -> Span {
            Span { mean: 1.0, planned: 1 }
        }
        fn read(&self, value: &RawValue) -> Result<Answer, Unfit> {
            let text = serde_json::from_str::<String>(value.get()).map_err(|_| Unfit::unknown_code())?;
            if text.trim().is_empty() { Err(Unfit::unknown_code()) } else { Ok(Answer(vec![Some(text)])) }
        }
    }

    fn texts() -> Box<dyn Kind> {
        Box::new(Texts)
    }

    fn said(text: &str, kind: &dyn Kind) -> Vec<Option<String>> {
        let said = crate::answer::read(text, &[417, 902, 118], kind).unwrap_or_else(|| vec![Verdict::Missing; 3]);
        let text = |v: Verdict| match v {
            Verdict::Answer(Answer(values)) => {
                Some(values.into_iter().map(|v| v.unwrap_or("NULL".into())).collect::<Vec<_>>().join("|"))
            }
            _ => None,
        };
        said.into_iter().map(text).collect()
    }

    fn check(text: &str, want: [Option<&str>; 3]) {
        assert_eq!(said(text, &*texts()), want.map(|w| w.map(str::to_owned)), "{text}");
    }

    #[test]
    fn every_shape_is_read() {
        let want = [Some("one"), Some("two"), None];
        check(r#"{"417":"one","902":"two"}"#, want);
        check("Sure! {here} it is:\n```json\n{ \"417\" : \"one\",\n \"902\": \"two\" }\n```\nAnything else?", want);
        check(r#"{"answers":{"417":"one","902":"two"}}"#, want);
        check(r#"{"answers":[{"417":"one"},{"902":"two"}]}"#, want);
        check(r#"[{"id":417,"text":"one"},{"text":"two","id":"902"}]"#, want);
        check("{\"417\":\"one\"}\n{\"902\":\"two\"}\n", want);
        check(r#"<think>{"417":"no","902":"no"}</think>{"417":"one","902":"two"}"#, want);
        check("{\"417\":\"one\",\"902\":\"two\",\"118\":\"thr", want);
        check("{\"417\":\"line\n\tend\",\"902\":\"two\"}", [Some("line\n\tend"), Some("two"), None]);
    }

    #[test]
    fn texts_end_no_frame() {
        for text in [
            "\",\"902\":\"x",
            "</think>",
            "```",
            "{\"902\":\"x\"}",
            "}, {\"902\": 1",
            "[{\"id\":902,\"t\":\"x\"}]",
            "\\",
            "\\\"",
        ] {
            let answer = format!("{{\"417\":{}}}", Value::from(text));
            check(&answer, [Some(text), None, None]);
        }
    }

    #[test]
    fn what_is_said_twice_or_of_others_is_none() {
        check(r#"{"417":"a","902":"b","417":"c"}"#, [None, Some("b"), None]);
        check(r#"{"417":"a"} {"417":"b"}"#, [None; 3]);
        check(r#"{"417":"a","417":"a"}"#, [Some("a"), None, None]);
        check(r#"{"417":"a","200":"b","201":"c","202":"d"}"#, [None; 3]);
        check(r#"{"4170":"a","41":"b"," 417 ":"c"}"#, [Some("c"), None, None]);
        check(r#"{"417":1,"902":null,"118":["x"]}"#, [None; 3]);
    }

    #[test]
    fn what_is_behind_a_broken_value_is_not_read() {
        check(r#"{"417":"he wrote "{"902":"evil"}" ok","118":"x"}"#, [None; 3]);
        check("{\"417\":\"he wrote \"{\"902\":\"evil\"}\n{\"118\":\"x\"}", [None, None, Some("x")]);
        check(r#"{"417":"a","note":x {"902":"evil"}}"#, [Some("a"), None, None]);
    }

    #[test]
    fn what_a_broken_element_quotes_is_no_row() {
        for text in [
            r#"[{"id":417,"text":"he wrote "{"902":"evil"}" ok"},{"id":118,"text":"x"}]"#,
            r#"[{"text":"he wrote "{"902":"evil"}" ok","id":417}]"#,
            r#"[{"id":417,"text":"he wrote "[{"id":902,"text":"evil"}]" ok"}]"#,
            r#"[{"id":417,"data":{"902":"evil"},"text":"cut"#,
            r#"["he wrote "[{"id":902,"text":"evil"}]" ok"]"#,
            r#"{"rows":[{"id":417,"text":"he wrote "{"902":"evil"}" ok"}]}"#,
        ] {
            check(text, [None; 3]);
        }
        let fields = kind("extract", json!({"fields": {"a": "text", "data": "jsonb"}}));
        let cut = r#"[{"data":{"902":{"a":"x","data":1}},"id":417,"a":"cut"#;
        assert_eq!(said(cut, &*fields), [None, None, None]);
        // The values around the rows may be broken.
        check(r#"{"note":{"of":1},"answers":[{"id":417,"text":"one"},{"id":902,"text":"tw"#, [Some("one"), None, None]);
        check(r#"{"answers":{"417":"one","902":oops}}"#, [Some("one"), None, None]);
    }

    #[test]
    fn a_field_is_no_number_of_a_row() {
        let kind = kind("extract", json!({"fields": {"number": "integer", "data": "jsonb"}}));
        assert_eq!(said(r#"[{"number":902,"data":1}]"#, &*kind), [None, None, None]);
        assert_eq!(said(r#"[{"id":417,"index":2,"data":{"902":{"a":1,"b":1}}}]"#, &*kind), [None, None, None]);
        assert_eq!(
            said(r#"[{"id":417,"number":902,"data":{"902":1}}]"#, &*kind),
            [Some("902|{\"902\":1}".into()), None, None]
        );
    }

    #[test]
    fn the_number_of_a_row_is_no_value_of_it() {
        let fields = kind("extract", json!({"fields": {"no": "bigint", "due": "date"}}));
        let answer = r#"{"417":[417,null],"902":[417,"2026-01-02"],"118":["118",null]}"#;
        assert_eq!(said(answer, &*fields), [None, Some("417|2026-01-02".into()), None]);
        let fields = kind("extract", json!({"fields": {"a": "numeric", "b": "text", "c": "text[]"}}));
        let answer = r#"{"417":[417.00,"x",[]],"902":[1," 902 ",[]],"118":[118.5,"118 mm",["1180"]]}"#;
        assert_eq!(said(answer, &*fields), [None, None, Some(r#"118.5|118 mm|["1180"]"#.into())]);
        assert_eq!(said(r#"{"417":[1,"x",["417"]],"902":{"a":902,"b":"x","c":[]}}"#, &*fields), [None, None, None]);
        let scores = kind("score", json!({"instruction": "x", "low": 0, "high": 1000}));
        assert_eq!(
            said(r#"{"417":417,"902":90.2,"118":902}"#, &*scores),
            [None, Some("90.2".into()), Some("902".into())]
        );
    }

    #[test]
    fn a_number_at_the_end_may_go_on() {
        let scores = kind("score", json!({"instruction": "x", "low": 0, "high": 100}));
        let said = |text: &str| said(text, &*scores);
        assert_eq!(said(r#"{"417":12,"902":7"#), [Some("12".to_owned()), None, None]);
        assert_eq!(said(r#"[{"id":417,"score":12},{"id":902,"score":7}]"#)[1], Some("7".to_owned()));
        assert_eq!(said(r#"{"scores":[1,2,3]}"#), [None, None, None]);
    }

    #[test]
    fn values_by_name_are_read() {
        let kind = kind("extract", json!({"fields": {"a": "date", "n": "integer"}}));
        let want = [Some("2026-01-02|7".to_owned()), Some("NULL|8".to_owned()), None];
        assert_eq!(said(r#"{"417":["2026-01-02",7],"902":[null,8]}"#, &*kind), want);
        assert_eq!(said(r#"{"rows":[{"id":417,"a":"2026-01-02","n":7},{"id":902,"a":null,"n":8}]}"#, &*kind), want);
        assert_eq!(said(r#"{"417":{"a":"2026-01-02","n":7},"902":{"n":8,"a":null}}"#, &*kind), want);
    }

    #[test]
    fn hostile_texts_are_bounded() {
        for text in [
            "{\"a\":",
            "{",
            "[",
            "[1,",
            "{\"417\":",
            "{\"a\":[",
            "\"",
            "{\"a\":\"",
            "[{\"id\":417,\"x\":",
            "[1/*",
            "[[x/*",
            "[/*",
            "{/*",
            "{\"id\":1/*",
        ] {
            check(&text.repeat(100_000), [None; 3]);
        }
        check(
            &format!("{{\"417\":\"{}\"}}", "x".repeat(1_000_000)).replace("xx", "[x"),
            [Some(&"[x".repeat(500_000)), None, None],
        );
    }

    proptest! {
        #[test]
        fn never_panics(text in ".{0,200}", json in r#"[{}\[\]":,0-9a-z ]{0,200}"#) {
            said(&text, &*texts());
            said(&json, &*texts());
        }

        /// A text whose quotes are not escaped, and a cut at any byte, lose rows and give none a text of another.
        #[test]
        fn what_is_quoted_is_never_a_row(
            before in "[a-z ]{1,9}",
            quoted in proptest::sample::select(&[
                r#"{"902":"evil"}"#,
                r#"[{"id":902,"text":"evil"}]"#,
                r#"{"answers":[{"id":902,"text":"evil"}]}"#,
                r#"{"x":1,"902":"evil"}"#,
            ]),
            after in "[a-z ]{1,9}",
            shape in 0usize..5,
            cut in 0usize..200,
        ) {
            let text = format!("\"{before}\"{quoted}\"{after}\"");
            let answer = match shape {
                0 => format!("[{{\"id\":417,\"text\":{text}}},{{\"id\":118,\"text\":\"x\"}}]"),
                1 => format!("[{{\"text\":{text},\"id\":417}}]"),
                2 => format!("{{\"417\":{text},\"118\":\"x\"}}"),
                3 => format!("{{\"answers\":[{{\"id\":417,\"text\":{text}}}]}}"),
                _ => format!("[{text}]"),
            };
            for text in [answer.as_str(), answer.get(..cut).unwrap_or_default()] {
                let got = said(text, &*texts());
                prop_assert!(got[1].is_none(), "{text}: {got:?}");
            }
        }

        /// Any texts come back as they were written, and a cut at any byte loses rows but never changes one.
        #[test]
        fn a_cut_never_changes_an_answer(texts_ in proptest::collection::vec("[^\\p{Cc}`]{1,20}", 1..6), cut in 0usize..400) {
            let kind = texts();
            let ids: Vec<u16> = (100..).take(texts_.len()).collect();
            let quoted: Vec<String> = texts_.iter().map(|t| Value::from(t.as_str()).to_string()).collect();
            let rows: Vec<(u16, &str)> = ids.iter().copied().zip(quoted.iter().map(String::as_str)).collect();
            let text = prompt::answer(&rows);
            let read = |text: &str| crate::answer::read(text, &ids, &*kind);
            let want = |t: &String| if t.trim().is_empty() { None } else { Some(Verdict::Answer(Answer(vec![Some(t.clone())]))) };
            for (got, text) in read(&text).unwrap().iter().zip(&texts_) {
                prop_assert!(want(text).is_none_or(|want| want == *got));
            }
            let mut cut = cut.min(text.len());
            while !text.is_char_boundary(cut) {
                cut -= 1;
            }
            for (got, want_) in read(&text[..cut]).into_iter().flatten().zip(&texts_) {
                prop_assert!(!matches!(got, Verdict::Answer(_)) || want(want_) == Some(got));
            }
        }
    }
}
