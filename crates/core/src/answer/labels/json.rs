//! JSON and what is like it: Python's and JavaScript's quotes, words without quotes, comments, lists without ends.
//!
//! One pass over the text with a stack of open objects and lists, no recursion: the work is linear in the bytes. A
//! member is looked at once it is complete, and what it depends on has closed; so a text that was cut off loses rows and
//! changes none.

use std::borrow::Cow;
use std::ops::Range;

use super::{Claims, Reading, Verdict};
use crate::answer::number;

/// Deepest nesting that is looked into.
const MOST_DEPTH: usize = 16;
/// Most values of a list that says something of a row.
const MOST_VALUES: usize = 4;

/// The result of a reading, beside the claims.
#[derive(Default)]
pub(super) struct Found {
    /// Parts of the text that are JSON, in order: whatever they quote is nobody's answer.
    pub covered: Vec<Range<usize>>,
    /// The text of the only member of the only object, if that is JSON in its turn.
    pub only_string: Option<String>,
}

/// None, one, or several of a kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Some1 {
    #[default]
    None,
    One(usize),
    Several,
}

impl Some1 {
    fn add(&mut self, other: Self) {
        *self = match (*self, other) {
            (Self::None, other) => other,
            (this, Self::None) => this,
            (this, other) if this == other => this,
            _ => Self::Several,
        };
    }

    fn of(found: Option<usize>) -> Self {
        found.map_or(Self::None, Self::One)
    }
}

/// A string, or a word or number without quotes.
#[derive(Debug)]
struct Leaf<'a> {
    text: Cow<'a, str>,
    is_quoted: bool,
}

impl Leaf<'_> {
    /// It stands for nothing.
    fn is_null(&self) -> bool {
        !self.is_quoted && matches!(&*self.text, "null" | "None" | "nil" | "NaN" | "undefined")
    }

    /// It is no word.
    fn is_number(&self) -> bool {
        !self.is_quoted
            && (self.text.parse::<f64>().is_ok() || matches!(&*self.text, "true" | "false" | "True" | "False"))
    }
}

/// A summary of an object or a list.
#[derive(Debug, Default)]
struct Summary {
    /// Numbers and labels among its values.
    rows: Some1,
    labels: Some1,
    /// It has pairs of its own, or is one.
    has_pairs: bool,
    /// The pair that it is, unless it stands under a number.
    pair: Option<(usize, usize)>,
    /// The rows whose numbers it lists, if that is all it has.
    list: Vec<usize>,
}

#[derive(Debug)]
enum Value<'a> {
    Leaf(Leaf<'a>),
    Inner(Summary),
}

/// An open object or list.
#[derive(Debug)]
struct Frame<'a> {
    close: char,
    start: usize,
    key: Option<Leaf<'a>>,
    value: Option<Value<'a>>,
    /// The member is no JSON.
    is_spoilt: bool,
    /// A line has ended after its value.
    is_past_line: bool,
    /// There is a string, a key or a pair in it, or in what is in it.
    is_solid: bool,
    members: usize,
    inner: usize,
    sum: Summary,
    /// The values of `i` and `c`.
    i: Option<usize>,
    c: Option<Leaf<'a>>,
    only_string: Option<String>,
}

impl Frame<'_> {
    fn new(open: char, start: usize) -> Self {
        Self {
            close: match open {
                '{' => '}',
                '[' => ']',
                _ => ')',
            },
            start,
            key: None,
            value: None,
            is_spoilt: false,
            is_past_line: false,
            is_solid: false,
            members: 0,
            inner: 0,
            sum: Summary::default(),
            i: None,
            c: None,
            only_string: None,
        }
    }
}

/// Reads what begins with one of these signs.
pub(super) fn read(text: &str, begins: &[char], claims: &mut Claims) -> Found {
    let mut reader = Reader {
        text,
        begins,
        at: 0,
        stack: Vec::new(),
        too_deep: 0,
        hopeless: [0; 4],
        line_end: 0,
        found: Found::default(),
        claims,
    };
    while reader.step() {}
    reader.end();
    reader.found
}

struct Reader<'a, 'b, 'c> {
    text: &'a str,
    begins: &'b [char],
    at: usize,
    stack: Vec<Frame<'a>>,
    /// Open ones that are too deep to be looked into.
    too_deep: usize,
    /// Up to where looking for the end of a string in single, curly or back quotes is in vain.
    hopeless: [usize; 4],
    /// The end of the line that was last looked for.
    line_end: usize,
    found: Found,
    claims: &'b mut Claims<'c>,
}

