//! Reads a provider's limits from the headers of an answer, and from the message of a refusal.
//!
//! | who | headers |
//! | --- | --- |
//! | OpenAI, Azure, Groq | `x-ratelimit-{limit,remaining,reset}-{requests,tokens}`, at OpenAI `-project-tokens` too |
//! | Cerebras, Mistral | the same with `-{requests,req,tokens}-{minute,day,month}` |
//! | Cohere, keys that are not paid for | `x-trial-endpoint-call-{limit,remaining}`, requests a minute |
//! | Anthropic | `anthropic-ratelimit-{requests,tokens,input-tokens,output-tokens}-{limit,remaining,reset}` |
//!
//! Groq's `-requests` are those of a day. Nothing in the answer tells, so they are taken for those of a minute.

/// The limits that an answer's headers state. A header that can't be read counts as absent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reported {
    /// The wait asked for, ms from the answer. At most a day.
    pub wait: Option<u64>,
    /// Requests.
    pub requests: Side,
    /// Tokens of prompts and answers together; at Anthropic whichever of its limits is the tightest.
    pub tokens: Side,
    /// Tokens of prompts.
    pub input_tokens: Side,
    /// Tokens of answers.
    pub output_tokens: Side,
    /// The amount left of the limits of a day or month: the least of them, requests or tokens.
    pub quota_left: Option<u64>,
}

/// One limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Side {
    /// Amount a minute. 0: the key has no allowance.
    pub limit: Option<u64>,
    /// Amount left now. 0 if the provider says less than that.
    pub remaining: Option<u64>,
    /// Time until all of the limit is there again, ms. Absent if longer than a day.
    pub reset: Option<u64>,
}

/// A day, ms.
pub(crate) const DAY: u64 = 86_400_000;
/// A larger number is no limit in practice, and must not make anybody's arithmetic overflow.
const MOST: u64 = 1_000_000_000_000;

/// Reads the headers of an answer. `get` looks one up by its name in lower case.
pub fn read<'a>(get: impl Fn(&str) -> Option<&'a str>) -> Reported {
    let now = get("date").and_then(http_date);
    let from_now = |then: i64| Some(u64::try_from(then - now?).unwrap_or(0));
    let after = get("retry-after");
    let wait = get("retry-after-ms").and_then(number).or_else(|| Some(number(after?)? * 1000.0));
    let wait = wait.map(|ms| ms.ceil() as u64).or_else(|| from_now(http_date(after?)?));

    let side = |name: &dyn Fn(&str) -> String, time: &dyn Fn(&str) -> Option<u64>| Side {
        limit: get(&name("limit")).and_then(count),
        remaining: get(&name("remaining")).and_then(count),
        reset: get(&name("reset")).and_then(time).filter(|ms| *ms <= DAY),
    };
    let plain = |what: &str| side(&|part| format!("x-ratelimit-{part}-{what}"), &duration);
    let reset = |text: &str| from_now(rfc3339(text)?);
    let anthropic = |what: &str| side(&|part| format!("anthropic-ratelimit-{what}-{part}"), &reset);
    let trial = side(&|part| format!("x-trial-endpoint-call-{part}"), &duration);
    let quotas = ["requests-day", "req-day", "tokens-day", "requests-month", "req-month", "tokens-month"];
    Reported {
        wait: wait.map(|ms| ms.min(DAY)),
        requests: tightest([
            plain("requests"),
            plain("requests-minute"),
            plain("req-minute"),
            anthropic("requests"),
            trial,
        ]),
        tokens: tightest([plain("tokens"), plain("tokens-minute"), plain("project-tokens"), anthropic("tokens")]),
        input_tokens: anthropic("input-tokens"),
        output_tokens: anthropic("output-tokens"),
        quota_left: quotas.iter().filter_map(|what| plain(what).remaining).min(),
    }
}

