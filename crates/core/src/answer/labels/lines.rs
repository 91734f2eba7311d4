//! Numbers and labels on lines: lists, tables, `417: billing`, `417 => "billing"`, blocks of YAML.
//!
//! Only lines outside of JSON are looked at, and a line must be the pair and nothing else but what explains it. A model
//! writes its lines in one way: what is written in another way than most (a text that it repeats) can contradict a
//! line, but gives no row a label.

use std::collections::HashMap;
use std::ops::Range;

use super::{Claims, Reading, Verdict, WRAPPERS, around_number, is_name};

/// The layout of a line: it has a bullet; the sign between number and label.
type Way = (bool, char);

/// Signs between a number and its label.
const BETWEEN: [char; 12] = [':', '=', '-', '>', '|', ',', ')', '.', '\u{2192}', '\u{2013}', '\u{2014}', '\u{ff1a}'];
/// Signs at the beginning of a line of a list.
const BULLETS: [char; 9] = ['-', '*', '+', '\u{2022}', '>', '\u{2013}', '\u{b7}', '|', '\u{25cf}'];
/// Names before a label.
const NAMES: [&str; 9] =
    ["label", "code", "category", "class", "classification", "answer", "result", "topic", "sentiment"];
/// Most lines of a block that begins with a number.
const MOST_BLOCK: usize = 8;
/// Longest part of a line, in bytes, in which a label is looked for before what explains it.
const MOST_LABEL: usize = 256;

pub(super) fn read(text: &str, covered: &[Range<usize>], claims: &mut Claims) {
    let mut said: Vec<(usize, usize, Way)> = Vec::new();
    let mut block: Option<Block> = None;
    let mut columns = 0;
    let (mut at, mut next) = (0, covered.iter().peekable());
    for whole in text.split_inclusive('\n') {
        let (start, end) = (at, at + whole.len());
        at = end;
        while next.next_if(|c| c.end <= start).is_some() {}
        let line = whole.trim();
        if next.peek().is_some_and(|c| c.start < end) || line.is_empty() {
            said.extend(block.take().and_then(Block::pair));
            columns = 0;
            continue;
        }
        // The last line may have been cut off.
        let is_whole = whole.ends_with('\n');
        if line.contains('|') {
            let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
            if cells.iter().all(|c| c.contains('-') && c.trim_matches(['-', ':']).is_empty()) {
                columns = cells.len();
                continue;
            }
            let is_complete = is_whole || line.ends_with('|');
            said.extend(
                cells_pair(&cells, columns, claims)
                    .filter(|_| is_complete)
                    .map(|(row, label)| (row, label, (false, '|'))),
            );
            if columns > 0 || line.starts_with('|') {
                continue;
            }
        }
        let head = head(line);
        let row = head.and_then(|(id, ..)| claims.index.get(&id).copied());
        if let Some((row, (_, way, rest))) = row.zip(head) {
            said.extend(block.take().and_then(Block::pair));
            if rest.trim_matches(WRAPPERS).is_empty() {
                block = is_whole.then_some(Block { row, labels: Vec::new(), lines: 0 });
            } else if let Some(label) = label_of(rest, is_whole, claims) {
                said.push((row, label, way));
            } else if is_whole || line.ends_with(['}', ']']) {
                said.extend(sequence(line, claims));
            }
            continue;
        }
        if let Some((id, ..)) = head.filter(|(_, _, rest)| label_of(rest, is_whole, claims).is_some()) {
            claims.others.insert(id);
        }
        if let Some(open) = block.as_mut().filter(|_| is_whole) {
            open.lines += 1;
            let value = line.split_once(':').map_or(line, |(_, value)| value).trim_start_matches(BULLETS);
            open.labels.extend(claims.label(value));
        }
    }
    said.extend(block.take().and_then(Block::pair));
    decide(&said, claims);
}

/// Claims what is written as most of it is.
fn decide(said: &[(usize, usize, Way)], claims: &mut Claims) {
    let mut count: HashMap<Way, usize> = HashMap::new();
    let mut most = None;
    for (_, _, way) in said {
        let n = count.entry(*way).or_default();
        *n += 1;
        if most.is_none_or(|(_, m)| *n > m) {
            most = Some((*way, *n));
        }
    }
    let is_usual = |way: &Way| most.is_some_and(|(usual, _)| usual == *way);
    let usual: HashMap<usize, usize> = said.iter().filter(|s| is_usual(&s.2)).map(|s| (s.0, s.1)).collect();
    for (row, label, way) in said {
        if is_usual(way) || usual.contains_key(row) {
            claims.claim(*row, Reading::Line, Verdict::Label(*label));
        }
    }
}

/// A number on a line of its own, and the lines below it.
struct Block {
    row: usize,
    labels: Vec<usize>,
    lines: usize,
}

