//! The headers about limits, in the ways of several providers.

use std::time::Duration;

use crate::amounts::Limit;
use crate::date::{go_duration, http_date, rfc3339, second_after};
use crate::{RateHeaders, RetryAfter};

/// A header's name and value.
pub(crate) type Header = (&'static str, String);

/// The state of a limit.
pub(crate) struct Standing {
    /// The limit as it would be for a minute.
    pub(crate) per_minute: u64,
    /// The amount left. It is negative when the limit is overdrawn.
    pub(crate) left: i64,
    /// Time until all of it is there again, were nothing else admitted.
    pub(crate) full_in: Duration,
}

/// A limit for another time, as it would be for a minute.
pub(crate) fn per_minute(cap: u64, window: Duration) -> u64 {
    (cap as f64 * 60.0 / window.as_secs_f64()).round() as u64
}

/// The headers of the limits that are set. `cost`: tokens this request is charged.
pub(crate) fn rate_headers(style: RateHeaders, cost: u64, standing: impl Fn(Limit) -> Option<Standing>) -> Vec<Header> {
    let mut headers = Vec::new();
    for limit in [Limit::Requests, Limit::Tokens, Limit::Input, Limit::Output] {
        let (Some([total, left, reset]), Some(stands)) = (names(style, limit), standing(limit)) else { continue };
        let whole = limit == Limit::Requests;
        headers.push((total, stands.per_minute.to_string()));
        headers.push((
            left,
            match style {
                RateHeaders::Azure => stands.left,
                // Anthropic tells tokens to the nearest thousand.
                RateHeaders::Anthropic if !whole => (stands.left.max(0) + 500) / 1_000 * 1_000,
                _ => stands.left.max(0),
            }
            .to_string(),
        ));
        match style {
            RateHeaders::OpenAi => headers.push((reset, go_duration(stands.full_in))),
            RateHeaders::Anthropic => headers.push((reset, rfc3339(second_after(stands.full_in)))),
            RateHeaders::Mistral if limit == Limit::Tokens => headers.push((reset, cost.to_string())),
            _ => {}
        }
    }
    headers
}

/// Names for a limit, what is left of it, and its reset (for Mistral's tokens,
/// the cost of the request). Without a name in third place there is no such header.
fn names(style: RateHeaders, limit: Limit) -> Option<[&'static str; 3]> {
    match (style, limit) {
        (RateHeaders::OpenAi | RateHeaders::Azure, Limit::Requests) => {
            Some(["x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"])
        }
        (RateHeaders::OpenAi | RateHeaders::Azure, Limit::Tokens) => {
            Some(["x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"])
        }
        (RateHeaders::Anthropic, Limit::Requests) => Some([
            "anthropic-ratelimit-requests-limit",
            "anthropic-ratelimit-requests-remaining",
            "anthropic-ratelimit-requests-reset",
        ]),
        (RateHeaders::Anthropic, Limit::Tokens) => Some([
            "anthropic-ratelimit-tokens-limit",
            "anthropic-ratelimit-tokens-remaining",
            "anthropic-ratelimit-tokens-reset",
        ]),
        (RateHeaders::Anthropic, Limit::Input) => Some([
            "anthropic-ratelimit-input-tokens-limit",
            "anthropic-ratelimit-input-tokens-remaining",
            "anthropic-ratelimit-input-tokens-reset",
        ]),
        (RateHeaders::Anthropic, Limit::Output) => Some([
            "anthropic-ratelimit-output-tokens-limit",
            "anthropic-ratelimit-output-tokens-remaining",
            "anthropic-ratelimit-output-tokens-reset",
        ]),
        (RateHeaders::Mistral, Limit::Requests) => {
            Some(["x-ratelimit-limit-req-minute", "x-ratelimit-remaining-req-minute", ""])
        }
        (RateHeaders::Mistral, Limit::Tokens) => Some([
            "x-ratelimit-limit-tokens-minute",
            "x-ratelimit-remaining-tokens-minute",
            "x-ratelimit-tokens-query-cost",
        ]),
        _ => None,
    }
}

/// Headers with the wait after a refusal, rounded up: a client that waits that long must not come too early.
pub(crate) fn retry_headers(style: RetryAfter, wait: Duration) -> Vec<Header> {
    let ms = wait.as_nanos().div_ceil(1_000_000).max(1);
    let seconds = ("retry-after", ms.div_ceil(1_000).to_string());
    match style {
        RetryAfter::None => Vec::new(),
        RetryAfter::Seconds => vec![seconds],
        RetryAfter::Both => vec![("retry-after-ms", ms.to_string()), seconds],
        RetryAfter::HttpDate => vec![("retry-after", http_date(second_after(wait)))],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(style: RateHeaders) -> Vec<Header> {
        rate_headers(style, 70, |limit| {
            let left = [-1_600, 2_499, 2_500, 3][limit as usize];
            Some(Standing { per_minute: 12_000, left, full_in: Duration::from_millis(90_500) })
        })
    }

    #[test]
    fn each_provider_has_its_own() {
        let own = |style, expected: &[(&str, &str)]| {
            let headers = headers(style);
            let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
            assert_eq!(headers, expected);
        };
        own(
            RateHeaders::OpenAi,
            &[
                ("x-ratelimit-limit-requests", "12000"),
                ("x-ratelimit-remaining-requests", "3"),
                ("x-ratelimit-reset-requests", "1m30.5s"),
                ("x-ratelimit-limit-tokens", "12000"),
                ("x-ratelimit-remaining-tokens", "0"),
                ("x-ratelimit-reset-tokens", "1m30.5s"),
            ],
        );
        own(
            RateHeaders::Azure,
            &[
                ("x-ratelimit-limit-requests", "12000"),
                ("x-ratelimit-remaining-requests", "3"),
                ("x-ratelimit-limit-tokens", "12000"),
                ("x-ratelimit-remaining-tokens", "-1600"),
            ],
        );
        own(
            RateHeaders::Mistral,
            &[
                ("x-ratelimit-limit-req-minute", "12000"),
                ("x-ratelimit-remaining-req-minute", "3"),
                ("x-ratelimit-limit-tokens-minute", "12000"),
                ("x-ratelimit-remaining-tokens-minute", "0"),
                ("x-ratelimit-tokens-query-cost", "70"),
            ],
        );
        own(RateHeaders::None, &[]);
        let anthropic = headers(RateHeaders::Anthropic);
        let remaining: Vec<_> =
            anthropic.iter().filter(|(name, _)| name.ends_with("remaining")).map(|(_, value)| value.as_str()).collect();
        assert_eq!((anthropic.len(), remaining), (12, vec!["3", "0", "2000", "3000"]));
        let (name, reset) = &anthropic[8];
        assert_eq!(*name, "anthropic-ratelimit-input-tokens-reset");
        // Up to a second in between.
        let resets = [90, 91].map(|wait| rfc3339(second_after(Duration::from_secs(wait))));
        assert!(resets.contains(reset), "{reset} is not among {resets:?}");
    }

    #[test]
    fn limits_are_told_for_a_minute() {
        assert_eq!(per_minute(500, Duration::from_secs(60)), 500);
        assert_eq!(per_minute(100, Duration::from_secs(7)), 857);
        assert_eq!(per_minute(100, Duration::from_secs(3_600)), 2);
    }

    #[test]
    fn waits_are_rounded_up() {
        let wait = Duration::from_micros(1_000_001);
        assert_eq!(retry_headers(RetryAfter::None, wait), []);
        assert_eq!(retry_headers(RetryAfter::Seconds, wait), [("retry-after", "2".to_owned())]);
        let both = [("retry-after-ms", "1001".to_owned()), ("retry-after", "2".to_owned())];
        assert_eq!(retry_headers(RetryAfter::Both, wait), both);
        let [(name, date)] = &retry_headers(RetryAfter::HttpDate, wait)[..] else { panic!("not one header") };
        let dates = [0, 1].map(|later| http_date(second_after(wait) - later));
        assert!(*name == "retry-after" && dates.contains(date), "{date} is not among {dates:?}");
    }
}
