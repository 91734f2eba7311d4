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

/// A model that rows may be asked of.
#[derive(Debug, Clone, Copy)]
pub struct Model {
    /// The tokens that rows took of it of late.
    pub taken: Option<Taken>,
    /// Its prices.
    pub rates: Rates,
    /// Those with the same number are one model of the provider under several keys: any of them may be asked.
    pub kind: usize,
}

/// For each model, those that are cheaper: a bit each. `counted`: the rows to ask, by our count. A model that nothing is known
/// of is believed to take what we count, or what another takes, whichever costs less: so it is tried where that may pay, and
/// known from then on.
pub fn cheaper(counted: Taken, models: &[Model]) -> Vec<u32> {
    let guess = |rates: Rates| {
        let known = models.iter().filter_map(|model| model.taken).chain([counted]);
        known.map(|taken| taken.cost(rates)).fold(f64::INFINITY, f64::min)
    };
    let cost = |Model { taken, rates, .. }: &Model| taken.map_or_else(|| guess(*rates), |taken| taken.cost(*rates));
    let of_kind = |kind: usize| models.iter().filter(move |model| model.kind == kind).map(cost);
    let order: Vec<(f64, usize)> =
        models.iter().map(|model| (of_kind(model.kind).fold(f64::INFINITY, f64::min), model.kind)).collect();
    before(&order)
}

