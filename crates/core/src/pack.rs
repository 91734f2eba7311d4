//! The number of waiting rows that go into the next request.

/// The bounds of a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Most rows.
    pub rows: usize,
    /// Most tokens, prompt and answer together.
    pub tokens: usize,
    /// Tokens of a request without any row.
    pub fixed: usize,
}

/// The number of leading `rows` (tokens of each, prompt and answer) that fit. 0 only if the first alone does not.
pub fn fit(bounds: Bounds, rows: impl IntoIterator<Item = usize>) -> usize {
    let mut total = bounds.fixed;
    rows.into_iter()
        .take(bounds.rows)
        .take_while(|tokens| {
            total = total.saturating_add(*tokens);
            total <= bounds.tokens
        })
        .count()
}

/// Most rows of the next pack of a row that has been in `attempts` completed requests without a valid answer, the last
/// of them with `rows` rows: half as many each time, alone the last time.
pub fn rows_after(attempts: u32, max_attempts: u32, rows: usize) -> usize {
    if attempts == 0 {
        rows
    } else if attempts + 1 >= max_attempts {
        1
    } else {
        rows.div_ceil(2).max(1)
    }
}

/// The number of rows of a request: fewer after answers that are incomplete or take too long, more again after others.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Size {
    most: f64,
    now: f64,
}

impl Size {
    /// Begins with the most.
    pub fn new(most: usize) -> Self {
        Self { most: most as f64, now: most as f64 }
    }

    /// Most rows of the next request.
    pub fn rows(&self) -> usize {
        (self.now as usize).max(1)
    }

    /// No more than so many for now: more were not answered.
    pub fn at_most(&mut self, rows: usize) {
        self.now = self.now.min(rows.max(1) as f64);
    }

    /// An answer to `rows` rows came; `missing` of them were not answered, or it `was_slow`. Answers to much fewer rows
    /// than allowed say nothing of larger ones.
    pub fn observe(&mut self, rows: usize, missing: usize, was_slow: bool) {
        let part = missing as f64 / rows.max(1) as f64;
        let is_large = rows * 2 > self.rows();
        if !is_large {
            return;
        }
        if part > 0.0 || was_slow {
            // One of fifty is little reason to pay for the instructions more often; half of them is.
            let factor = if was_slow { 0.7 } else { 1.0 - part.clamp(0.1, 0.5) };
            self.now = self.now.min((rows as f64 * factor).max(1.0)).max(1.0);
        } else {
            self.now = (self.now + (self.most / 20.0).max(1.0)).min(self.most);
        }
    }
}

/// The measured relation of real to estimated tokens, for a model whose tokenizer is not ours. Rises at once, falls
/// slowly: an estimate that is too low breaks the limit, one that is too high only wastes a little of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ratio(f64);

impl Default for Ratio {
    fn default() -> Self {
        Self(1.0)
    }
}

impl Ratio {
    /// The relation of a first finished request, which takes the place of a guess; `None` if it says too little.
    pub fn first(estimated: u64, actual: u64) -> Option<Self> {
        let mut ratio = Self(0.0);
        ratio.observe(estimated, actual);
        (ratio.0 > 0.0).then_some(ratio)
    }

    /// Lowest and highest relation that is believed.
    const RANGE: (f64, f64) = (0.2, 4.0);
    /// Fewer tokens than this say little: a server's own prompt may be longer.
    const LEAST: u64 = 20;

    /// Takes a finished request into account; amounts in tokens.
    pub fn observe(&mut self, estimated: u64, actual: u64) {
        if estimated < Self::LEAST || actual == 0 {
            return;
        }
        let seen = (actual as f64 / estimated as f64).clamp(Self::RANGE.0, Self::RANGE.1);
        self.0 = if seen > self.0 { seen } else { self.0 * 0.98 + seen * 0.02 };
    }

    /// An estimate, corrected and rounded up, in tokens.
    pub fn apply(&self, estimated: u64) -> u64 {
        (estimated as f64 * self.0).ceil() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn splits_end_with_single_rows() {
        assert_eq!([0, 1, 2, 3].map(|a| rows_after(a, 3, 50)), [50, 25, 1, 1]);
        assert_eq!(rows_after(1, 2, 50), 1);
        assert_eq!(rows_after(1, 10, 1), 1);
    }

    #[test]
    fn requests_shrink_when_answers_are_incomplete_and_grow_back() {
        let mut s = Size::new(50);
        s.observe(50, 1, false);
        assert_eq!(s.rows(), 45);
        s.observe(45, 40, false);
        assert_eq!(s.rows(), 22);
        s.observe(1, 0, false);
        assert_eq!(s.rows(), 22);
        s.observe(22, 0, false);
        assert_eq!(s.rows(), 25);
        s.observe(25, 0, true);
        assert_eq!(s.rows(), 17);
        for _ in 0..20 {
            s.observe(s.rows(), 0, false);
        }
        assert_eq!(s.rows(), 50);
        for _ in 0..20 {
            s.observe(s.rows(), s.rows(), false);
        }
        assert_eq!(s.rows(), 1);
    }

    #[test]
    fn a_ratio_rises_at_once_and_falls_slowly() {
        let mut r = Ratio::default();
        r.observe(100, 130);
        assert_eq!(r.apply(1000), 1300);
        r.observe(100, 100);
        assert!((1290..1300).contains(&r.apply(1000)));
    }

    proptest! {
        #[test]
        fn a_pack_is_within_its_bounds_and_no_smaller_than_need_be(
            rows in proptest::collection::vec(0usize..500, 0..100), max in 1usize..60, tokens in 0usize..5000, fixed in 0usize..600,
        ) {
            let b = Bounds { rows: max, tokens, fixed };
            let n = fit(b, rows.iter().copied());
            let sum: usize = rows[..n].iter().sum();
            prop_assert!(n <= max && (n == 0 || fixed + sum <= tokens));
            if n < rows.len() && n < max {
                prop_assert!(fixed + sum + rows[n] > tokens);
            }
        }
    }
}
