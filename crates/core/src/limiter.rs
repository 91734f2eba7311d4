//! The limiter: nothing is sent that would pass the limit in any window.
//!
//! `reserve` before a request, `settle` with what it really took, `penalize` when the provider says wait. Time is a
//! parameter: milliseconds of a monotonic clock. The window rolls: what was reserved at `t` counts until `t` + window.
//!
//! A limit of so many tokens a minute is kept in a window shorter than a minute, in proportion, where the limit is
//! large enough for that: what holds in every 6 s holds in every minute, and requests are spread instead of sent in
//! one burst.

use std::collections::VecDeque;

/// A limit a minute, as a provider states it. `None` is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// Requests a minute.
    pub requests_per_minute: Option<u64>,
    /// Tokens a minute, prompts and answers together.
    pub tokens_per_minute: Option<u64>,
    /// Tokens of prompts a minute.
    pub input_tokens_per_minute: Option<u64>,
    /// Tokens of answers a minute.
    pub output_tokens_per_minute: Option<u64>,
}

impl Limits {
    /// The tighter of two limits, dimension by dimension.
    pub fn min(self, other: Self) -> Self {
        let min = |a: Option<u64>, b: Option<u64>| match (a, b) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        Self {
            requests_per_minute: min(self.requests_per_minute, other.requests_per_minute),
            tokens_per_minute: min(self.tokens_per_minute, other.tokens_per_minute),
            input_tokens_per_minute: min(self.input_tokens_per_minute, other.input_tokens_per_minute),
            output_tokens_per_minute: min(self.output_tokens_per_minute, other.output_tokens_per_minute),
        }
    }
}

/// What a request takes, in tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tokens {
    /// Of its prompt.
    pub input: u64,
    /// Of its answer.
    pub output: u64,
}

/// Why a request may not be sent now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Not before this time (ms).
    Until(u64),
    /// Never: it is larger than the whole limit.
    TooLarge,
}

/// A reservation, to be settled.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a reservation that is not settled counts in full"]
pub struct Grant {
    slot: u64,
    tokens: Tokens,
}

/// What is counted: requests, input tokens, output tokens.
#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    number: u64,
    requests: u64,
    tokens: Tokens,
}

/// Longest window, ms.
const MINUTE: u64 = 60_000;
/// Shortest window, ms.
const SHORTEST: u64 = 6_000;
/// A window that holds fewer tokens than this is too coarse for whole requests of some thousand tokens.
const TOKENS_PER_WINDOW: u64 = 48_000;
/// The same for tokens of answers, of which a request has some hundred.
const OUTPUT_TOKENS_PER_WINDOW: u64 = 8_000;
/// The same for requests.
const REQUESTS_PER_WINDOW: u64 = 16;
/// Slots a window is divided into; what is counted in a slot counts until the whole slot has left the window.
const SLOTS: u64 = 1_000;
/// A request reaches the provider up to this much (ms) later than we sent it, and another one sooner: by so much our
/// windows are longer than the provider's.
const SLACK: u64 = 250;

/// The limiter of one account and model.
#[derive(Debug)]
pub struct Limiter {
    window: u64,
    /// The limits, of a window.
    requests: Option<u64>,
    tokens: Option<u64>,
    input: Option<u64>,
    output: Option<u64>,
    used: VecDeque<Slot>,
    blocked_until: u64,
}

impl Limiter {
    /// A limiter that knows nothing of what was sent before `started` (ms), and therefore behaves as if the window
    /// before had been used up evenly.
    pub fn new(limits: Limits, started: u64) -> Self {
        let mut limiter = Self {
            window: MINUTE,
            requests: None,
            tokens: None,
            input: None,
            output: None,
            used: VecDeque::new(),
            blocked_until: 0,
        };
        limiter.set_limits(limits);
        let first = started.saturating_sub(limiter.window) / limiter.width();
        // All that either limit of input tokens allows; output only where it has a limit of its own.
        let input = limiter.input.into_iter().chain(limiter.tokens).min();
        for i in 0..SLOTS {
            // Cumulative shares, so that rounding loses nothing.
            let share = |all: Option<u64>| all.map_or(0, |all| all * (i + 1) / SLOTS - all * i / SLOTS);
            limiter.used.push_back(Slot {
                number: first + i,
                requests: share(limiter.requests),
                tokens: Tokens { input: share(input), output: share(limiter.output) },
            });
        }
        limiter
    }

