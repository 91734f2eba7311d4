//! The amounts sent within a rolling window, kept in slots of a few milliseconds.

use std::collections::VecDeque;

use super::{Amounts, Caps, KINDS};

/// Width of a slot, ms; what is counted in a slot counts until the whole slot has left the window.
const WIDTH: u64 = 6;
/// Amounts that are only supposed to have been sent lie in so many slots.
const SUPPOSED: usize = 10;

/// A rolling window with a cap for each kind of amount.
#[derive(Debug)]
pub(super) struct Window {
    /// ms.
    pub length: u64,
    /// By so much (ms) longer it counts than the provider's: a request reaches it up to this much later than we sent
    /// it, and another one sooner.
    slack: u64,
    pub caps: Caps,
    log: VecDeque<(u64, Amounts)>,
    pub sum: Amounts,
    /// The part of that which is only supposed, see `fill`. Its slots are those before `first`.
    supposed: Amounts,
    first: u64,
}

impl Window {
    pub fn new(length: u64, slack: u64) -> Self {
        Self {
            length,
            slack,
            caps: [None; KINDS],
            log: VecDeque::new(),
            sum: [0; KINDS],
            supposed: [0; KINDS],
            first: 0,
        }
    }

    pub fn slot(at: u64) -> u64 {
        at / WIDTH
    }

    /// When (ms) what is counted in a slot stops counting.
    fn leaves_at(&self, slot: u64) -> u64 {
        (slot + 1) * WIDTH + self.length + self.slack
    }

    /// The window as if its caps had been used up evenly up to `until`; it is `now` (ms).
    pub fn fill(&mut self, until: u64, now: u64) {
        if self.caps.iter().all(Option::is_none) {
            return;
        }
        let slots = self.length / WIDTH;
        let first = Self::slot(until).saturating_sub(slots);
        // Few of them: the log is walked for each request.
        for from in (0..slots).step_by(SUPPOSED) {
            let to = (from + SUPPOSED as u64).min(slots);
            if self.leaves_at(first + to - 1) > now {
                // Cumulative shares, so that rounding loses nothing.
                let share = |cap: Option<u64>| cap.map_or(0, |all| all * to / slots - all * from / slots);
                self.add(first + to - 1, self.caps.map(share));
            }
        }
        (self.supposed, self.first) = (self.sum, first + slots);
    }

    /// A window of another length with what this one holds and that one would.
    pub fn resized(&self, length: u64, slack: u64, now: u64) -> Self {
        let mut new = Self::new(length, slack);
        (new.supposed, new.first) = (self.supposed, self.first);
        for (slot, amounts) in &self.log {
            new.add(*slot, *amounts);
        }
        new.forget(now);
        new
    }

    pub fn forget(&mut self, now: u64) {
        while let Some((slot, amounts)) = self.log.front().copied()
            && self.leaves_at(slot) <= now
        {
            self.log.pop_front();
            subtract(&mut self.sum, amounts);
            if slot < self.first {
                subtract(&mut self.supposed, amounts);
            }
        }
    }

    /// Forgets what was only supposed.
    pub fn forget_supposed(&mut self) {
        let first = self.first;
        while let Some((_, amounts)) = self.log.pop_front_if(|(slot, _)| *slot < first) {
            subtract(&mut self.sum, amounts);
        }
        self.supposed = [0; KINDS];
    }

    /// Counts amounts in a slot, or in the last one if that is later; returns which.
    pub fn add(&mut self, slot: u64, amounts: Amounts) -> u64 {
        add(&mut self.sum, amounts);
        match self.log.back_mut() {
            Some((last, sum)) if *last >= slot => {
                add(sum, amounts);
                *last
            }
            _ => {
                self.log.push_back((slot, amounts));
                slot
            }
        }
    }

    /// Changes what is counted in a slot; false if it has left the window.
    pub fn replace(&mut self, slot: u64, old: Amounts, new: Amounts) -> bool {
        let Ok(i) = self.log.binary_search_by_key(&slot, |(s, _)| *s) else { return false };
        let Some((_, amounts)) = self.log.get_mut(i) else { return false };
        for sum in [amounts, &mut self.sum] {
            subtract(sum, old);
            add(sum, new);
        }
        true
    }

    /// The amounts that count, by the latest time (ms) at which they were sent.
    pub fn sent(&self) -> impl DoubleEndedIterator<Item = (u64, Amounts)> + '_ {
        self.log.iter().map(|(slot, amounts)| ((slot + 1) * WIDTH, *amounts))
    }

    /// The amounts sent later than `at` (ms).
    pub fn since(&self, at: u64) -> Amounts {
        let mut sum = [0; KINDS];
        for (_, amounts) in self.log.iter().rev().take_while(|(slot, _)| *slot > Self::slot(at)) {
            add(&mut sum, *amounts);
        }
        sum
    }

    /// When (ms) `want` fits beside what counts, if the part `share` of each cap is ours, and `spare` of it is to stay
    /// free; `None` if it does now. An empty window has room for whatever is within its caps.
    pub fn fits_at(&self, want: Amounts, spare: Amounts, share: f64) -> Option<u64> {
        let fits = |sum: &Amounts| {
            (0..KINDS).all(|kind| match (self.caps.get(kind), sum.get(kind), want.get(kind), spare.get(kind)) {
                (Some(Some(cap)), Some(sum), Some(want), Some(spare)) => {
                    *sum == 0 || sum + want + spare <= (*cap as f64 * share) as u64
                }
                _ => true,
            })
        };
        if fits(&self.sum) {
            return None;
        }
        let mut sum = self.sum;
        let mut last = 0;
        for (slot, amounts) in &self.log {
            subtract(&mut sum, *amounts);
            last = self.leaves_at(*slot);
            if fits(&sum) {
                break;
            }
        }
        Some(last)
    }

    /// The amounts that the caps leave when only requests really sent count, where there are caps.
    pub fn really_left(&self) -> Caps {
        let left = self.left(1.0);
        std::array::from_fn(|kind| Some(left.get(kind).copied().flatten()? + self.supposed.get(kind)?))
    }

    /// The amounts that the caps leave, where there are caps.
    pub fn left(&self, share: f64) -> Caps {
        std::array::from_fn(|kind| {
            let cap = self.caps.get(kind).copied().flatten()?;
            Some(((cap as f64 * share) as u64).saturating_sub(self.sum.get(kind).copied().unwrap_or(0)))
        })
    }
}

fn add(sum: &mut Amounts, amounts: Amounts) {
    for (s, a) in sum.iter_mut().zip(amounts) {
        *s += a;
    }
}

fn subtract(sum: &mut Amounts, amounts: Amounts) {
    for (s, a) in sum.iter_mut().zip(amounts) {
        *s = s.saturating_sub(a);
    }
}
