//! Which limits there are, and whether a request passes them all.

use std::time::{Duration, Instant};

use crate::amounts::{Amounts, Limit};
use crate::bucket::Bucket;
use crate::meter::Meter;
use crate::other::Other;
use crate::window::Window;
use crate::{Config, Limiter};

/// Why a request is not admitted.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Full {
    /// It needs more than the limit ever has.
    TooLarge(Limit),
    /// It would fit this limit after this time, were nothing else admitted.
    For(Limit, Duration),
}

/// The admissions, kept by both kinds of limiter. The log is exact and serves the
/// counts too. The bucket is kept up, so that `limiter` may change at any time.
#[derive(Default)]
pub(crate) struct Limits {
    window: Window,
    bucket: Bucket,
    other: Other,
}

impl Limits {
    /// A chat request of ours arrived.
    pub(crate) fn arrived(&mut self, now: Instant) {
        self.other.arrived(now);
    }

    /// The other client begins anew, with our next chat request.
    pub(crate) fn restart_other(&mut self) {
        self.other = Other::default();
    }

    /// Brings everything up to `now`. The other client's requests have their
    /// effect at their own times, although they are worked out only here.
    pub(crate) fn advance(&mut self, now: Instant, config: &Config) {
        let insists = config.other_client.as_ref().is_some_and(|other| other.insists);
        while let Some((at, charge)) = self.other.due(now, config) {
            self.expire(at, config);
            let charged = insists || self.check(at, config, &charge).is_ok();
            if charged {
                self.bucket.take(&charge);
                self.window.push(at, config.window, charge, false);
            }
            self.other.asked(at, config, charged);
        }
        self.expire(now, config);
    }

    fn expire(&mut self, now: Instant, config: &Config) {
        self.window.expire(now, config.window);
        self.bucket.refill(now, config.window, &config.caps());
    }

    /// Admits a request and charges it, or says why not. Returns a number for `give_back`.
    pub(crate) fn admit(&mut self, now: Instant, config: &Config, charge: Amounts) -> Result<u64, Full> {
        self.advance(now, config);
        self.check(now, config, &charge)?;
        self.bucket.take(&charge);
        Ok(self.window.push(now, config.window, charge, true))
    }

    /// Lowers the tokens an admitted request is charged.
    pub(crate) fn give_back(&mut self, now: Instant, config: &Config, number: u64, tokens: u64) {
        self.advance(now, config);
        self.window.lower(now, number, tokens);
        self.bucket.put_back(tokens);
    }

    /// The amount that the limiter holds against this limit, as of the last `advance`.
    pub(crate) fn used(&self, config: &Config, limit: Limit) -> u64 {
        match config.limiter {
            Limiter::Rolling => self.window.used(limit),
            Limiter::Bucket => self.bucket.used(limit),
        }
    }

    /// Time until all of this limit is there again, were nothing else admitted.
    pub(crate) fn full_in(&self, now: Instant, config: &Config, limit: Limit) -> Duration {
        match (config.limiter, config.caps()[limit as usize]) {
            (Limiter::Rolling, _) => self.window.empty_in(now, config.window),
            (Limiter::Bucket, Some(cap)) => self.bucket.wait(limit, config.window, cap, cap),
            (Limiter::Bucket, None) => Duration::ZERO,
        }
    }

    /// Peaks and means of the windows so far, as of the last `advance`.
    pub(crate) fn meter(&self) -> &Meter {
        &self.window.meter
    }

    /// Starts peaks, means and counts anew.
    pub(crate) fn reset_meter(&mut self) {
        self.window.meter = Meter::default();
    }

