//! Counting tokens with OpenAI's o200k vocabulary. Other models' tokenizers differ; the measured ratio corrects that.

/// Loads the vocabulary (once, some tens of megabytes) and makes the first count fast.
pub fn load() {
    count("a");
}

/// Tokens of a text.
pub fn count(text: &str) -> usize {
    bpe_openai::o200k_base().count(text)
}

/// The longest beginning of `text` whose JSON string has at most `most` tokens.
pub fn beginning(text: &str, most: usize) -> &str {
    let fits = |end: usize| count(&llm_batch_core::prompt::quote(&text[..end])) <= most;
    // A token is at least one byte; so what is looked at is bounded, whatever the text.
    let (mut low, mut high) = (0, text.floor_char_boundary(most.saturating_mul(32)));
    while low < high {
        let middle = text.ceil_char_boundary(low + (high - low).div_ceil(2));
        if fits(middle) {
            low = middle;
        } else {
            high = text.floor_char_boundary(middle - 1);
        }
    }
    &text[..low]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_one_token_each_way() {
        for id in 100..1000 {
            assert_eq!(count(&id.to_string()), 1);
        }
    }

    #[test]
    fn a_beginning_is_as_long_as_fits() {
        for text in ["größer und größer, 日本語 and more of it", "\n\n\n\"\"\"", ""] {
            for most in 2..20 {
                let b = beginning(text, most);
                let size = |t: &str| count(&llm_batch_core::prompt::quote(t));
                assert!(size(b) <= most, "{b}");
                if let Some(c) = text[b.len()..].chars().next() {
                    // Not longer by a character; token counts need not rise evenly, so allow a little.
                    assert!(size(&format!("{b}{c}")) + 2 > most, "{b}");
                }
            }
        }
    }
}