impl Block {
    fn pair(self) -> Option<(usize, usize, Way)> {
        let label = *self.labels.first()?;
        let is_one = self.labels.iter().all(|l| *l == label) && self.lines <= MOST_BLOCK;
        is_one.then_some((self.row, label, (false, '\n')))
    }
}

/// The number with which a line begins, how the line is written, and what is behind it.
fn head(line: &str) -> Option<(u16, Way, &str)> {
    let (before, id, after) = around_number(without_ordinal(line))?;
    let bare = before.trim_start_matches(['{', '(']).trim_start();
    let name = bare.trim_start_matches("[x]").trim_start_matches("[ ]").trim_start_matches(BULLETS);
    if !is_name(name.trim_matches(['{', '(', '[', ' '])) {
        return None;
    }
    let has_bullet = bare.starts_with(BULLETS) && !bare.starts_with("**");
    // First the signs that close what was opened before the number, then the sign between.
    let rest = after.trim_start_matches(WRAPPERS);
    let has_space = after.starts_with(char::is_whitespace) || after.len() > rest.len();
    let sign = rest.chars().next().filter(|c| BETWEEN.contains(c));
    if sign.is_none() && !has_space && !rest.is_empty() {
        return None;
    }
    Some((id, (has_bullet, sign.unwrap_or(' ')), rest.trim_start_matches(BETWEEN).trim_start()))
}

/// A line without the "12." or "12)" of an ordered list.
fn without_ordinal(line: &str) -> &str {
    let rest = line.trim_start_matches(|c: char| c.is_ascii_digit());
    let is_ordinal =
        rest.len() < line.len() && rest.starts_with([')', '.']) && rest.contains(|c: char| c.is_ascii_digit());
    if is_ordinal && line.len() - rest.len() < 3 { rest.get(1..).unwrap_or_default() } else { line }
}

/// The label that the rest of a line is, perhaps with an explanation behind it.
fn label_of(rest: &str, is_whole: bool, claims: &Claims) -> Option<usize> {
    let rest = match rest.split_once([':', '=']) {
        Some((name, value)) if NAMES.contains(&&*name.trim_matches(WRAPPERS).to_lowercase()) => value,
        _ => rest,
    };
    if let Some(label) = claims.label(rest) {
        let closed = |c: char| matches!(c, '*' | '`' | '"' | '\u{201d}' | '}' | ',');
        let could_go_on = || claims.legend.goes_on(rest.trim_matches(WRAPPERS));
        return (is_whole || rest.trim_end().ends_with(closed) || !could_go_on()).then_some(label);
    }
    if let Some(label) = claims.label(rest.trim_end_matches(['}', ']', ','])) {
        return Some(label);
    }
    if !is_whole {
        return None;
    }
    // "**billing**, since …"
    for mark in ["**", "`"] {
        if let Some((inside, behind)) = rest.trim_start().strip_prefix(mark).and_then(|r| r.split_once(mark)) {
            let label = claims.label(inside).filter(|_| !behind.contains(mark));
            if label.is_some() {
                return label;
            }
        }
    }
    // "billing (since …", "billing - since …"
    let head = rest.get(..rest.floor_char_boundary(MOST_LABEL)).unwrap_or_default();
    let ends = [" (", " - ", " \u{2013} ", " \u{2014} "].into_iter().flat_map(|sign| head.rmatch_indices(sign));
    let mut ends: Vec<usize> = ends.map(|(at, _)| at).collect();
    ends.sort_unstable();
    ends.iter().rev().find_map(|at| claims.label(head.get(..*at)?))
}

/// "417: billing, 902: bug": every part is a pair.
fn sequence(line: &str, claims: &Claims) -> Vec<(usize, usize, Way)> {
    let pair = |part: &str| {
        let (id, _, rest) = head(part.trim())?;
        Some((*claims.index.get(&id)?, claims.label(rest)?, (false, ',')))
    };
    let parts = line.trim_matches(['{', '}', '[', ']', ',', ';', '.', ' ']).split([',', ';']);
    parts.map(pair).collect::<Option<Vec<_>>>().filter(|all| all.len() > 1).unwrap_or_default()
}

/// A line of a table: one cell is a number, one other a label, and none is left out or too many.
fn cells_pair(cells: &[&str], columns: usize, claims: &Claims) -> Option<(usize, usize)> {
    if cells.len() < 2 || (cells.len() != columns && cells.len() != 2) || cells.iter().any(|c| c.is_empty()) {
        return None;
    }
    let row = |cell: &&str| claims.row(cell).or_else(|| claims.row_loosely(cell));
    let (rows, others): (Vec<&str>, Vec<&str>) = cells.iter().partition(|c| row(c).is_some());
    let labels: Vec<usize> = others.iter().filter_map(|cell| claims.label(cell)).collect();
    match (rows.as_slice(), labels.as_slice()) {
        ([id], [label]) => Some((row(id)?, *label)),
        _ => None,
    }
}