    /// Changes the limits; what was counted stays counted, spread anew if the window's length changes.
    pub fn set_limits(&mut self, limits: Limits) {
        // A whole part of a minute, or a minute could overlap one window more than it is entitled to.
        let window = [
            (limits.tokens_per_minute, TOKENS_PER_WINDOW),
            (limits.input_tokens_per_minute, TOKENS_PER_WINDOW),
            (limits.output_tokens_per_minute, OUTPUT_TOKENS_PER_WINDOW),
            (limits.requests_per_minute, REQUESTS_PER_WINDOW),
        ]
        .into_iter()
        .filter_map(|(limit, want)| limit.map(|l| MINUTE / (l / want).clamp(1, MINUTE / SHORTEST)))
        .max()
        .unwrap_or(MINUTE);
        if window != self.window {
            let (old, new) = (self.width(), window / SLOTS);
            let mut moved: VecDeque<Slot> = VecDeque::new();
            for slot in &self.used {
                let number = slot.number * old / new;
                match moved.back_mut() {
                    Some(last) if last.number == number => last.add(slot.requests, slot.tokens),
                    _ => moved.push_back(Slot { number, ..*slot }),
                }
            }
            self.used = moved;
            self.window = window;
        }
        let share = |limit: Option<u64>| limit.map(|l| (l * window / MINUTE).max(1));
        self.requests = share(limits.requests_per_minute);
        self.tokens = share(limits.tokens_per_minute);
        self.input = share(limits.input_tokens_per_minute);
        self.output = share(limits.output_tokens_per_minute);
    }

    fn width(&self) -> u64 {
        self.window / SLOTS
    }

    /// When (ms) what is counted in slot `number` stops counting.
    fn leaves_at(&self, number: u64) -> u64 {
        (number + 1) * self.width() + self.window + SLACK
    }

    fn forget(&mut self, now: u64) {
        while self.used.front().is_some_and(|s| self.leaves_at(s.number) <= now) {
            self.used.pop_front();
        }
    }

    /// Most tokens one request may take, prompt and answer together, if there is a limit.
    pub fn largest_request(&self) -> Option<u64> {
        self.tokens.into_iter().chain(self.input).min()
    }

    /// Whether so much stays within the limits of a window.
    fn fits(&self, requests: u64, tokens: Tokens) -> bool {
        let within = |limit: Option<u64>, n: u64| limit.is_none_or(|limit| n <= limit);
        within(self.requests, requests)
            && within(self.tokens, tokens.input + tokens.output)
            && within(self.input, tokens.input)
            && within(self.output, tokens.output)
    }

    /// Asks to send one request of so many tokens at `now` (ms).
    ///
    /// # Errors
    /// When it may not be sent now; see [`Refusal`].
    pub fn reserve(&mut self, now: u64, tokens: Tokens) -> Result<Grant, Refusal> {
        if !self.fits(1, tokens) {
            return Err(Refusal::TooLarge);
        }
        if now < self.blocked_until {
            return Err(Refusal::Until(self.blocked_until));
        }
        self.forget(now);
        let mut sum = self.used();
        sum.add(1, tokens);
        if !self.fits(sum.requests, sum.tokens) {
            for slot in &self.used {
                sum.requests -= slot.requests;
                sum.tokens.input -= slot.tokens.input;
                sum.tokens.output -= slot.tokens.output;
                if self.fits(sum.requests, sum.tokens) {
                    return Err(Refusal::Until(self.leaves_at(slot.number)));
                }
            }
        }
        Ok(self.count(now, tokens))
    }

    fn count(&mut self, now: u64, tokens: Tokens) -> Grant {
        let number = now / self.width();
        match self.used.back_mut() {
            Some(last) if last.number >= number => last.add(1, tokens),
            _ => self.used.push_back(Slot { number, requests: 1, tokens }),
        }
        let slot = self.used.back().map_or(number, |s| s.number);
        Grant { slot, tokens }
    }

    fn slot(&mut self, number: u64) -> Option<&mut Slot> {
        let i = self.used.binary_search_by_key(&number, |s| s.number).ok()?;
        self.used.get_mut(i)
    }

