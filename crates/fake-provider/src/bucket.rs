//! The token bucket: what was taken comes back evenly, a whole window's worth
//! in a window's time.

use std::time::{Duration, Instant};

use crate::amounts::{Amounts, Caps, Limit};

/// Rounding errors of this size (in tokens or requests) do not matter.
const EPSILON: f64 = 1e-6;

/// A bucket for each limit, full at first. The missing amount is kept, rather than
/// what is there: so a limit may change at any time.
#[derive(Default)]
pub(crate) struct Bucket {
    missing: [f64; 4],
    /// When `missing` was right.
    upto: Option<Instant>,
}

impl Bucket {
    /// Puts back what flowed in up to `now`.
    pub(crate) fn refill(&mut self, now: Instant, window: Duration, caps: &Caps) {
        let elapsed = self.upto.map_or(Duration::ZERO, |upto| now.saturating_duration_since(upto));
        self.upto = Some(now);
        for (missing, cap) in self.missing.iter_mut().zip(caps) {
            *missing = match cap {
                Some(cap) => (*missing - elapsed.as_secs_f64() * per_second(*cap, window)).max(0.0),
                // Without a limit nothing is ever missing.
                None => 0.0,
            };
        }
    }

    /// Takes a charge out, even below nothing.
    pub(crate) fn take(&mut self, charge: &Amounts) {
        for (missing, amount) in self.missing.iter_mut().zip(charge) {
            *missing += *amount as f64;
        }
    }

    /// Puts tokens back, up to the capacity.
    pub(crate) fn put_back(&mut self, tokens: u64) {
        let missing = &mut self.missing[Limit::Tokens as usize];
        *missing = (*missing - tokens as f64).max(0.0);
    }

    /// The amount missing, rounded up, as of the last `refill`.
    pub(crate) fn used(&self, limit: Limit) -> u64 {
        (self.missing[limit as usize] - EPSILON).ceil() as u64
    }

    /// Time until the bucket holds `need`, or is full if that comes first.
    pub(crate) fn wait(&self, limit: Limit, window: Duration, cap: u64, need: u64) -> Duration {
        let lacking = self.missing[limit as usize] - cap.saturating_sub(need) as f64;
        if lacking <= EPSILON {
            return Duration::ZERO;
        }
        // To the nanosecond, upwards. A bucket that does not refill never holds it.
        Duration::try_from_secs_f64((lacking / per_second(cap, window) * 1e9).ceil() / 1e9).unwrap_or(Duration::MAX)
    }
}

fn per_second(cap: u64, window: Duration) -> f64 {
    cap as f64 / window.as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    const W: Duration = Duration::from_secs(10);

    #[test]
    fn it_refills_evenly_up_to_its_capacity() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let caps: Caps = [Some(100), None, None, Some(20)];
        let mut bucket = Bucket::default();
        bucket.refill(at(0), W, &caps);
        bucket.take(&[100, 70, 30, 1]);
        assert_eq!([Limit::Tokens, Limit::Requests].map(|limit| bucket.used(limit)), [100, 1]);
        // 10 tokens a second, 2 requests a second.
        assert_eq!(bucket.wait(Limit::Tokens, W, 100, 40), Duration::from_secs(4));
        bucket.refill(at(3_950), W, &caps);
        assert_eq!(bucket.used(Limit::Tokens), 61, "60.5, rounded up");
        assert_eq!(bucket.wait(Limit::Tokens, W, 100, 40), Duration::from_millis(50));
        bucket.refill(at(4_000), W, &caps);
        assert_eq!(bucket.wait(Limit::Tokens, W, 100, 40), Duration::ZERO);
        assert_eq!(Limit::ALL.map(|limit| bucket.used(limit)), [60, 0, 0, 0]);
        bucket.put_back(50);
        assert_eq!(bucket.used(Limit::Tokens), 10);
        bucket.put_back(50);
        bucket.take(&[1, 0, 0, 0]);
        assert_eq!(bucket.used(Limit::Tokens), 1, "it holds no more than its capacity");
        bucket.refill(at(60_000), W, &caps);
        bucket.take(&[1, 0, 0, 0]);
        assert_eq!(bucket.used(Limit::Tokens), 1, "a long rest saves up no more than the capacity");
    }

    #[test]
    fn limits_that_let_nothing_in_and_windows_of_no_length() {
        let now = Instant::now();
        let mut bucket = Bucket::default();
        bucket.refill(now, Duration::ZERO, &[Some(5), None, None, Some(0)]);
        bucket.take(&[5, 0, 0, 1]);
        assert_eq!(bucket.wait(Limit::Requests, W, 0, 1), Duration::MAX);
        bucket.refill(now + Duration::from_millis(1), Duration::ZERO, &[Some(5), None, None, Some(0)]);
        assert_eq!(bucket.used(Limit::Tokens), 0);
    }
}
