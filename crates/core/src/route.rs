//! The choice among several models: which of them takes a row.
//!
//! Each model has those that stand before it, a bit each. A row goes to one that nobody stands before, of those that are
//! open and have not failed at it. If the models are to be asked in an order, all earlier ones stand before a model; if any
//! may be asked, none does.

use serde::{Deserialize, Serialize};

use crate::limiter::Tokens;

/// A model's turn to take rows.
#[derive(Debug, Clone, Copy)]
pub struct Turn {
    /// The model, and those that can take rows: a bit each.
    pub own: u32,
    /// See `own`.
    pub open: u32,
    /// Those that stand before it.
    pub before: u32,
}

impl Turn {
    /// The only model's.
    pub const ALONE: Self = Self { own: 1, open: 1, before: 0 };

    /// Returns true if it takes a row that these models could not answer. Once nobody else is left it may try again.
    pub fn takes(self, failed: u32) -> bool {
        let fresh = self.open & !failed;
        let left = if fresh == 0 { self.open } else { fresh };
        left & self.own != 0 && left & self.before == 0
    }
}

/// The price of a token, in picodollars, by what the provider does with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rates {
    /// One of a prompt that is neither cached nor written into the cache.
    pub input: u64,
    /// One of a prompt that was cached.
    pub cached_input: u64,
    /// One of a prompt that is written into the cache.
    pub written_input: u64,
    /// One of an answer.
    pub output: u64,
}

impl Rates {
    /// Of a model without prices: dearer than any other.
    pub const UNKNOWN: Self =
        Self { input: u64::MAX, cached_input: u64::MAX, written_input: u64::MAX, output: u64::MAX };
}

/// The tokens of requests that counts are taken of: all of the prompt, and what of it was cached or written into the cache.
#[derive(Debug, Clone, Copy, Default)]
pub struct Used {
    /// Prompt and answer.
    pub all: Tokens,
    /// Tokens of the prompt that were cached.
    pub cached_input: u64,
    /// Tokens of the prompt that were written into the cache.
    pub written_input: u64,
}

/// The part of what was seen that stays with each further request.
const RECENT: f64 = 0.95;
/// Time (ms) for which it counts.
const HOUR: u64 = 3_600_000;

/// The tokens that rows took of late, for each of ours: models count differently, think, and give answers that are none.
#[derive(Debug, Clone, Copy, Default)]
pub struct Taken {
    /// Tokens of the rows that were answered, by our count, prompt and answer together.
    counted: f64,
    /// The tokens that were paid for: of prompts plain, cached and written, and of answers.
    used: [f64; 4],
    /// When (ms) one was last seen.
    at: u64,
}

impl Taken {
    /// A request took so much, of which rows were answered that have so many tokens by our count.
    pub fn observe(&mut self, now: u64, counted: f64, used: Used) {
        let Used { all: Tokens { input, output }, cached_input, written_input } = used;
        let plain = input.saturating_sub(cached_input).saturating_sub(written_input);
        self.counted = self.counted * RECENT + counted;
        for (sum, n) in self.used.iter_mut().zip([plain, cached_input, written_input, output]) {
            *sum = *sum * RECENT + n as f64;
        }
        self.at = now;
    }

    /// The same with what is not known to be old at `now` (ms).
    pub fn recent(self, now: u64) -> Option<Self> {
        (self.counted > 0.0 && now < self.at.saturating_add(HOUR)).then_some(self)
    }

    /// Picodollars for each token of a row by our count. So rows of any length compare.
    fn cost(&self, rates: Rates) -> f64 {
        let Rates { input, cached_input, written_input, output } = rates;
        let rates = [input, cached_input, written_input, output];
        let paid: f64 = self.used.iter().zip(rates).map(|(n, rate)| n * rate as f64).sum();
        paid / self.counted.max(1.0)
    }
}

