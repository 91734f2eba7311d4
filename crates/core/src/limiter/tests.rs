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
    (Limiter::new(l, 0, 0), 1_000_000)
}

impl Limiter {
    /// As if nobody had to be spared for and nothing paced.
    fn at_once(&mut self, now: u64, size: impl Into<Size>) -> Result<Grant, Refusal> {
        self.paced = [0; 2];
        self.reserve(now, size, Class::Bulk, 1.0)
    }
}

fn until(r: Result<Grant, Refusal>) -> u64 {
    match r {
        Err(Refusal::Until { at, .. }) => at,
        other => panic!("{other:?}"),
    }
}

#[test]
fn waits_for_what_leaves_the_window() {
    let (mut l, now) = warm(limits(None, Some(60_000)));
    let _ = l.at_once(now, of(55_000)).unwrap();
    let t = until(l.at_once(now + 10, of(10_000)));
    assert!((now + 60_000..now + 60_400).contains(&t), "{t}");
    assert_eq!(until(l.at_once(t - 1, of(10_000))), t);
    let _ = l.at_once(t, of(10_000)).unwrap();
}

#[test]
fn a_request_larger_than_the_limit_never_goes() {
    let (mut l, now) = warm(limits(None, Some(500_000)));
    assert_eq!(l.at_once(now, of(50_001)), Err(Refusal::TooLarge));
}

#[test]
fn unused_reservations_are_given_back_at_once() {
    let (mut l, now) = warm(limits(None, Some(500_000)));
    let g = l.at_once(now, of(50_000)).unwrap();
    assert!(l.at_once(now, of(1)).is_err());
    l.settle(g, of(20_000), Left::default());
    let _ = l.at_once(now, of(30_000)).unwrap();
    assert!(l.at_once(now, of(1)).is_err());
}

#[test]
fn a_new_limiter_starts_as_if_the_window_before_had_been_used_up() {
    let mut l = Limiter::new(limits(Some(600), Some(500_000)), 1_000_000, 1_000_000);
    let t = until(l.at_once(1_000_000, of(25_000)));
    assert!((1_002_900..1_003_400).contains(&t), "half of 6 s: {t}");
}

#[test]
fn input_and_output_have_limits_of_their_own() {
    let l =
        Limits { input_tokens_per_minute: Some(60_000), output_tokens_per_minute: Some(9_000), ..Limits::default() };
    let (mut l, now) = warm(l);
    let _ = l.at_once(now, Tokens { input: 50_000, output: 1_000 }).unwrap();
    assert!(l.at_once(now, Tokens { input: 20_000, output: 0 }).is_err());
    let _ = l.at_once(now, Tokens { input: 1_000, output: 8_000 }).unwrap();
    assert!(l.at_once(now, Tokens { input: 0, output: 1 }).is_err());
    assert_eq!(l.usage(now).used, Some(1.0));
}

#[test]
fn texts_have_a_limit_of_their_own() {
    let l = Limits { inputs_per_minute: Some(2_000), requests_per_minute: Some(100), ..Limits::default() };
    assert_eq!(l.most_inputs(), Some(2_000));
    let (mut l, now) = warm(l);
    let texts = |inputs| Size { tokens: of(10 * inputs), inputs };
    assert_eq!(l.at_once(now, texts(2_001)), Err(Refusal::TooLarge));
    let grant = l.at_once(now, texts(1_500)).unwrap();
    // The tokens that it took do not change the number of its texts.
    l.settle(grant, of(0), Left::default());
    assert!(l.at_once(now, texts(501)).is_err());
    let grant = l.at_once(now, texts(500)).unwrap();
    assert!(l.at_once(now, of(1)).is_err());
    // A refused request took none.
    l.refused(now, grant, Left { requests: Some(90), ..Left::default() });
    let _ = l.at_once(now, texts(400)).unwrap();
}

/// There are always texts to send, 96 a request: the limit of texts is used, and no minute has more.
#[test]
fn a_limit_of_texts_is_used_and_never_passed() {
    const TEXTS: u64 = 96;
    for limit in [2_000, 10_000, 100_000] {
        let (start, mut now, mut sent) = (3_600_000, 3_600_000, Vec::new());
        let mut l = Limiter::new(Limits { inputs_per_minute: Some(limit), ..Limits::default() }, start, start);
        while now < start + 10 * MINUTE {
            let texts = |inputs| Size { tokens: of(40 * inputs), inputs };
            let (mut n, mut tried) = (TEXTS, l.reserve(now, texts(TEXTS), Class::Bulk, 1.0));
            if let Err(Refusal::Until { part, .. }) = tried
                && part >= 0.35
            {
                n = (TEXTS as f64 * part) as u64;
                tried = l.reserve(now, texts(n), Class::Bulk, part).or(tried);
            }
            match tried {
                Ok(grant) => {
                    sent.push((now, n));
                    l.settle(grant, of(40 * n), Left::default());
                }
                refused => now = until(refused),
            }
        }
        let within = |begin: u64, end: u64| -> u64 {
            sent.iter().filter(|(at, _)| *at > begin && *at <= end).map(|(_, n)| n).sum()
        };
        for (at, _) in &sent {
            assert!(within(at.saturating_sub(MINUTE), *at) <= limit, "{limit}");
        }
        let used = within(start + MINUTE, start + 10 * MINUTE) as f64 / (9 * limit) as f64;
        assert!(used >= 0.97, "{used} of {limit}");
    }
}