    /// The request was sent only at `now` (ms), later than it was granted: so much later it leaves the window.
    pub fn sent(&mut self, grant: Grant, now: u64) -> Grant {
        match self.slot(grant.slot) {
            Some(slot) if slot.requests > 0 => {
                slot.requests -= 1;
                slot.tokens.input = slot.tokens.input.saturating_sub(grant.tokens.input);
                slot.tokens.output = slot.tokens.output.saturating_sub(grant.tokens.output);
                self.count(now, grant.tokens)
            }
            _ => grant,
        }
    }

    /// Replaces what was reserved by what the provider says it took.
    pub fn settle(&mut self, grant: Grant, actual: Tokens) {
        if let Some(slot) = self.slot(grant.slot) {
            slot.tokens.input = slot.tokens.input.saturating_sub(grant.tokens.input) + actual.input;
            slot.tokens.output = slot.tokens.output.saturating_sub(grant.tokens.output) + actual.output;
        }
    }

    /// Sends nothing before `until` (ms): the provider said so.
    pub fn penalize(&mut self, until: u64) {
        self.blocked_until = self.blocked_until.max(until);
    }

    /// The time (ms) before which nothing is sent because the provider said so; 0 if it did not.
    pub fn blocked_until(&self) -> u64 {
        self.blocked_until
    }

    /// All that counts at present.
    fn used(&self) -> Slot {
        let mut sum = Slot::default();
        for slot in &self.used {
            sum.add(slot.requests, slot.tokens);
        }
        sum
    }

    /// How much of the limits is used at `now` (ms).
    pub fn usage(&mut self, now: u64) -> Usage {
        self.forget(now);
        let Slot { requests, tokens, .. } = self.used();
        let minute = |n: u64| n * MINUTE / self.window;
        let all = tokens.input + tokens.output;
        let part = |n: u64, limit: Option<u64>| limit.map(|l| n as f64 / l as f64);
        let used = [
            part(requests, self.requests),
            part(all, self.tokens),
            part(tokens.input, self.input),
            part(tokens.output, self.output),
        ];
        Usage {
            requests: minute(requests),
            requests_limit: self.requests.map(minute),
            tokens: minute(all),
            tokens_limit: self.tokens.map(minute),
            used: used.into_iter().flatten().reduce(f64::max),
        }
    }
}

impl Slot {
    fn add(&mut self, requests: u64, tokens: Tokens) {
        self.requests += requests;
        self.tokens.input += tokens.input;
        self.tokens.output += tokens.output;
    }
}