impl<'a> Reader<'a, '_, '_> {
    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or_default()
    }

    /// Reads on; false at the end.
    fn step(&mut self) -> bool {
        if self.stack.is_empty() {
            let Some(start) = self.rest().find(self.begins) else { return false };
            self.at += start;
        }
        let rest = self.rest();
        let Some(c) = rest.chars().next() else { return false };
        self.at += c.len_utf8();
        let after = rest.get(c.len_utf8()..).unwrap_or_default();
        match c {
            '\n' => {
                if let Some(frame) = self.stack.last_mut().filter(|f| f.value.is_some()) {
                    frame.is_past_line = true;
                }
            }
            _ if c.is_whitespace() => {}
            '{' | '[' | '(' => self.open(c),
            '}' | ']' | ')' => self.close(c),
            ',' => self.end_member(),
            ':' | '=' | '-' if c != '-' || after.starts_with('>') => {
                let is_arrow = after.starts_with('>');
                self.at += usize::from(is_arrow);
                self.colon(is_arrow);
            }
            '/' if after.starts_with('/') => self.skip_line(),
            '#' if !after.starts_with(|c: char| c.is_ascii_digit()) => self.skip_line(),
            '/' if after.starts_with('*') => self.at += after.find("*/").map_or(after.len(), |end| end + 2),
            '"' => self.quoted(),
            '\'' | '`' | '\u{2018}' | '\u{201c}' => self.oddly_quoted(c),
            _ => self.word(c),
        }
        true
    }

    fn skip_line(&mut self) {
        self.at += self.rest().find('\n').unwrap_or(self.rest().len());
    }

    fn open(&mut self, c: char) {
        if self.too_deep > 0 || self.stack.len() >= MOST_DEPTH {
            self.too_deep += 1;
            return;
        }
        self.begin_value();
        self.stack.push(Frame::new(c, self.at - 1));
    }

    fn close(&mut self, c: char) {
        if self.too_deep > 0 {
            self.too_deep -= 1;
            return;
        }
        // This also ends all that is still open within.
        if !self.stack.iter().any(|f| f.close == c) {
            return;
        }
        loop {
            self.end_member();
            let Some(frame) = self.stack.pop() else { return };
            let is_it = frame.close == c;
            self.closed(frame, is_it);
            if is_it {
                return;
            }
        }
    }

    /// A key ends.
    fn colon(&mut self, is_arrow: bool) {
        let Some(frame) = self.stack.last_mut().filter(|_| self.too_deep == 0) else { return };
        match frame.value.take() {
            Some(Value::Leaf(leaf)) if frame.key.is_none() && (frame.close == '}' || is_arrow) => {
                (frame.key, frame.is_past_line, frame.is_solid) = (Some(leaf), false, true);
            }
            _ => frame.is_spoilt = true,
        }
    }

    /// Begins a value. After the end of a line it may be the next value, without a comma before it.
    fn begin_value(&mut self) {
        if self.stack.last().is_some_and(|f| f.is_past_line) {
            self.end_member();
        }
    }

    fn leaf(&mut self, leaf: Leaf<'a>) {
        if self.too_deep > 0 {
            return;
        }
        self.begin_value();
        let Some(frame) = self.stack.last_mut() else { return };
        frame.is_solid |= leaf.is_quoted;
        if frame.value.is_some() {
            frame.is_spoilt = true;
        }
        frame.value = Some(Value::Leaf(leaf));
    }

    /// A string as JSON has it. One without an end takes the rest of the text.
    fn quoted(&mut self) {
        let bytes = self.text.as_bytes();
        let mut end = self.at;
        let mut is_plain = true;
        loop {
            match bytes.get(end) {
                None => {
                    if let Some(frame) = self.stack.last_mut() {
                        (frame.is_spoilt, frame.is_solid) = (true, true);
                    }
                    self.at = bytes.len();
                    return;
                }
                Some(b'\\') => (end, is_plain) = (end + 2, false),
                Some(b'"') => break,
                Some(_) => end += 1,
            }
        }
        let inside = self.text.get(self.at..end).unwrap_or_default();
        let text = match self.text.get(self.at - 1..=end) {
            Some(whole) if !is_plain => serde_json::from_str(whole).map_or(Cow::Borrowed(inside), Cow::Owned),
            _ => Cow::Borrowed(inside),
        };
        self.at = end + 1;
        self.leaf(Leaf { text, is_quoted: true });
    }

    /// A string in other quotes, which may be apostrophes too: it ends at one that is followed by what follows a string,
    /// on the same line.
    fn oddly_quoted(&mut self, open: char) {
        let (close, kind) = match open {
            '\u{201c}' => ('\u{201d}', 1),
            '\u{2018}' => ('\u{2019}', 2),
            '`' => ('`', 3),
            _ => ('\'', 0),
        };
        if self.at > self.line_end || self.line_end == 0 {
            self.line_end = self.rest().find('\n').map_or(self.text.len(), |end| self.at + end);
        }
        let line = self.text.get(self.at..self.line_end).unwrap_or_default();
        let is_end = |(at, c): &(usize, char)| {
            let after = || line.get(at + c.len_utf8()..).unwrap_or_default().trim_start();
            *c == close && (after().is_empty() || after().starts_with([',', ':', '}', ']', ')', '=', '-']))
        };
        let is_hopeless = self.hopeless.get(kind).is_some_and(|until| self.at < *until);
        let end = if is_hopeless { None } else { line.char_indices().find(is_end) };
        match end {
            Some((end, c)) => {
                let text = Cow::Borrowed(line.get(..end).unwrap_or_default());
                self.at += end + c.len_utf8();
                self.leaf(Leaf { text, is_quoted: true });
            }
            None => {
                if let Some(until) = self.hopeless.get_mut(kind) {
                    *until = (*until).max(self.at + line.len());
                }
                self.word(open);
            }
        }
    }

    /// A word, or some, without quotes. At the end of the text it may go on.
    fn word(&mut self, first: char) {
        let start = self.at - first.len_utf8();
        let is_tuple = self.stack.last().is_some_and(|f| f.close == ')');
        let ends = |c: char| matches!(c, ',' | ':' | '=' | '{' | '}' | '[' | ']' | '\n') || (c == ')' && is_tuple);
        match self.rest().find(ends) {
            Some(length) => {
                self.at += length;
                let text = self.text.get(start..self.at).unwrap_or_default().trim_end();
                self.leaf(Leaf { text: Cow::Borrowed(text), is_quoted: false });
            }
            None => {
                if let Some(frame) = self.stack.last_mut() {
                    frame.is_spoilt = true;
                }
                self.at = self.text.len();
            }
        }
    }

    fn end_member(&mut self) {
        if self.too_deep > 0 {
            return;
        }
        let Some(frame) = self.stack.last_mut() else { return };
        frame.is_past_line = false;
        let (key, value, is_spoilt) = (frame.key.take(), frame.value.take(), std::mem::take(&mut frame.is_spoilt));
        if is_spoilt {
            // Whatever it is, nothing can be said of the whole.
            frame.members += 1;
            (frame.sum.rows, frame.sum.labels) = (Some1::Several, Some1::Several);
            return;
        }
        let Some(value) = value else { return };
        frame.members += 1;
        match (key, value) {
            (Some(key), Value::Leaf(leaf)) => member(frame, self.claims, &key, leaf),
            (Some(key), Value::Inner(sum)) => inner(frame, self.claims, &key, sum),
            (None, Value::Leaf(leaf)) => element(frame, self.claims, &leaf),
            (None, Value::Inner(sum)) => {
                frame.inner += 1;
                merge(frame, self.claims, sum);
            }
        }
    }

    /// An object or list has ended; `as_written` if by its own sign.
    fn closed(&mut self, mut frame: Frame<'a>, as_written: bool) {
        let claims = &mut *self.claims;
        let is_list = frame.close != '}';
        if let (Some(row), Some(code), false) = (frame.i, frame.c.as_ref(), frame.sum.has_pairs) {
            asked(claims, row, code);
            frame.sum.has_pairs = true;
        }
        let may_be_pair = as_written
            && !frame.sum.has_pairs
            && (2..).contains(&frame.members)
            && (!is_list || (frame.inner == 0 && frame.members <= MOST_VALUES));
        match (frame.sum.rows, frame.sum.labels) {
            (Some1::One(row), Some1::One(label)) if may_be_pair => frame.sum.pair = Some((row, label)),
            (Some1::One(row), Some1::None) if may_be_pair && frame.members == 2 => claims.name(row),
            _ => {}
        }
        if !is_list || frame.sum.list.len() != frame.members {
            frame.sum.list.clear();
        }
        frame.is_solid |= frame.sum.has_pairs || frame.sum.pair.is_some();
        match self.stack.last_mut() {
            Some(outer) => {
                outer.is_solid |= frame.is_solid;
                if outer.value.is_some() {
                    outer.is_spoilt = true;
                }
                outer.value = Some(Value::Inner(frame.sum));
            }
            None => {
                if let Some((row, label)) = frame.sum.pair {
                    claims.claim(row, Reading::Member, Verdict::Label(label));
                }
                if frame.is_solid {
                    let is_first = self.found.covered.is_empty();
                    self.found.covered.push(frame.start..self.at);
                    self.found.only_string = frame.only_string.filter(|_| is_first && frame.members == 1);
                }
            }
        }
    }

    /// The text is at its end. A string that has ended is a whole value.
    fn end(&mut self) {
        let is_whole = |f: &Frame| matches!((&f.key, &f.value), (Some(_), Some(Value::Leaf(leaf))) if leaf.is_quoted);
        if self.stack.last().is_some_and(is_whole) {
            self.end_member();
        }
        let is_solid = self.stack.iter().any(|f| f.is_solid || f.sum.has_pairs);
        if let Some(outermost) = self.stack.first().filter(|_| is_solid) {
            self.found.covered.push(outermost.start..self.text.len());
        }
    }
}

