//! The rest of the limit that the provider reports, carried forward to now.
//!
//! A report was true when the request reached the provider, a latency ago. Since then we have sent more, some of the limit
//! has come back, and others may have used it. The rate at which it comes back to us, net of the others' use, is measured
//! from one answer to the next. The provider may count by window or by bucket: neither is assumed.

/// Time (ms) for which a measurement of the inflow has weight.
const MEMORY: f64 = 5_000.0;
/// Answers nearer to each other than this (ms) measure only noise.
const APART: u64 = 100;
/// A report older than this (ms) does not count.
const STALE: u64 = 60_000;
/// The divisor of the usual rate that gives the least rate to reckon with.
const PROBE: f64 = 10.0;
/// In so much time (ms) a surplus is to be used, or a lack made good.
const EVEN_OUT: f64 = 6_000.0;

/// The last report on one kind of amount.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reported {
    /// When (ms) the request it was said of was sent.
    pub at: u64,
    left: u64,
    /// The rate at which the limit comes back to us, per millisecond, and the start of its measurement (ms).
    inflow: f64,
    since: u64,
    /// The rate at which the limit comes back, per millisecond, when nobody else uses it.
    usual: f64,
}

impl Reported {
    /// The first word on it. `usual`: what the limit gives back a millisecond.
    pub fn new(at: u64, left: u64, usual: f64) -> Self {
        Self { at, left, inflow: usual, since: at, usual }
    }

    /// A further one. `sent`: what we sent after the request of the one before, this request included.
    pub fn observe(&mut self, at: u64, left: u64, sent: u64) {
        if at < self.at {
            return;
        }
        if at >= self.at + STALE {
            *self = Self::new(at, left, self.usual);
        } else if at >= self.at + APART {
            let passed = (at - self.at) as f64;
            let seen = (left as f64 - self.left as f64 + sent as f64) / passed;
            // At first the mean of all.
            let weight = (1.0 - (-passed / MEMORY).exp()).max(passed / (at - self.since) as f64);
            self.inflow += weight * (seen - self.inflow);
            (self.at, self.left) = (at, left);
        }
    }

    /// The rest at `now` (ms), after we have `sent` so much since. `None` if the last report is too old.
    pub fn left(&self, now: u64, sent: u64) -> Option<f64> {
        let age = now.saturating_sub(self.at);
        (age < STALE).then(|| self.left as f64 + self.at_least() * age as f64 - sent as f64)
    }

    /// The amount that we may send a millisecond, if so much is `left` and `keep` of it is to stay.
    pub fn rate(&self, left: f64, keep: f64) -> f64 {
        self.inflow + (left - keep) / EVEN_OUT
    }

    /// In how many ms so much more will be left.
    pub fn comes_in(&self, more: f64) -> u64 {
        // The next answer says more; so long waits are looked at again.
        (more / self.at_least()).ceil().clamp(10.0, 500.0) as u64
    }

    /// The rate at which the limit comes back, above zero: a request now and then brings the next report.
    fn at_least(&self) -> f64 {
        self.inflow.max(self.usual / PROBE).max(1e-3)
    }
}