/// How much of the limits is used, scaled to a minute.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Usage {
    /// Requests.
    pub requests: u64,
    /// Most requests.
    pub requests_limit: Option<u64>,
    /// Tokens of prompts and answers.
    pub tokens: u64,
    /// Most tokens.
    pub tokens_limit: Option<u64>,
    /// The part of the tightest limit that is used up, 0 to 1; `None` without limits.
    pub used: Option<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn limits(rpm: Option<u64>, tpm: Option<u64>) -> Limits {
        Limits { requests_per_minute: rpm, tokens_per_minute: tpm, ..Limits::default() }
    }

    fn of(input: u64) -> Tokens {
        Tokens { input, output: 0 }
    }

    /// A limiter whose start is long past.
    fn warm(l: Limits) -> (Limiter, u64) {
        (Limiter::new(l, 0), 1_000_000)
    }

    #[test]
    fn waits_for_what_leaves_the_window() {
        let (mut l, now) = warm(limits(None, Some(60_000)));
        assert_eq!(l.window, 60_000);
        let _ = l.reserve(now, of(55_000)).unwrap();
        let Err(Refusal::Until(t)) = l.reserve(now + 10, of(10_000)) else { panic!() };
        assert!((now + 60_000..now + 60_400).contains(&t), "{t}");
        assert_eq!(l.reserve(t - 1, of(10_000)), Err(Refusal::Until(t)));
        let _ = l.reserve(t, of(10_000)).unwrap();
    }

    #[test]
    fn a_request_larger_than_the_limit_never_goes() {
        let (mut l, now) = warm(limits(None, Some(500_000)));
        assert_eq!(l.reserve(now, of(50_001)), Err(Refusal::TooLarge));
    }

    #[test]
    fn unused_reservations_are_given_back_at_once() {
        let (mut l, now) = warm(limits(None, Some(500_000)));
        let g = l.reserve(now, of(50_000)).unwrap();
        assert!(l.reserve(now, of(1)).is_err());
        l.settle(g, of(20_000));
        let _ = l.reserve(now, of(30_000)).unwrap();
        assert!(l.reserve(now, of(1)).is_err());
    }

    #[test]
    fn a_new_limiter_starts_as_if_the_window_before_had_been_used_up() {
        let mut l = Limiter::new(limits(Some(600), Some(500_000)), 1_000_000);
        let Err(Refusal::Until(t)) = l.reserve(1_000_000, of(25_000)) else { panic!() };
        assert!((1_002_900..1_003_400).contains(&t), "half of 6 s: {t}");
    }

    #[test]
    fn input_and_output_have_limits_of_their_own() {
        let l = Limits {
            input_tokens_per_minute: Some(60_000),
            output_tokens_per_minute: Some(9_000),
            ..Limits::default()
        };
        let (mut l, now) = warm(l);
        let _ = l.reserve(now, Tokens { input: 50_000, output: 1_000 }).unwrap();
        assert!(l.reserve(now, Tokens { input: 20_000, output: 0 }).is_err());
        let _ = l.reserve(now, Tokens { input: 1_000, output: 8_000 }).unwrap();
        assert!(l.reserve(now, Tokens { input: 0, output: 1 }).is_err());
        assert_eq!(l.usage(now).used, Some(1.0));
    }

    #[test]
    fn a_penalty_holds_everything_back() {
        let (mut l, now) = warm(Limits::default());
        l.penalize(now + 500);
        l.penalize(now + 300);
        assert_eq!(l.reserve(now, of(1)), Err(Refusal::Until(now + 500)));
        let _ = l.reserve(now + 500, of(1)).unwrap();
    }

    #[derive(Debug, Clone)]
    struct Ask {
        gap: u64,
        tokens: u64,
        actual: u64,
        travel: u64,
        lag: u64,
    }

    proptest! {
        /// Requests reach the provider up to SLACK late; no window of the provider's ever holds more than the limit.
        #[test]
        fn no_window_is_ever_passed(
            tpm in prop_oneof![Just(None), (2_000u64..2_000_000).prop_map(Some)],
            rpm in prop_oneof![Just(None), (1u64..5_000).prop_map(Some)],
            asks in proptest::collection::vec((0u64..3_000, 1u64..20_000, 0u64..20_000, 0u64..SLACK, prop_oneof![Just(0), 0u64..2_000])
                .prop_map(|(gap, tokens, actual, travel, lag)| Ask { gap, tokens, actual: actual.min(tokens), travel, lag }), 1..300),
        ) {
            let (mut l, mut now) = warm(limits(rpm, tpm));
            let mut arrived: Vec<(u64, u64)> = Vec::new();
            for ask in asks {
                now += ask.gap;
                let grant = loop {
                    match l.reserve(now, of(ask.tokens)) {
                        Ok(g) => break Some(g),
                        Err(Refusal::Until(t)) => { prop_assert!(t > now); now = t; }
                        Err(Refusal::TooLarge) => { prop_assert!(ask.tokens > l.largest_request().unwrap()); break None; }
                    }
                };
                if let Some(g) = grant {
                    // Sent some time after it was granted.
                    now += ask.lag;
                    let g = l.sent(g, now);
                    arrived.push((now + ask.travel, ask.actual));
                    l.settle(g, of(ask.actual));
                }
            }
            for (end, _) in &arrived {
                let inside: Vec<u64> = arrived.iter().filter(|(t, _)| *t <= *end && *t + MINUTE > *end).map(|a| a.1).collect();
                if let Some(tpm) = tpm { prop_assert!(inside.iter().sum::<u64>() <= tpm); }
                if let Some(rpm) = rpm { prop_assert!(inside.len() as u64 <= rpm.max(1)); }
            }
        }

        /// A client that always has something to send uses nearly all of the limit.
        #[test]
        fn the_limit_is_used(tpm in 200_000u64..2_000_000, size in 500u64..3_000) {
            let (mut l, start) = warm(limits(None, Some(tpm)));
            let (mut now, mut sent) = (start, 0);
            while now < start + 10 * MINUTE {
                match l.reserve(now, of(size)) {
                    Ok(g) => { l.settle(g, of(size)); sent += size; }
                    Err(Refusal::Until(t)) => now = t,
                    Err(Refusal::TooLarge) => unreachable!(),
                }
            }
            prop_assert!(sent as f64 >= 0.9 * 10.0 * tpm as f64, "{sent} of {}", 10 * tpm);
        }
    }
}