/// A code stands for a row as it was asked.
fn asked(claims: &mut Claims, row: usize, code: &Leaf) {
    if let Some(label) = claims.label(&code.text).filter(|_| !code.is_null()) {
        claims.claim(row, Reading::Asked, Verdict::Label(label));
    } else if code.is_number() {
        claims.name(row);
    } else if !code.is_null() {
        claims.claim(row, Reading::Asked, Verdict::UnknownCode);
    }
}

fn member<'a>(frame: &mut Frame<'a>, claims: &mut Claims, key: &Leaf, value: Leaf<'a>) {
    if let Some(row) = claims.row(&key.text) {
        asked(claims, row, &value);
        frame.sum.has_pairs = true;
    } else if let Some(row) = claims.row_loosely(&key.text) {
        match claims.label(&value.text).filter(|_| !value.is_null()) {
            Some(label) => claims.claim(row, Reading::Member, Verdict::Label(label)),
            None => claims.name(row),
        }
        frame.sum.has_pairs = true;
    } else if number(&key.text).is_some() {
        // A pair of somebody who was not asked.
        claims.other(&key.text);
        frame.sum.has_pairs = true;
    } else {
        look_at(frame, claims, &value);
        match &*key.text {
            "i" | "id" if claims.row(&value.text).is_none() => claims.other(&value.text),
            "i" => frame.i = claims.row(&value.text),
            "c" => frame.c = Some(value),
            _ if value.is_quoted && value.text.trim_start().starts_with(['{', '[']) => {
                frame.only_string = Some(value.text.into_owned());
            }
            _ => {}
        }
    }
}

