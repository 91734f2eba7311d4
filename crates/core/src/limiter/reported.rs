//! What the provider says is left, carried forward to now.
//!
//! What it says with an answer was true when the request came to it, a latency ago. Since then we have sent more, some
//! of the limit has come back, and others may have used it: how fast it comes back to us, net of what others take, is
//! measured from one answer to the next. Nothing is assumed of how the provider counts, by window or by bucket.

/// How long (ms) a measurement of what comes back has weight.
const MEMORY: f64 = 5_000.0;
/// Answers nearer to each other than this (ms) measure only noise.
const APART: u64 = 100;
/// What was said longer ago (ms) does not count.
const STALE: u64 = 60_000;
/// Of what comes back usually, this part is always reckoned with.
const PROBE: f64 = 10.0;
/// In so much time (ms) a surplus is to be used, or a lack made good.
const EVEN_OUT: f64 = 6_000.0;

/// What was said of one kind of amount.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reported {
    /// When (ms) the request it was said of was sent.
    pub at: u64,
    left: u64,
    /// What comes back to us, a millisecond; and since when (ms) that is measured.
    inflow: f64,
    since: u64,
    /// What the limit gives back a millisecond, were it ours alone.
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

    /// What is left at `now` (ms), when we have `sent` so much since. `None` if the last word is too old.
    pub fn left(&self, now: u64, sent: u64) -> Option<f64> {
        let age = now.saturating_sub(self.at);
        (age < STALE).then(|| self.left as f64 + self.at_least() * age as f64 - sent as f64)
    }

    /// How much we may send a millisecond, if so much is `left` and so much of that is to stay.
    pub fn rate(&self, left: f64, keep: f64) -> f64 {
        self.inflow + (left - keep) / EVEN_OUT
    }

    /// In how many ms so much more will be left.
    pub fn comes_in(&self, more: f64) -> u64 {
        // The next answer says more; so long waits are looked at again.
        (more / self.at_least()).ceil().clamp(10.0, 500.0) as u64
    }

    /// What comes back, but something: without a request now and then nothing more would be heard.
    fn at_least(&self) -> f64 {
        self.inflow.max(self.usual / PROBE).max(1e-3)
    }
}
