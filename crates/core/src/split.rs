//! Splitting: a long text becomes pieces of at most so many tokens, cut where the text itself has its ends.
//!
//! A piece is a part of the text as it stands, without the white space around it. It ends at a paragraph's end if one is in
//! its second half, else at that of a line, a sentence, a word; inside a word only where the word alone is too long.

use std::ops::Range;

use crate::CountTokens;

/// Marks that end a sentence.
const ENDS: [char; 8] = ['.', '!', '?', '…', '。', '！', '？', '؟'];
/// Those of scripts without white space between words.
const WIDE_ENDS: [char; 3] = ['。', '！', '？'];
/// Signs that may stand between such a mark and the white space behind it.
const CLOSES: [char; 8] = ['"', '\'', ')', ']', '”', '’', '»', '」'];

/// The quality of an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    Inside,
    Word,
    Sentence,
    Line,
    Paragraph,
}

/// A part of a text that is not cut any more: a word and the white space behind it.
#[derive(Debug)]
struct Atom {
    range: Range<usize>,
    tokens: usize,
    end: End,
}

/// The pieces of a text, each of at most `most` tokens, but for a single character that has more. Each begins with as many
/// whole words of the one before as `overlap` tokens allow.
pub fn split<'a>(text: &'a str, most: usize, overlap: usize, count: CountTokens) -> Vec<&'a str> {
    let atoms = atoms(text, most, count);
    let piece = |from: usize, to: usize| {
        let range = atoms.get(from..to).and_then(|part| Some(part.first()?.range.start..part.last()?.range.end));
        range.and_then(|range| text.get(range)).unwrap_or_default().trim()
    };
    let mut pieces: Vec<&str> = Vec::new();
    // Atoms before `done` are in pieces; the next one begins at `from`.
    let (mut from, mut done) = (0, 0);
    while done < atoms.len() {
        let mut to = reach(&atoms, from, most).max(done + 1);
        // The sum is not quite what the whole takes: what is shared goes first, then the last words.
        while count(piece(from, to)) > most && to - from > 1 {
            if to > done + 1 { to -= 1 } else { from += 1 }
        }
        let end = if to == atoms.len() { to } else { best(&atoms, (from, done + 1, to)) };
        let found = piece(from, end);
        if !found.is_empty() {
            pieces.push(found);
        }
        done = end;
        from = shared(&atoms, from, end, overlap);
    }
    pieces
}

/// The end of the longest piece that begins at an atom.
fn reach(atoms: &[Atom], from: usize, most: usize) -> usize {
    let mut sum = 0;
    let fits = |atom: &&Atom| {
        sum += atom.tokens;
        sum <= most
    };
    from + atoms.get(from..).unwrap_or_default().iter().take_while(fits).count()
}

/// The best end of a piece from one atom to another, not before `least`: in its second half.
fn best(atoms: &[Atom], (from, least, to): (usize, usize, usize)) -> usize {
    let part = atoms.get(from..to).unwrap_or_default();
    let all: usize = part.iter().map(|atom| atom.tokens).sum();
    let mut sum = 0;
    let mut found = (End::Inside, to);
    for (atom, end) in part.iter().zip(from + 1..) {
        sum += atom.tokens;
        if end >= least && 2 * sum >= all && atom.end >= found.0 {
            found = (atom.end, end);
        }
    }
    found.1
}

/// The beginning of the next piece: `overlap` tokens before the end of this one, but behind its beginning.
fn shared(atoms: &[Atom], from: usize, end: usize, overlap: usize) -> usize {
    let mut sum = 0;
    let fits = |atom: &&Atom| {
        sum += atom.tokens;
        sum <= overlap
    };
    let part = atoms.get(from + 1..end).unwrap_or_default();
    end - part.iter().rev().take_while(fits).count()
}

/// The words of a text, those that are too long in parts.
fn atoms(text: &str, most: usize, count: CountTokens) -> Vec<Atom> {
    let mut all = Vec::new();
    // The end of the word before: tokens begin with the white space before a word.
    let (mut start, mut before) = (0, 0);
    while let Some(rest) = text.get(start..).filter(|rest| !rest.is_empty()) {
        let word = word(rest);
        let behind = rest.get(word..).unwrap_or_default();
        let space = behind.find(|c: char| !c.is_whitespace()).unwrap_or(behind.len());
        let end = end(rest.get(..word).unwrap_or_default(), behind.get(..space).unwrap_or_default());
        let range = start..start + word + space;
        let of = |from: usize| count(text.get(from..range.start + word).unwrap_or_default());
        let mut tokens = of(before);
        // The first word of a piece has no white space before it.
        if 2 * tokens > most {
            tokens = tokens.max(of(range.start));
        }
        // White space before it that has more tokens than a piece may have is no part of a piece: the word stands alone.
        let own = if tokens > most { of(range.start) } else { tokens };
        (start, before) = (range.end, range.start + word);
        if own <= most {
            all.push(Atom { range, tokens, end });
        } else {
            parts(text, range, (end, own, most), count, &mut all);
        }
    }
    all
}