/// Notes whether a value is a number or a label.
fn look_at(frame: &mut Frame, claims: &Claims, value: &Leaf) {
    if value.is_null() {
        return;
    }
    let row = claims.row(&value.text).or_else(|| claims.row_loosely(&value.text));
    frame.sum.rows.add(Some1::of(row));
    frame.sum.labels.add(Some1::of(claims.label(&value.text)));
    frame.sum.list.extend(row);
}

fn inner(frame: &mut Frame, claims: &mut Claims, key: &Leaf, sum: Summary) {
    if let Some(row) = claims.row(&key.text).or_else(|| claims.row_loosely(&key.text)) {
        let is_his = !sum.has_pairs && (sum.rows == Some1::None || sum.rows == Some1::One(row));
        match sum.labels {
            Some1::One(label) if is_his => claims.claim(row, Reading::Member, Verdict::Label(label)),
            _ => claims.name(row),
        }
        frame.sum.has_pairs = true;
    } else if number(&key.text).is_some() {
        claims.other(&key.text);
        frame.sum.has_pairs = true;
    } else if let Some(label) = claims.legend.resolve(&key.text).filter(|_| !sum.list.is_empty()) {
        for row in sum.list {
            claims.claim(row, Reading::Grouped, Verdict::Label(label));
        }
        frame.sum.has_pairs = true;
    } else {
        merge(frame, claims, sum);
    }
}

/// Adds the summary of an inner object or list to the outer one.
fn merge(frame: &mut Frame, claims: &mut Claims, sum: Summary) {
    if let Some((row, label)) = sum.pair {
        claims.claim(row, Reading::Member, Verdict::Label(label));
    }
    frame.sum.has_pairs |= sum.has_pairs || sum.pair.is_some();
    frame.sum.rows.add(sum.rows);
    frame.sum.labels.add(sum.labels);
}

/// A value of a list.
fn element(frame: &mut Frame, claims: &mut Claims, value: &Leaf) {
    look_at(frame, claims, value);
    if value.is_number() {
        return;
    }
    // "417billing"
    let Some((id, code)) = value.text.split_at_checked(3).filter(|(_, code)| !code.is_empty()) else { return };
    let Some(row) = claims.row(id) else {
        if claims.legend.resolve(code).is_some() {
            claims.other(id);
        }
        return;
    };
    let separated = || claims.label(code.trim_start().trim_start_matches([':', '=', '-', '>', '|', '\u{2192}']));
    if let Some(label) = claims.legend.resolve(code) {
        claims.claim(row, Reading::Asked, Verdict::Label(label));
    } else if let Some(label) = separated() {
        claims.claim(row, Reading::Member, Verdict::Label(label));
    } else {
        claims.name(row);
    }
    frame.sum.has_pairs = true;
}
