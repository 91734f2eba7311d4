//! Means over time.

use std::time::Instant;

/// The means of some quantities from a begin to the last mark.
pub(crate) struct Means<const N: usize> {
    begin: Option<Instant>,
    /// Up to when `sums` holds.
    upto: Option<Instant>,
    /// Integrals over seconds.
    sums: [f64; N],
    marked: [f64; N],
}

impl<const N: usize> Default for Means<N> {
    fn default() -> Self {
        Self { begin: None, upto: None, sums: [0.0; N], marked: [0.0; N] }
    }
}

impl<const N: usize> Means<N> {
    /// Sets the begin, which may lie ahead, unless there is one already.
    pub(crate) fn begin(&mut self, at: Option<Instant>) {
        if self.begin.is_none() {
            (self.begin, self.upto) = (at, at);
        }
    }

    /// The quantities had these values since the last call. Nothing counts
    /// twice, and nothing before the begin.
    pub(crate) fn advance(&mut self, now: Instant, values: [u64; N]) {
        let Some(upto) = self.upto.filter(|upto| now > *upto) else { return };
        for (sum, value) in self.sums.iter_mut().zip(values) {
            *sum += value as f64 * (now - upto).as_secs_f64();
        }
        self.upto = Some(now);
    }

    /// The time counted so far counts in the means.
    pub(crate) fn mark(&mut self) {
        if let (Some(begin), Some(upto)) = (self.begin, self.upto)
            && upto > begin
        {
            self.marked = self.sums.map(|sum| sum / (upto - begin).as_secs_f64());
        }
    }

    /// The means; 0 before the first mark after the begin.
    pub(crate) fn means(&self) -> [f64; N] {
        self.marked
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn from_the_begin_to_the_last_mark() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut means = Means::default();
        means.advance(at(1), [9, 9]);
        means.begin(Some(at(5)));
        means.begin(Some(at(3)));
        means.advance(at(4), [100, 100]);
        means.mark();
        assert_eq!(means.means(), [0.0, 0.0]);
        means.advance(at(7), [10, 1]);
        means.advance(at(6), [100, 100]);
        means.advance(at(9), [20, 3]);
        means.mark();
        means.advance(at(20), [100, 100]);
        assert_eq!(means.means(), [15.0, 2.0]);
    }
}
