//! The part of a limit that is this server's, learnt from refusals that our own count does not explain and that do not say
//! what is left: another client uses the account, or the provider counts in another way.

/// The part of the share that a refusal leaves: one that nothing explains, and one although the limiter followed what was
/// reported.
pub(super) const CUT: f64 = 0.5;
pub(super) const TRIM: f64 = 0.85;
/// Refusals within this time (ms) of one that cut the share have the same cause.
const ONCE: u64 = 1_000;
/// Growth of the share a second: where no refusal is expected, and near the last refusal.
const GROWTH: (f64, f64) = (0.005, 0.0002);
/// Near is from this part of the share at which the last refusal came to that part.
const NEAR: (f64, f64) = (0.9, 1.05);
/// Something is always tried.
const LEAST: f64 = 0.05;

/// The part of a limit that is ours.
#[derive(Debug)]
pub(super) struct Share {
    value: f64,
    /// The share at which the last refusal came.
    refused_at: f64,
    /// When (ms) it was last computed.
    at: u64,
    /// When (ms) a refusal last cut the share.
    cut_at: Option<u64>,
}

impl Share {
    pub fn whole() -> Self {
        Self { value: 1.0, refused_at: f64::INFINITY, at: 0, cut_at: None }
    }

    /// At which share the last refusal came.
    pub fn refused_at(&self) -> f64 {
        self.refused_at
    }

    /// Goes on from a share, and that at which the last refusal came, at `at` (ms).
    pub fn restore(&mut self, (value, refused_at): (f64, f64), at: u64) {
        (self.value, self.refused_at, self.at) = (value.clamp(LEAST, 1.0), refused_at, at);
    }

    pub fn at(&mut self, now: u64) -> f64 {
        let mut seconds = now.saturating_sub(self.at) as f64 / 1000.0;
        self.at = self.at.max(now);
        let (near, far) = (self.refused_at * NEAR.0, self.refused_at * NEAR.1);
        let mut grow = |from: f64, to: f64, a_second: f64| {
            if seconds > 0.0 && self.value < to && self.value >= from {
                let grown = (self.value + a_second * seconds).min(to);
                seconds -= (grown - self.value) / a_second;
                self.value = grown;
            }
        };
        grow(0.0, near.min(1.0), GROWTH.0);
        grow(near, far.min(1.0), GROWTH.1);
        grow(far, 1.0, GROWTH.0);
        self.value
    }

    /// A refusal came.
    pub fn refused(&mut self, now: u64, cut: f64) {
        if self.cut_at.is_some_and(|at| now < at + ONCE) {
            return;
        }
        let value = self.at(now);
        self.cut_at = Some(now);
        self.refused_at = value;
        self.value = (value * cut).max(LEAST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_cut_it_and_it_grows_back_with_care_where_they_came() {
        let mut s = Share::whole();
        assert_eq!(s.at(1_000_000), 1.0);
        s.refused(1_000_000, CUT);
        s.refused(1_000_100, CUT);
        assert!((s.at(1_000_000) - 0.5).abs() < 1e-9);
        assert!((s.at(1_020_000) - 0.6).abs() < 1e-9);
        assert!((s.at(1_080_000) - 0.9).abs() < 1e-9);
        assert!(s.at(1_110_000) < 0.91, "slow where the refusal came");
        assert_eq!(s.at(10_000_000), 1.0);
        for i in 0..100 {
            s.refused(10_000_000 + i * 2_000, CUT);
        }
        assert!(s.at(10_200_000) >= LEAST);
        assert_eq!(s.at(100_000_000), 1.0);
    }
}