#[test]
fn a_penalty_holds_everything_back() {
    let (mut l, now) = warm(Limits::default());
    l.penalize(now + 500);
    l.penalize(now + 300);
    assert_eq!(until(l.reserve(now, of(1), Class::Interactive, 1.0)), now + 500);
    let _ = l.at_once(now + 500, of(1)).unwrap();
}

#[test]
fn bulk_is_paced_and_interactive_is_not_held_up_by_it() {
    let (mut l, now) = warm(limits(None, Some(500_000)));
    for _ in 0..2 {
        let _ = l.reserve(now, of(5_000), Class::Bulk, 1.0).unwrap();
    }
    let t = until(l.reserve(now, of(5_000), Class::Bulk, 1.0));
    assert!((now + 500..now + 650).contains(&t), "600 ms at the limit's rate: {t}");
    let _ = l.reserve(now, of(500), Class::Interactive, 1.0).unwrap();
}

#[test]
fn room_is_kept_for_the_next_interactive_request() {
    let (mut l, now) = warm(limits(None, Some(500_000)));
    let _ = l.reserve(now, of(500), Class::Interactive, 1.0).unwrap();
    let _ = l.at_once(now, of(49_000)).unwrap();
    assert!(l.at_once(now, of(10)).is_err());
    let _ = l.reserve(now, of(500), Class::Interactive, 1.0).unwrap();
}

#[test]
fn what_is_left_at_the_edge_is_offered_once_a_window() {
    let (mut l, now) = warm(limits(None, Some(500_000)));
    let _ = l.at_once(now, of(48_000)).unwrap();
    let Err(Refusal::Until { part, .. }) = l.at_once(now, of(4_000)) else { panic!() };
    assert_eq!(part, 0.5);
    let _ = l.reserve(now, of(1_500), Class::Bulk, part).unwrap();
    let Err(Refusal::Until { part, .. }) = l.at_once(now, of(4_000)) else { panic!() };
    assert_eq!(part, 0.0);
}

#[derive(Debug, Clone)]
struct Ask {
    gap: u64,
    tokens: u64,
    inputs: u64,
    actual: u64,
    travel: u64,
    lag: u64,
}

proptest! {
    /// Requests reach the provider up to the slack late; no window of the provider's ever holds more than the limit.
    #[test]
    fn no_window_is_ever_passed(
        tpm in prop_oneof![Just(None), (2_000u64..2_000_000).prop_map(Some)],
        rpm in prop_oneof![Just(None), (1u64..5_000).prop_map(Some)],
        ipm in prop_oneof![Just(None), (1u64..100_000).prop_map(Some)],
        asks in proptest::collection::vec((0u64..3_000, 1u64..20_000, 1u64..500, 0u64..20_000, 0u64..SLACK.1, prop_oneof![Just(0), 0u64..2_000])
            .prop_map(|(gap, tokens, inputs, actual, travel, lag)| Ask { gap, tokens, inputs, actual: actual.min(tokens), travel, lag }), 1..300),
    ) {
        let (mut l, mut now) = warm(Limits { inputs_per_minute: ipm, ..limits(rpm, tpm) });
        let mut arrived: Vec<(u64, u64, u64)> = Vec::new();
        for (i, ask) in asks.into_iter().enumerate() {
            now += ask.gap;
            let class = if i % 3 == 0 { Class::Interactive } else { Class::Bulk };
            let grant = loop {
                let size = |part: f64| Size { tokens: of((ask.tokens as f64 * part) as u64), inputs: (ask.inputs as f64 * part) as u64 };
                match l.reserve(now, size(1.0), class, 1.0) {
                    Ok(g) => break Some(g),
                    Err(Refusal::Until { at, part }) => {
                        prop_assert!(at > now);
                        if let Ok(g) = l.reserve(now, size(part), class, part) { break Some(g) }
                        now = at;
                    }
                    Err(Refusal::TooLarge) => {
                        let is_more = |n: u64, most: Option<u64>| most.is_some_and(|most| n > most);
                        prop_assert!(is_more(ask.tokens, l.largest_request()) || is_more(ask.inputs, l.limits.most_inputs()));
                        break None;
                    }
                }
            };
            if let Some(g) = grant {
                // Sent some time after it was granted.
                now += ask.lag;
                let g = l.sent(g, now);
                let actual = ask.actual.min(g.size.tokens.input);
                arrived.push((now + ask.travel, actual, g.size.inputs));
                l.settle(g, of(actual), Left::default());
            }
        }
        for (end, ..) in &arrived {
            let inside: Vec<(u64, u64)> = arrived.iter().filter(|(t, ..)| *t <= *end && *t + MINUTE > *end).map(|a| (a.1, a.2)).collect();
            if let Some(tpm) = tpm { prop_assert!(inside.iter().map(|a| a.0).sum::<u64>() <= tpm); }
            if let Some(ipm) = ipm { prop_assert!(inside.iter().map(|a| a.1).sum::<u64>() <= ipm); }
            if let Some(rpm) = rpm { prop_assert!(inside.len() as u64 <= rpm.max(1)); }
        }
    }
}