/// The limit and the size of the request, from a refusal that says `Limit 30000, Used 20000, Requested 34472`, with
/// or without `Used`.
pub fn limit_in(message: &str) -> Option<(u64, u64)> {
    /// The number a text begins with, and what follows it.
    fn leading(text: &str) -> Option<(u64, &str)> {
        let text = text.trim_start_matches([' ', ':', '~']);
        let (digits, rest) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
        Some((count(digits)?, rest))
    }
    message.split("Limit").skip(1).find_map(|said| {
        let (limit, rest) = leading(said)?;
        let rest = match rest.strip_prefix(", Used") {
            Some(used) => leading(used)?.1,
            None => rest,
        };
        Some((limit, leading(rest.strip_prefix(", Requested")?)?.0))
    })
}

/// The limit of which least is left.
fn tightest<const N: usize>(sides: [Side; N]) -> Side {
    let size = |n: Option<u64>| n.unwrap_or(u64::MAX);
    let key = |side: &Side| (size(side.remaining), size(side.limit), side.reset.is_none());
    sides.into_iter().min_by_key(key).unwrap_or_default()
}

fn count(text: &str) -> Option<u64> {
    text.trim().parse().ok().filter(|n| *n <= MOST)
}

fn number(text: &str) -> Option<f64> {
    text.trim().parse().ok().filter(|n: &f64| n.is_finite() && *n >= 0.0)
}

/// A duration as Go writes it (`6m0s`, `1m30.5s`, `12ms`), or a plain number of seconds, in ms.
pub(crate) fn duration(text: &str) -> Option<u64> {
    if let Some(seconds) = number(text) {
        return Some((seconds * 1000.0).round() as u64);
    }
    let digit = |c: char| c.is_ascii_digit() || c == '.';
    let (mut rest, mut ms) = (text.trim(), 0.0);
    loop {
        let (amount, after) = rest.split_at(rest.find(|c| !digit(c))?);
        let (unit, after) = after.split_at(after.find(digit).unwrap_or(after.len()));
        let unit = match unit {
            "h" => 3_600_000.0,
            "m" => 60_000.0,
            "s" => 1000.0,
            "ms" => 1.0,
            "us" | "µs" | "μs" => 1e-3,
            "ns" => 1e-6,
            _ => return None,
        };
        ms += number(amount)? * unit;
        if after.is_empty() {
            return Some(ms.round() as u64);
        }
        rest = after;
    }
}

/// A time such as `Sun, 06 Nov 1994 08:49:37 GMT` or `Sun Nov  6 08:49:37 1994`, in ms since 1970. The third form that
/// HTTP knows has years of two digits and is not read.
fn http_date(text: &str) -> Option<i64> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let (day, month, year, clock) = match *words.as_slice() {
        [_, day, month, year, clock, "GMT"] | [_, month, day, clock, year] => (day, month, year, clock),
        _ => return None,
    };
    let months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let month = months.iter().zip(1..).find_map(|(name, n)| (*name == month).then_some(n))?;
    Some(midnight(digits(year, 4)?, month, digits(day, day.len().min(2))?)? + time_of_day(clock)?)
}

/// A time such as `2025-08-21T12:40:59.5+02:00`, in ms since 1970.
fn rfc3339(text: &str) -> Option<i64> {
    let (date, time) = text.trim().split_once(['T', 't', ' '])?;
    let [year, month, day] = *date.split('-').collect::<Vec<_>>().as_slice() else { return None };
    let (clock, offset) = match time.strip_suffix(['Z', 'z']) {
        Some(clock) => (clock, 0),
        None => {
            let (clock, offset) = time.split_at(time.rfind(['+', '-'])?);
            let east = offset.strip_prefix('+');
            let offset = minutes(east.or_else(|| offset.strip_prefix('-'))?)?;
            (clock, if east.is_some() { offset } else { -offset })
        }
    };
    let (clock, fraction) = match clock.split_once('.') {
        Some((clock, fraction)) => (clock, digits(fraction, fraction.len()).and(number(&format!("0.{fraction}")))?),
        None => (clock, 0.0),
    };
    let midnight = midnight(digits(year, 4)?, digits(month, 2)?, digits(day, 2)?)?;
    Some(midnight + time_of_day(clock)? - offset + (fraction * 1000.0).round() as i64)
}

/// A number of so many digits and nothing else.
fn digits(text: &str, len: usize) -> Option<i64> {
    text.parse().ok().filter(|_| text.len() == len && text.bytes().all(|b| b.is_ascii_digit()))
}

