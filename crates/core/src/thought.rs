//! Tokens that a model spends before it answers.
//!
//! They count against the cap of an answer and cost as much as an answer. Their number is unknown beforehand: for one prompt
//! between 245 and 13,469 were measured.

/// The weight of the old mean with each further answer, once there were some.
const RECENT: f64 = 0.95;
/// The part of the longest that stays with each further answer.
const LONGEST: f64 = 0.998;
/// An answer's cap leaves room for so many times the longest.
const ROOM: f64 = 2.0;
/// More than the mean is reserved: an estimate that is too low breaks the limit.
const RESERVED: f64 = 1.25;
/// Tokens beyond those of the text that are none of thinking: servers count marks of their own.
const UNACCOUNTED: u64 = 16;

/// The tokens of recent answers that came before the answer itself.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Thinking {
    mean: f64,
    longest: f64,
    /// Weight of the mean.
    answers: f64,
}

impl Thinking {
    /// An answer had so many. `is_cut`: it was cut off while it did, so that there would have been more.
    pub fn observe(&mut self, tokens: u64, is_cut: bool) {
        let tokens = tokens as f64;
        if is_cut && tokens <= self.mean {
            return;
        }
        self.answers = self.answers * RECENT + 1.0;
        self.mean += (tokens - self.mean) / self.answers;
        self.longest = tokens.max(self.longest * LONGEST);
    }

    /// Tokens that an answer has of them, in the mean of late.
    pub fn usual(&self) -> u64 {
        self.mean.round() as u64
    }

    /// The number of tokens to reserve for them.
    pub fn reserved(&self) -> u64 {
        (self.mean * RESERVED).ceil() as u64
    }

    /// The room that an answer's cap leaves for them.
    pub fn room(&self) -> u64 {
        (self.longest * ROOM).ceil() as u64
    }
}

/// The tokens of an answer that came before the answer itself: what the provider says of it (`said`), else what the text
/// does not account for. `text_tokens` is called only if there may be some.
pub fn thought(output: u64, said: Option<u64>, text: &str, text_tokens: impl FnOnce(&str) -> usize) -> u64 {
    match said {
        Some(said) => said.min(output),
        // No tokenizer makes more tokens of a text than it has bytes.
        None if output > text.len() as u64 + UNACCOUNTED => output.saturating_sub(text_tokens(text) as u64),
        None => 0,
    }
}

/// The largest cap that a server allows, by what it says of one of `asked` tokens that it refuses; half of that if it does
/// not say.
pub fn cap_in(message: &str, asked: u64) -> u64 {
    let numbers = message.split(|c: char| !c.is_ascii_digit() && c != ',' && c != '_');
    let numbers = numbers.filter_map(|n| n.replace([',', '_'], "").parse::<u64>().ok());
    numbers.filter(|n| (16..asked).contains(n)).max().unwrap_or(asked / 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_thought_is_known_after_an_answer_and_followed() {
        let mut t = Thinking::default();
        assert_eq!((t.usual(), t.reserved(), t.room()), (0, 0, 0));
        t.observe(600, true);
        t.observe(3_500, false);
        assert!((2_000..=3_500).contains(&t.usual()) && t.room() == 7_000, "{t:?}");
        // A thought that was cut off says only that there were at least so many tokens.
        t.observe(100, true);
        (0..60).for_each(|_| t.observe(3_500, false));
        assert!((3_400..=3_500).contains(&t.usual()), "{t:?}");
        (0..200).for_each(|_| t.observe(0, false));
        assert!(t.usual() < 10 && t.room() > 3_500, "{t:?}");
    }

    #[test]
    fn what_is_thought_is_said_or_what_the_text_does_not_account_for() {
        let none = |_: &str| panic!("counted");
        assert_eq!(thought(100, Some(60), "", none), 60);
        assert_eq!(thought(100, Some(600), "", none), 100);
        assert_eq!(thought(10, None, r#"{"417":"billing"}"#, none), 0);
        assert_eq!(thought(100, None, r#"{"417":"billing"}"#, |_| 7), 93);
        assert_eq!(thought(100, None, "", |_| 0), 100);
    }

    #[test]
    fn a_cap_is_taken_from_what_servers_say_of_it() {
        for (message, cap) in [
            (
                "max_tokens is too large: 32768. This model supports at most 16384 completion tokens, whereas you provided 32768.",
                16_384,
            ),
            (
                "max_tokens: 32768 > 8192, which is the maximum allowed number of output tokens for claude-3-5-sonnet-20241022",
                8_192,
            ),
            ("Invalid max_tokens value, the valid range of max_tokens is [1, 8192]", 8_192),
            ("`max_tokens` must be less than or equal to `8,192`", 8_192),
            ("max_tokens is too large", 16_384),
        ] {
            assert_eq!(cap_in(message, 32_768), cap, "{message}");
        }
    }

    proptest! {
        #[test]
        fn a_cap_that_was_refused_gets_smaller(message in ".{0,80}", asked in 1u64..1_000_000) {
            prop_assert!(cap_in(&message, asked) < asked);
        }

        #[test]
        fn nothing_grows_beyond_what_was_seen(seen in proptest::collection::vec((0u64..20_000, any::<bool>()), 1..50)) {
            let mut t = Thinking::default();
            let most = seen.iter().map(|(n, _)| *n).max().unwrap_or(0);
            seen.iter().for_each(|(n, is_cut)| t.observe(*n, *is_cut));
            prop_assert!(t.usual() <= most && t.room() <= 2 * most + 1, "{t:?}");
        }
    }
}