/// For each model, those that are cheaper: a bit each. `counted`: the rows to ask, by our count; `models`: what rows took
/// of each of late, and its prices. A model that nothing is known of is believed to take what we count, or what another
/// takes, whichever costs less: so it is tried where that may pay, and known from then on.
pub fn cheaper(counted: Taken, models: &[(Option<Taken>, Rates)]) -> Vec<u32> {
    let guess = |rates: Rates| {
        let known = models.iter().filter_map(|(taken, _)| *taken).chain([counted]);
        known.map(|taken| taken.cost(rates)).fold(f64::INFINITY, f64::min)
    };
    let costs: Vec<f64> =
        models.iter().map(|(taken, rates)| taken.map_or_else(|| guess(*rates), |taken| taken.cost(*rates))).collect();
    before(&costs)
}

/// For each model, those that stand before it by this order, and by their places where that is the same.
fn before(order: &[f64]) -> Vec<u32> {
    let stands_before = |(i, own): (usize, &f64)| {
        let others = order.iter().enumerate().filter(|(j, other)| other.total_cmp(own).then(j.cmp(&i)).is_lt());
        others.fold(0, |bits, (j, _)| bits | 1 << j)
    };
    order.iter().enumerate().map(stands_before).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The bits of those that take a row.
    fn takers(open: u32, failed: u32, before: &[u32]) -> Vec<u32> {
        let turn = |(i, before): (usize, &u32)| Turn { own: 1 << i, open, before: *before };
        before.iter().enumerate().map(turn).filter(|turn| turn.takes(failed)).map(|turn| turn.own).collect()
    }

    fn rates() -> impl Strategy<Value = Rates> {
        (0u64..50, 0u64..5, 0u64..60, 0u64..400).prop_map(|(input, cached_input, written_input, output)| Rates {
            input,
            cached_input,
            written_input,
            output,
        })
    }

    fn taken() -> impl Strategy<Value = Taken> {
        (1.0..1e6f64, [0.0..1e6f64, 0.0..1e5, 0.0..1e5, 0.0..1e6]).prop_map(|(counted, used)| Taken {
            counted,
            used,
            at: 0,
        })
    }

    proptest! {
        /// As long as a model is open each row has one that takes it: of those that have not failed at it the first in the
        /// order, or any where there is none; and those that are full keep nobody waiting.
        #[test]
        fn each_row_has_a_model_that_takes_it(
            order in proptest::collection::vec(-3i8..3, 1..8), open in 1u32..256, failed in 0u32..256, full in 0u32..256,
        ) {
            let all = (1 << order.len()) - 1;
            let open = if open & all == 0 { 1 } else { open & all };
            let costs: Vec<f64> = order.iter().map(|cost| f64::from(*cost)).collect();
            let left = if open & !failed == 0 { open } else { open & !failed };
            let first = (0..order.len()).filter(|i| left & 1 << i != 0).min_by_key(|i| (order[*i], *i)).unwrap();
            let ordered = before(&costs);
            prop_assert_eq!(takers(open, failed, &ordered), [1 << first]);
            let any = takers(open, failed, &vec![0; order.len()]);
            prop_assert_eq!(any.iter().sum::<u32>(), left);
            // If all that are cheaper have no room the next one takes it, and none that is dearer than one with room.
            let masked: Vec<u32> = ordered.iter().map(|before| before & !full).collect();
            for own in takers(open, failed, &masked) {
                let at = own.trailing_zeros() as usize;
                prop_assert_eq!(left & ordered[at] & !full, 0);
            }
            prop_assert!(takers(open, failed, &masked).contains(&(1 << first)));
        }

        /// A model with lower prices that takes no more is cheaper, be it known or not; and the order is one.
        #[test]
        fn who_takes_less_at_lower_prices_is_cheaper(
            counted in taken(), seen in taken(), rates in proptest::collection::vec(rates(), 2..6), known in 0u32..64,
        ) {
            let models: Vec<_> =
                rates.iter().enumerate().map(|(i, rates)| ((known & 1 << i != 0).then_some(seen), *rates)).collect();
            let before = cheaper(counted, &models);
            let mut ranks: Vec<u32> = before.iter().map(|before| before.count_ones()).collect();
            ranks.sort_unstable();
            prop_assert_eq!(ranks, (0..models.len() as u32).collect::<Vec<_>>());
            for ((i, (a_seen, a)), (j, (b_seen, b))) in models.iter().enumerate().flat_map(|a| models.iter().enumerate().map(move |b| (a, b))) {
                let is_less = a.input < b.input && a.cached_input < b.cached_input && a.written_input < b.written_input && a.output < b.output;
                // What is not known is not believed to take more than what is.
                if is_less && (a_seen.is_none() || b_seen.is_some()) {
                    prop_assert!(before[j] & 1 << i != 0 && before[i] & 1 << j == 0, "{:?} {:?}", a, b);
                }
            }
        }

        #[test]
        fn any_counts_make_an_order(
            seen in proptest::collection::vec((any::<u64>(), any::<[u64; 4]>(), 0.0..1e9f64), 1..5), rates in any::<[u64; 4]>(),
        ) {
            let rates = Rates { input: rates[0], cached_input: rates[1], written_input: rates[2], output: rates[3] };
            let models: Vec<_> = seen.iter().map(|(now, [input, cached_input, written_input, output], counted)| {
                let mut taken = Taken::default();
                let all = Tokens { input: *input, output: *output };
                taken.observe(*now, *counted, Used { all, cached_input: *cached_input, written_input: *written_input });
                (taken.recent(*now), if now % 3 == 0 { Rates::UNKNOWN } else { rates })
            }).collect();
            let ranks: std::collections::BTreeSet<u32> = cheaper(Taken::default(), &models).into_iter().collect();
            prop_assert_eq!(ranks.len(), models.len());
        }
    }

    const CHEAP: Rates = Rates { input: 1, cached_input: 1, written_input: 1, output: 4 };
    const DEAR: Rates = Rates { input: 2, cached_input: 2, written_input: 2, output: 8 };

    fn seen(now: u64, input: u64, output: u64) -> Option<Taken> {
        let mut taken = Taken::default();
        taken.observe(now, 1_000.0, Used { all: Tokens { input, output }, ..Used::default() });
        Some(taken)
    }

    #[test]
    fn a_model_that_thinks_is_dearer_than_its_prices() {
        let counted = seen(0, 900, 100).unwrap();
        // As long as nothing is known the prices decide; then what it takes.
        assert_eq!(cheaper(counted, &[(None, DEAR), (None, CHEAP)]), [0b10, 0]);
        let thinks = seen(0, 900, 5_000);
        assert_eq!(cheaper(counted, &[(None, DEAR), (thinks, CHEAP)]), [0, 0b01]);
        assert_eq!(cheaper(counted, &[(seen(0, 900, 120), DEAR), (thinks, CHEAP)]), [0, 0b01]);
        // One of the same prices may be better.
        assert_eq!(cheaper(counted, &[(None, CHEAP), (thinks, CHEAP)]), [0, 0b01]);
        // Without prices a model comes last.
        assert_eq!(cheaper(counted, &[(None, Rates::UNKNOWN), (thinks, CHEAP), (None, DEAR)]), [0b110, 0b100, 0]);
    }

    #[test]
    fn what_was_paid_in_vain_counts_and_what_is_old_does_not() {
        let mut vain = seen(0, 900, 100).unwrap();
        (0..3).for_each(|_| vain.observe(1, 0.0, Used { all: Tokens { input: 900, output: 100 }, ..Used::default() }));
        assert_eq!(cheaper(Taken::default(), &[(Some(vain), CHEAP), (seen(0, 900, 100), DEAR)]), [0b10, 0]);
        assert!(vain.recent(HOUR).is_some() && vain.recent(HOUR + 1).is_none() && Taken::default().recent(0).is_none());
    }
}