    fn check(&self, now: Instant, config: &Config, charge: &Amounts) -> Result<(), Full> {
        let caps = config.caps();
        for limit in Limit::ALL {
            let (need, Some(cap)) = (charge[limit as usize], caps[limit as usize]) else { continue };
            // Providers have no such message for a limit of no requests at all.
            if need > cap && limit != Limit::Requests {
                return Err(Full::TooLarge(limit));
            }
            if self.used(config, limit).saturating_add(need) > cap {
                let wait = match config.limiter {
                    Limiter::Rolling => self.window.wait(now, config.window, limit, cap.saturating_sub(need)),
                    Limiter::Bucket => self.bucket.wait(limit, config.window, cap, need),
                };
                return Err(Full::For(limit, wait));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::OtherClient;

    #[test]
    fn each_limit_is_held_by_either_limiter() {
        let now = Instant::now();
        let charge: Amounts = [30, 20, 10, 1];
        for limiter in [Limiter::Rolling, Limiter::Bucket] {
            for limit in Limit::ALL {
                let amount = charge[limit as usize];
                let cap = |cap| {
                    let mut config = Config { limiter, ..Config::default() };
                    match limit {
                        Limit::Tokens => config.tokens_per_window = Some(cap),
                        Limit::Input => config.input_tokens_per_window = Some(cap),
                        Limit::Output => config.output_tokens_per_window = Some(cap),
                        Limit::Requests => config.requests_per_window = Some(cap),
                    }
                    config
                };
                let mut limits = Limits::default();
                let config = cap(2 * amount);
                assert_eq!(limits.admit(now, &config, charge), Ok(0));
                assert_eq!(limits.admit(now, &config, charge), Ok(1));
                // Rolling: both leave at once. Bucket: half the capacity takes half the window.
                let seconds = if limiter == Limiter::Rolling { 60 } else { 30 };
                let full = Full::For(limit, Duration::from_secs(seconds));
                assert_eq!(limits.admit(now, &config, charge), Err(full));
                assert_eq!(limits.used(&config, limit), 2 * amount);
                assert_eq!(limits.full_in(now, &config, limit), Duration::from_secs(60));
                if limit != Limit::Requests {
                    assert_eq!(limits.admit(now, &cap(amount - 1), charge), Err(Full::TooLarge(limit)));
                }
            }
        }
    }

    #[test]
    fn the_other_client_takes_its_share_and_may_take_turns() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let ours: Amounts = [400, 300, 100, 1];
        for limiter in [Limiter::Rolling, Limiter::Bucket] {
            for insists in [true, false] {
                let other = OtherClient { share: 0.5, request_tokens: 100, insists, ..OtherClient::default() };
                let config = Config {
                    limiter,
                    window: Duration::from_secs(10),
                    tokens_per_window: Some(1_000),
                    other_client: Some(other),
                    ..Config::default()
                };
                let mut limits = Limits::default();
                limits.arrived(at(0));
                // At 0, 2 and 4 s it takes 100 each.
                let used = |limits: &Limits| limits.used(&config, Limit::Tokens);
                limits.advance(at(4), &config);
                assert_eq!(limits.meter().other_tokens, 300);
                assert!(limits.admit(at(4), &config, ours).is_ok());
                let full = used(&limits);
                if limiter == Limiter::Rolling {
                    assert_eq!(full, 700);
                    assert!(limits.admit(at(4), &config, ours).is_err(), "the other client's tokens count");
                    // It asks at 6 s and at 8 s: the window is full then.
                    assert!(limits.admit(at(5), &config, [300, 0, 0, 1]).is_ok());
                    limits.advance(at(9), &config);
                    assert_eq!(used(&limits), if insists { 1_200 } else { 1_000 });
                    // The first 100 left at 10 s: who waited gets that room at once.
                    limits.advance(at(10), &config);
                    assert_eq!(limits.meter().other_tokens, if insists { 600 } else { 400 });
                    assert_eq!(limits.meter().peak_tokens, 700);
                    assert_eq!(limits.meter().peak_tokens_all, if insists { 1_200 } else { 1_000 });
                } else {
                    assert_eq!(full, 500, "what it took at first has come back");
                    assert!(limits.admit(at(5), &config, [600, 0, 0, 1]).is_ok());
                    assert!(limits.admit(start + Duration::from_millis(5_950), &config, [95, 0, 0, 1]).is_ok());
                    // 995 are taken at 6 s. At 7 s, its tenth try, there is room.
                    limits.advance(at(6), &config);
                    assert_eq!(used(&limits), if insists { 1_095 } else { 995 });
                    limits.advance(at(7), &config);
                    assert_eq!((used(&limits), limits.meter().other_tokens), (995, 400));
                }
            }
        }
    }
}