/// Bytes of the first word: it ends before white space, and behind a sentence of a script that has none between words.
fn word(rest: &str) -> usize {
    let mut ended = false;
    for (at, c) in rest.char_indices() {
        let is_end = WIDE_ENDS.contains(&c);
        if c.is_whitespace() || (ended && !is_end && !CLOSES.contains(&c)) {
            return at;
        }
        ended |= is_end;
    }
    rest.len()
}

/// A word of too many tokens, halved until each part has few enough.
fn parts(
    text: &str,
    range: Range<usize>,
    (end, tokens, most): (End, usize, usize),
    count: CountTokens,
    all: &mut Vec<Atom>,
) {
    let middle = text.ceil_char_boundary(range.start + range.len().div_ceil(2));
    if tokens <= most || middle >= range.end {
        return all.push(Atom { range, tokens, end });
    }
    for (half, end) in [(range.start..middle, End::Inside), (middle..range.end, end)] {
        let tokens = count(text.get(half.clone()).unwrap_or_default());
        parts(text, half, (end, tokens, most), count, all);
    }
}

/// The end that a word makes with the white space behind it.
fn end(word: &str, space: &str) -> End {
    match space.matches('\n').count() {
        0 if word.trim_end_matches(CLOSES).ends_with(ENDS) => End::Sentence,
        0 => End::Word,
        1 => End::Line,
        _ => End::Paragraph,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A token is four bytes, about.
    fn count(text: &str) -> usize {
        text.len().div_ceil(4)
    }

    /// A token is a word.
    fn words(text: &str) -> usize {
        text.split_whitespace().count()
    }

    #[test]
    fn pieces_end_where_the_text_does() {
        let text = "One two three. Four five six.\nSeven eight.\n\nNine ten eleven twelve";
        assert_eq!(
            split(text, 9, 0, &words),
            ["One two three. Four five six.\nSeven eight.", "Nine ten eleven twelve"]
        );
        assert_eq!(
            split(text, 7, 0, &words),
            ["One two three. Four five six.", "Seven eight.\n\nNine ten eleven twelve"]
        );
        assert_eq!(split("a b. c d e f g", 4, 0, &words), ["a b.", "c d e f", "g"]);
        assert_eq!(split("a b (c.) d e f", 4, 0, &words), ["a b (c.)", "d e f"]);
        // A script without white space.
        let chinese = "今天天气很好。我们去公园吧！「真的吗？」他说。";
        assert_eq!(split(chinese, 8, 0, &count), ["今天天气很好。", "我们去公园吧！", "「真的吗？」他说。"]);
        assert_eq!((split("", 4, 0, &words), split(" \n ", 4, 0, &words)), (vec![], vec![]));
        assert_eq!(split("short", 4, 3, &words), ["short"]);
    }

    #[test]
    fn pieces_share_words() {
        assert_eq!(split("a b c d e f g", 4, 2, &words), ["a b c d", "c d e f", "e f g"]);
        assert_eq!(split("a b c d e", 2, 1, &words), ["a b", "b c", "c d", "d e"]);
    }

    #[test]
    fn a_word_that_is_too_long_is_cut() {
        assert_eq!(split("abcdefghijklmnop xy", 2, 0, &count), ["abcde", "fghi", "jklmnop", "xy"]);
        assert_eq!(split("ääääääää", 1, 0, &count).concat(), "ääääääää");
    }

    proptest! {
        /// Nothing is lost, no piece is too large, and each goes on where the one before ended, or before that.
        #[test]
        fn pieces_are_the_text(text in "([a-zä]{0,30}[.!?]?[ \n]{0,3}){0,40}", most in 1_usize..30, overlap in 0_usize..30) {
            let overlap = overlap.min(most - 1);
            let pieces = split(&text, most, overlap, &count);
            let mut seen = 0;
            for piece in &pieces {
                prop_assert!(count(piece) <= most && !piece.is_empty() && *piece == piece.trim(), "{:?}", piece);
                let start = piece.as_ptr() as usize - text.as_ptr() as usize;
                prop_assert!(start <= seen || text[seen..start].trim().is_empty());
                prop_assert!(start + piece.len() > seen);
                if overlap == 0 {
                    prop_assert!(start >= seen);
                }
                seen = start + piece.len();
            }
            prop_assert!(text[seen..].trim().is_empty());
        }

        #[test]
        fn never_panics(text in "\\PC{0,200}", most in 1_usize..9, overlap in 0_usize..99) {
            let _ = split(&text, most, overlap, &count);
        }
    }
}