/// For each model, those that stand before it by this order of costs, and by their kinds where that is the same.
fn before(order: &[(f64, usize)]) -> Vec<u32> {
    let stands_before = |(own, kind): &(f64, usize)| {
        let is_before = |(cost, other): &(f64, usize)| cost.total_cmp(own).then(other.cmp(kind)).is_lt();
        order.iter().enumerate().filter(|(_, other)| is_before(other)).fold(0, |bits, (i, _)| bits | 1 << i)
    };
    order.iter().map(stands_before).collect()
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
        /// order with all of its kind, or any where there is none; and those that are full keep nobody waiting.
        #[test]
        fn each_row_has_a_model_that_takes_it(
            costs in proptest::collection::vec(-3i8..3, 8), kinds in proptest::collection::vec(0usize..8, 1..8),
            open in 1u32..256, failed in 0u32..256, full in 0u32..256,
        ) {
            let all = (1 << kinds.len()) - 1;
            let open = if open & all == 0 { 1 } else { open & all };
            let order: Vec<(f64, usize)> = kinds.iter().map(|kind| (f64::from(costs[*kind]), *kind)).collect();
            let left = if open & !failed == 0 { open } else { open & !failed };
            let are_left = (0..kinds.len()).filter(|i| left & 1 << i != 0);
            let first = are_left.clone().min_by_key(|i| (costs[kinds[*i]], kinds[*i])).unwrap();
            let ordered = before(&order);
            let same: Vec<u32> = are_left.filter(|i| kinds[*i] == kinds[first]).map(|i| 1 << i).collect();
            prop_assert_eq!(takers(open, failed, &ordered), same);
            let any = takers(open, failed, &vec![0; kinds.len()]);
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
            let model = |(kind, rates): (usize, &Rates)| Model {
                taken: (known & 1 << kind != 0).then_some(seen),
                rates: *rates,
                kind,
            };
            let models: Vec<Model> = rates.iter().enumerate().map(model).collect();
            let before = cheaper(counted, &models);
            let mut ranks: Vec<u32> = before.iter().map(|before| before.count_ones()).collect();
            ranks.sort_unstable();
            prop_assert_eq!(ranks, (0..models.len() as u32).collect::<Vec<_>>());
            for (a, b) in models.iter().flat_map(|a| models.iter().map(move |b| (a, b))) {
                let (less, more) = (a.rates, b.rates);
                let is_less = less.input < more.input && less.cached_input < more.cached_input
                    && less.written_input < more.written_input && less.output < more.output;
                // What is not known is not believed to take more than what is.
                if is_less && (a.taken.is_none() || b.taken.is_some()) {
                    prop_assert!(before[b.kind] & 1 << a.kind != 0 && before[a.kind] & 1 << b.kind == 0, "{:?} {:?}", a, b);
                }
            }
        }

        #[test]
        fn any_counts_make_an_order(
            seen in proptest::collection::vec((any::<u64>(), any::<[u64; 4]>(), 0.0..1e9f64), 1..5), rates in any::<[u64; 4]>(),
        ) {
            let rates = Rates { input: rates[0], cached_input: rates[1], written_input: rates[2], output: rates[3] };
            let model = |(kind, (now, [input, cached_input, written_input, output], counted)): (usize, &(u64, [u64; 4], f64))| {
                let mut taken = Taken::default();
                let all = Tokens { input: *input, output: *output };
                taken.observe(*now, *counted, Used { all, cached_input: *cached_input, written_input: *written_input });
                Model { taken: taken.recent(*now), rates: if now % 3 == 0 { Rates::UNKNOWN } else { rates }, kind }
            };
            let models: Vec<Model> = seen.iter().enumerate().map(model).collect();
            let ranks: std::collections::BTreeSet<u32> = cheaper(Taken::default(), &models).into_iter().collect();
            prop_assert_eq!(ranks.len(), models.len());
        }
    }

    const CHEAP: Rates = Rates { input: 1, cached_input: 1, written_input: 1, output: 4 };
    const DEAR: Rates = Rates { input: 2, cached_input: 2, written_input: 2, output: 8 };

    /// Those that are cheaper, of models of different kinds.
    fn of(counted: Taken, models: &[(Option<Taken>, Rates)]) -> Vec<u32> {
        let model =
            |(kind, (taken, rates)): (usize, &(Option<Taken>, Rates))| Model { taken: *taken, rates: *rates, kind };
        cheaper(counted, &models.iter().enumerate().map(model).collect::<Vec<_>>())
    }

    fn seen(now: u64, input: u64, output: u64) -> Option<Taken> {
        let mut taken = Taken::default();
        taken.observe(now, 1_000.0, Used { all: Tokens { input, output }, ..Used::default() });
        Some(taken)
    }

    #[test]
    fn a_model_that_thinks_is_dearer_than_its_prices() {
        let counted = seen(0, 900, 100).unwrap();
        // As long as nothing is known the prices decide; then what it takes.
        assert_eq!(of(counted, &[(None, DEAR), (None, CHEAP)]), [0b10, 0]);
        let thinks = seen(0, 900, 5_000);
        assert_eq!(of(counted, &[(None, DEAR), (thinks, CHEAP)]), [0, 0b01]);
        assert_eq!(of(counted, &[(seen(0, 900, 120), DEAR), (thinks, CHEAP)]), [0, 0b01]);
        // One of the same prices may be better.
        assert_eq!(of(counted, &[(None, CHEAP), (thinks, CHEAP)]), [0, 0b01]);
        // Without prices a model comes last.
        assert_eq!(of(counted, &[(None, Rates::UNKNOWN), (thinks, CHEAP), (None, DEAR)]), [0b110, 0b100, 0]);
    }

    #[test]
    fn what_was_paid_in_vain_counts_and_what_is_old_does_not() {
        let mut vain = seen(0, 900, 100).unwrap();
        (0..3).for_each(|_| vain.observe(1, 0.0, Used { all: Tokens { input: 900, output: 100 }, ..Used::default() }));
        assert_eq!(of(Taken::default(), &[(Some(vain), CHEAP), (seen(0, 900, 100), DEAR)]), [0b10, 0]);
        assert!(vain.recent(HOUR).is_some() && vain.recent(HOUR + 1).is_none() && Taken::default().recent(0).is_none());
    }

    /// What is measured of one key is the other's too, and a dearer model waits for both.
    #[test]
    fn keys_of_one_model_stand_before_no_other() {
        let (counted, key) = (seen(0, 900, 100).unwrap(), |taken| Model { taken, rates: CHEAP, kind: 0 });
        let dear = Model { taken: None, rates: DEAR, kind: 1 };
        for others in [None, seen(0, 900, 120), seen(0, 900, 900)] {
            assert_eq!(cheaper(counted, &[key(seen(0, 900, 100)), dear, key(others)]), [0, 0b101, 0]);
        }
    }
}