/// `hh:mm` in ms.
fn minutes(text: &str) -> Option<i64> {
    let (h, m) = text.split_once(':')?;
    let (h, m) = (digits(h, 2)?, digits(m, 2)?);
    (h < 24 && m < 60).then_some((h * 60 + m) * 60_000)
}

/// `hh:mm:ss` in ms.
fn time_of_day(text: &str) -> Option<i64> {
    let (clock, s) = text.rsplit_once(':')?;
    // 60 is a leap second.
    Some(minutes(clock)? + digits(s, 2).filter(|s| *s <= 60)? * 1000)
}

/// The beginning of a day of the Gregorian calendar, in ms since 1970. `year` is not negative.
fn midnight(year: i64, month: i64, day: i64) -> Option<i64> {
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let length = if month == 2 { 28 + i64::from(leap) } else { 30 + (month + month / 8) % 2 };
    // Years begin in March here, so that the day of a leap year is the last one.
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let leaps = y.div_euclid(4) - y.div_euclid(100) + y.div_euclid(400);
    // 719469 such days, counted from 1, lie before 1970.
    let days = y * 365 + leaps + (m * 153 + 2) / 5 + day - 719_469;
    ((1..=12).contains(&month) && (1..=length).contains(&day)).then_some(days * DAY as i64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Reads headers written as `name: value` lines.
    fn of(lines: &str) -> Reported {
        let headers: Vec<(&str, &str)> = lines.lines().filter_map(|line| line.trim().split_once(": ")).collect();
        read(|name| headers.iter().find_map(|(n, value)| (*n == name).then_some(*value)))
    }

    fn side(limit: impl Into<Option<u64>>, remaining: u64, reset: impl Into<Option<u64>>) -> Side {
        Side { limit: limit.into(), remaining: Some(remaining), reset: reset.into() }
    }

    #[test]
    fn what_providers_send_is_read() {
        let openai = "x-ratelimit-limit-requests: 5000\nx-ratelimit-remaining-requests: 4999
            x-ratelimit-reset-requests: 12ms\nx-ratelimit-limit-tokens: 160000
            x-ratelimit-remaining-tokens: 159976\nx-ratelimit-reset-tokens: 6m0s";
        let none = Reported::default();
        let want = Reported { requests: side(5000, 4999, 12), tokens: side(160_000, 159_976, 360_000), ..none };
        assert_eq!(of(openai), want);
        let project = format!(
            "{openai}\nx-ratelimit-limit-project-tokens: 200000\nx-ratelimit-remaining-project-tokens: 9
            x-ratelimit-reset-project-tokens: 59s"
        );
        assert_eq!(of(&project), Reported { tokens: side(200_000, 9, 59_000), ..want });
        assert_eq!(of(&project.replace("project-tokens: 9", "project-tokens: 170000")), want);

        let groq = "x-ratelimit-limit-requests: 14400\nx-ratelimit-remaining-requests: 14370
            x-ratelimit-reset-requests: 2m59.56s\nx-ratelimit-limit-tokens: 18000
            x-ratelimit-remaining-tokens: 17997\nx-ratelimit-reset-tokens: 7.66s";
        let (requests, tokens) = (side(14_400, 14_370, 179_560), side(18_000, 17_997, 7660));
        assert_eq!(of(groq), Reported { requests, tokens, ..none });

        let azure = "x-ratelimit-remaining-requests: -1\nx-ratelimit-remaining-tokens: 0
            x-ratelimit-reset-tokens: 11\nretry-after: 11\nretry-after-ms: 10400";
        // -1 says nothing: answers that were let through carry it too.
        assert_eq!(of(azure), Reported { wait: Some(10_400), tokens: side(None, 0, 11_000), ..none });

        let anthropic = "date: Thu, 21 Aug 2025 12:40:57 GMT\nretry-after: 2
            anthropic-ratelimit-requests-limit: 1000\nanthropic-ratelimit-requests-remaining: 999
            anthropic-ratelimit-requests-reset: 2025-08-21T12:40:58Z
            anthropic-ratelimit-tokens-limit: 96000\nanthropic-ratelimit-tokens-remaining: 96000
            anthropic-ratelimit-tokens-reset: 2025-08-21T12:40:57Z
            anthropic-ratelimit-input-tokens-limit: 80000\nanthropic-ratelimit-input-tokens-remaining: 80000
            anthropic-ratelimit-input-tokens-reset: 2025-08-21T12:40:59Z
            anthropic-ratelimit-output-tokens-limit: 16000\nanthropic-ratelimit-output-tokens-remaining: 15000
            anthropic-ratelimit-output-tokens-reset: 2025-08-21T12:40:56Z";
        let want = Reported {
            wait: Some(2000),
            requests: side(1000, 999, 1000),
            tokens: side(96_000, 96_000, 0),
            input_tokens: side(80_000, 80_000, 2000),
            output_tokens: side(16_000, 15_000, 0),
            quota_left: None,
        };
        assert_eq!(of(anthropic), want);
        assert_eq!(of(&anthropic.replace("date", "age")).input_tokens, side(80_000, 80_000, None));

        let mistral = "x-ratelimit-limit-req-minute: 60\nx-ratelimit-remaining-req-minute: 59
            x-ratelimit-limit-tokens-minute: 0\nx-ratelimit-remaining-tokens-minute: 0
            x-ratelimit-limit-tokens-month: 4000000\nx-ratelimit-remaining-tokens-month: 3999000";
        let (requests, tokens) = (side(60, 59, None), side(0, 0, None));
        assert_eq!(of(mistral), Reported { requests, tokens, quota_left: Some(3_999_000), ..none });

        let cerebras = "x-ratelimit-limit-requests-day: 14400\nx-ratelimit-remaining-requests-day: 14399
            x-ratelimit-reset-requests-day: 33011.382867\nx-ratelimit-limit-tokens-minute: 60000
            x-ratelimit-remaining-tokens-minute: 59000\nx-ratelimit-reset-tokens-minute: 11.3828
            x-ratelimit-limit-requests-minute: 30\nx-ratelimit-remaining-requests-minute: 29
            x-ratelimit-remaining-tokens-day: 1000000";
        let (requests, tokens) = (side(30, 29, None), side(60_000, 59_000, 11_383));
        assert_eq!(of(cerebras), Reported { requests, tokens, quota_left: Some(14_399), ..none });
    }

    #[test]
    fn a_trial_key_has_a_limit_of_requests() {
        let cohere = "x-endpoint-monthly-call-limit: 1000\nx-trial-endpoint-call-limit: 20
            x-trial-endpoint-call-remaining: 19";
        assert_eq!(of(cohere), Reported { requests: side(20, 19, None), ..Reported::default() });
    }

    #[test]
    fn waits_are_read_and_nonsense_is_not() {
        for (lines, want) in [
            ("retry-after-ms: 1250.5\nretry-after: 9", Some(1251)),
            ("retry-after:  2 ", Some(2000)),
            ("retry-after-ms: -1\nretry-after: 0.5", Some(500)),
            ("retry-after-ms: -1\nretry-after: soon", None),
            ("retry-after: NaN", None),
            ("retry-after: 1e300", Some(DAY)),
            ("retry-after: Wed, 21 Oct 2015 07:28:00 GMT", None),
            ("date: Wed, 21 Oct 2015 07:27:30 GMT\nretry-after: Wed, 21 Oct 2015 07:28:00 GMT", Some(30_000)),
            ("date: Wed, 21 Oct 2015 07:28:30 GMT\nretry-after: Wed, 21 Oct 2015 07:28:00 GMT", Some(0)),
            ("date: Wed, 21 Oct 2015 07:28:30 GMT\nretry-after: Wed, 21 Oct 2099 07:28:00 GMT", Some(DAY)),
        ] {
            assert_eq!(of(lines).wait, want, "{lines}");
        }
    }

    #[test]
    fn numbers_and_durations_that_make_no_sense_are_absent() {
        for (text, want) in [("7", Some(7)), ("-7", None), ("1000000000001", None), ("many", None)] {
            assert_eq!(count(text), want, "{text}");
        }
        assert_eq!((count("-1"), count("9223372036854775807"), count("0")), (None, None, Some(0)));
        for (text, want) in [
            ("1h2m", Some(3_720_000)),
            ("1m30.5s", Some(90_500)),
            ("1500µs", Some(2)),
            ("1400us", Some(1)),
            ("7000000ns", Some(7)),
            ("0s", Some(0)),
            ("2.5", Some(2500)),
        ] {
            assert_eq!(duration(text), want, "{text}");
        }
        for text in ["", "s", "-1s", "1d", "1m30", "1..5s", "1 s", "inf", "1e5s"] {
            assert_eq!(duration(text), None, "{text}");
        }
        // Seconds since 1970, as some servers send them.
        assert_eq!(of("x-ratelimit-reset-tokens: 1790000000").tokens, Side::default());
    }

    #[test]
    fn dates_are_read() {
        let at = 784_111_777_000;
        assert_eq!(http_date("Sun, 06 Nov 1994 08:49:37 GMT"), Some(at));
        assert_eq!(http_date("Sun Nov  6 08:49:37 1994"), Some(at));
        for text in ["1994-11-06T08:49:37Z", "1994-11-06t10:19:37+01:30", "1994-11-06 07:49:37-01:00"] {
            assert_eq!(rfc3339(text), Some(at), "{text}");
        }
        assert_eq!(rfc3339("1994-11-06T08:49:37.25Z"), Some(at + 250));
        // 800 years, day by day.
        let days =
            (1600..2400).flat_map(|y| (1..=12).flat_map(move |m| (1..=31).filter_map(move |d| midnight(y, m, d))));
        assert!(days.eq((0..292_194).map(|n| (n - 135_140) * DAY as i64)));
        for text in ["1900-02-29", "2025-13-01", "2025-00-01", "2025-04-31", "2025-1-01", "2025-01-00", "+025-01-01"] {
            assert_eq!(rfc3339(&format!("{text}T00:00:00Z")), None, "{text}");
        }
        for text in ["24:00:00Z", "00:60:00Z", "00:00:61Z", "00:00Z", "00:00:00", "00:00:00.Z", "00:00:00+1:00"] {
            assert_eq!(rfc3339(&format!("2025-01-01T{text}")), None, "{text}");
        }
        for text in ["Sunday, 06-Nov-94 08:49:37 GMT", "Sun, 06 Nov 1994 08:49:37 CET", "Sun, 06 Foo 1994 08:49:37"] {
            assert_eq!(http_date(text), None, "{text}");
        }
    }

    #[test]
    fn limits_are_found_in_messages() {
        let said = "Request too large for m (for limit m) on tokens per min (TPM): Limit 30000, Requested 34472. The \
                    input or output tokens must be reduced.";
        assert_eq!(limit_in(said), Some((30_000, 34_472)));
        assert_eq!(limit_in("Limits: Limit 6000, Used 5850, Requested ~1520. Try again"), Some((6000, 1520)));
        for said in ["", "Limit 5", "Limit 5, Used, Requested 6", "Limit x, Requested 6", "Requested 6, Limit 5"] {
            assert_eq!(limit_in(said), None, "{said}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(
            any in ".{0,40}",
            near in "[0-9TZ:. +,hmsunµGMTJa-]{0,30}",
            said in "(Limit|, Used|, Requested|[ 0-9]){0,9}",
        ) {
            for text in [&any, &near, &said] {
                for date in [text, "Sun, 06 Nov 1994 08:49:37 GMT"] {
                    let reported = read(|name| Some(if name == "date" { date } else { text }));
                    prop_assert!(reported.wait.into_iter().chain(reported.tokens.reset).all(|ms| ms <= DAY));
                }
                rfc3339(text);
                duration(text);
                limit_in(text);
            }
        }

        #[test]
        fn durations_and_dates_are_read_back(ms in 0..DAY) {
            let (h, m, s, ms_left) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60, ms % 1000);
            prop_assert_eq!(duration(&format!("{h}h{m}m{s}.{ms_left:03}s")), Some(ms));
            prop_assert_eq!(duration(&format!("{h}h{m}m{s}s{ms_left}ms")), Some(ms));
            prop_assert_eq!(rfc3339(&format!("1970-01-01T{h:02}:{m:02}:{s:02}.{ms_left:03}Z")), Some(ms as i64));
        }
    }
}
