//! Another client of the same account: it takes its share evenly.

use std::time::{Duration, Instant};

use crate::amounts::{Amounts, Limit};
use crate::{Config, OtherClient};

/// Wait after a refusal.
const RETRY: Duration = Duration::from_millis(100);
/// The least time between its requests, lest there be no end of them.
const LEAST_INTERVAL: Duration = Duration::from_micros(10);
/// The most tokens of one request: sums of charges must not overflow.
const MAX_CHARGE: u64 = 1 << 32;

/// When the other client is next.
#[derive(Default)]
pub(crate) struct Other {
    /// Our first chat request since the other client was set.
    first: Option<Instant>,
    next: Option<Instant>,
}

impl Other {
    /// A chat request of ours arrived.
    pub(crate) fn arrived(&mut self, now: Instant) {
        self.first.get_or_insert(now);
    }

    /// The time of its next request and what that takes, if it is due by `now`.
    pub(crate) fn due(&mut self, now: Instant, config: &Config) -> Option<(Instant, Amounts)> {
        let (other, first) = (config.other_client.as_ref()?, self.first?);
        let next = match self.next {
            Some(next) => next,
            None => first.checked_add(other.after)?,
        };
        // While there is no limit to take a share of, nothing piles up.
        let next = if interval(config, other).is_none() { next.max(now) } else { next };
        self.next = Some(next);
        (next <= now && interval(config, other).is_some()).then(|| (next, charge(config, other)))
    }

    /// Its request of time `at` was charged, or refused.
    pub(crate) fn asked(&mut self, at: Instant, config: &Config, charged: bool) {
        let interval = config.other_client.as_ref().and_then(|other| interval(config, other));
        self.next = at.checked_add(interval.filter(|_| charged).unwrap_or(RETRY));
    }
}

/// Time between its requests, so that they take its share.
fn interval(config: &Config, other: &OtherClient) -> Option<Duration> {
    let share = other.share * limit(config)? as f64;
    let seconds = config.window.as_secs_f64() * other.request_tokens as f64 / share;
    // No share makes an infinite time, which is no duration; no tokens make none.
    let interval = Duration::try_from_secs_f64(seconds).ok().filter(|interval| !interval.is_zero());
    interval.map(|interval| interval.max(LEAST_INTERVAL))
}

/// The limit it takes its share of.
fn limit(config: &Config) -> Option<u64> {
    config.tokens_per_window.or(config.input_tokens_per_window).or(config.output_tokens_per_window)
}

/// The amounts that one of its requests takes: the same share of every token limit.
fn charge(config: &Config, other: &OtherClient) -> Amounts {
    let tokens = other.request_tokens.min(MAX_CHARGE);
    let (caps, whole) = (config.caps(), limit(config).unwrap_or(1).max(1));
    let of = |limit: Limit| match caps[limit as usize] {
        Some(cap) => ((tokens as f64 * cap as f64 / whole as f64).round() as u64).min(MAX_CHARGE),
        None => 0,
    };
    [tokens, of(Limit::Input), of(Limit::Output), 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_requests_are_evenly_spaced_and_take_its_share() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut config = Config {
            tokens_per_window: Some(12_000),
            output_tokens_per_window: Some(3_000),
            other_client: Some(OtherClient {
                share: 0.5,
                request_tokens: 1_000,
                after: Duration::from_secs(5),
                ..OtherClient::default()
            }),
            ..Config::default()
        };
        let mut other = Other::default();
        assert_eq!(other.due(at(100), &config), None, "we have not begun");
        other.arrived(at(1));
        other.arrived(at(2));
        assert_eq!(other.due(at(5), &config), None);
        // 6 a minute.
        for (now, due) in [(6, 6), (30, 16), (30, 26)] {
            assert_eq!(other.due(at(now), &config), Some((at(due), [1_000, 0, 250, 1])));
            other.asked(at(due), &config, true);
        }
        assert_eq!(other.due(at(30), &config), None);
        assert_eq!(other.due(at(36), &config).map(|(due, _)| due), Some(at(36)));
        other.asked(at(36), &config, false);
        assert_eq!(other.due(at(37), &config).map(|(due, _)| due), Some(at(36) + RETRY));
        for (share, request_tokens) in [(0.0, 1_000), (-1.0, 1_000), (f64::NAN, 1_000), (0.5, 0)] {
            let nothing = Some(OtherClient { share, request_tokens, ..OtherClient::default() });
            let config = Config { other_client: nothing, ..config.clone() };
            let mut other = Other { first: Some(at(1)), next: None };
            assert_eq!(other.due(at(100), &config), None, "{share} {request_tokens}");
        }
        config.tokens_per_window = None;
        config.output_tokens_per_window = None;
        assert_eq!(other.due(at(90), &config), None);
        config.tokens_per_window = Some(1_000);
        assert_eq!(other.due(at(90), &config).map(|(due, _)| due), Some(at(90)), "nothing piled up");
    }
}
