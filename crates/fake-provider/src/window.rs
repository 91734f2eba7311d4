//! The rolling log: exactly what was admitted within the last window.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::amounts::{Amounts, Limit};
use crate::meter::{Held, Meter};

/// Admissions of the last window, oldest first.
#[derive(Default)]
pub(crate) struct Window {
    log: VecDeque<Entry>,
    /// Number of entries that have left the log: the number of its first entry.
    gone: u64,
    held: Held,
    pub(crate) meter: Meter,
}

struct Entry {
    at: Instant,
    charge: Amounts,
    /// Otherwise the other client's.
    is_ours: bool,
}

impl Window {
    /// Adds an admission, the latest, and returns its number.
    pub(crate) fn push(&mut self, now: Instant, window: Duration, charge: Amounts, is_ours: bool) -> u64 {
        self.meter.advance(now, &self.held);
        self.held.add(&charge, is_ours);
        self.meter.charged(now, window, &charge, is_ours, &self.held);
        self.log.push_back(Entry { at: now, charge, is_ours });
        self.gone + self.log.len() as u64 - 1
    }

    /// Lowers the tokens of an admission, if it is still in the window.
    pub(crate) fn lower(&mut self, now: Instant, number: u64, tokens: u64) {
        self.meter.advance(now, &self.held);
        let index = number.checked_sub(self.gone);
        if let Some(entry) = index.and_then(|index| self.log.get_mut(index as usize)) {
            let lowered = [tokens.min(entry.charge[Limit::Tokens as usize]), 0, 0, 0];
            entry.charge[Limit::Tokens as usize] -= lowered[0];
            self.held.subtract(&lowered, entry.is_ours);
        }
    }

    /// The amount charged within the window, as of the last call of `push` or `expire`.
    pub(crate) fn used(&self, limit: Limit) -> u64 {
        self.held.all[limit as usize]
    }

    /// Time until the window is empty.
    pub(crate) fn empty_in(&self, now: Instant, window: Duration) -> Duration {
        self.log.back().map_or(Duration::ZERO, |entry| expiry(entry.at, now, window))
    }

    /// Forgets what left the window.
    pub(crate) fn expire(&mut self, now: Instant, window: Duration) {
        while let Some(entry) = self.log.front()
            && now.saturating_duration_since(entry.at) >= window
        {
            self.meter.advance(entry.at + window, &self.held);
            self.held.subtract(&entry.charge, entry.is_ours);
            self.log.pop_front();
            self.gone += 1;
        }
    }

    /// Time until at most `room` is left of what was admitted.
    pub(crate) fn wait(&self, now: Instant, window: Duration, limit: Limit, room: u64) -> Duration {
        let mut left = self.used(limit);
        for entry in &self.log {
            left -= entry.charge[limit as usize];
            if left <= room {
                return expiry(entry.at, now, window);
            }
        }
        Duration::ZERO
    }
}

fn expiry(at: Instant, now: Instant, window: Duration) -> Duration {
    window.saturating_sub(now.saturating_duration_since(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    const W: Duration = Duration::from_secs(10);

    #[test]
    fn tokens_come_back_one_admission_at_a_time() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut window = Window::default();
        window.push(at(0), W, [40, 30, 10, 1], true);
        window.push(at(4), W, [60, 40, 20, 1], false);
        let wait = |limit, room| window.wait(at(5), W, limit, room);
        assert_eq!(wait(Limit::Tokens, 60), Duration::from_secs(5));
        assert_eq!(wait(Limit::Tokens, 59), Duration::from_secs(9));
        assert_eq!(wait(Limit::Input, 40), Duration::from_secs(5));
        assert_eq!(wait(Limit::Output, 19), Duration::from_secs(9));
        window.expire(at(10), W);
        assert_eq!(Limit::ALL.map(|limit| window.used(limit)), [60, 40, 20, 1]);
        assert_eq!(window.empty_in(at(12), W), Duration::from_secs(2));
    }

    #[test]
    fn what_is_lowered_comes_back_but_once() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut window = Window::default();
        let early = window.push(at(0), W, [40, 0, 0, 1], true);
        let late = window.push(at(4), W, [60, 0, 0, 1], true);
        window.lower(at(5), late, 50);
        assert_eq!(window.used(Limit::Tokens), 50);
        window.expire(at(10), W);
        window.lower(at(10), early, 30);
        assert_eq!(window.used(Limit::Tokens), 10);
        window.lower(at(10), late, 5);
        window.expire(at(14), W);
        assert_eq!(window.used(Limit::Tokens), 0);
    }

    #[test]
    fn requests_come_back_as_the_oldest_leaves() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut window = Window::default();
        for s in [0, 1, 2] {
            window.push(at(s), W, [1, 1, 0, 1], true);
        }
        // The cap was lowered to two meanwhile: two must leave before one fits.
        assert_eq!(window.wait(at(3), W, Limit::Requests, 1), Duration::from_secs(8));
        window.expire(at(11), W);
        assert_eq!(window.used(Limit::Requests), 1);
    }

    #[test]
    fn the_mean_share_of_the_window() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let of = |caps: [Option<u64>; 4], charges: &[(u64, u64, bool)]| {
            let mut window = Window::default();
            for &(s, tokens, is_ours) in charges {
                window.expire(at(s), W);
                window.push(at(s), W, [tokens, 0, 0, 1], is_ours);
            }
            window.meter.used(&caps).map(|share| (share * 1e9).round() / 1e9)
        };
        let used = |charges: &[(u64, u64, bool)]| of([Some(100), None, None, None], charges);
        // A full window again and again.
        assert_eq!(used(&[(0, 100, true), (10, 100, true), (20, 100, true)]), [1.0, 1.0]);
        // From 10 s to 30 s: 100 for 10 s, nothing for 5, 40 for 5.
        assert_eq!(used(&[(0, 7, true), (10, 100, true), (25, 40, true), (30, 9, true)]), [0.6, 0.6]);
        // From 10 s to 20 s: 20 of ours, and 10 of the other client's for 5 s.
        assert_eq!(used(&[(0, 7, true), (10, 20, true), (15, 10, false), (20, 9, true), (29, 99, false)]), [0.2, 0.25]);
        assert_eq!(used(&[(0, 7, true), (5, 7, true)]), [0.0, 0.0]);
        assert_eq!(used(&[]), [0.0, 0.0]);
        // The limit that is used most: one request of two in each window, or 20 tokens of 100.
        let twice = [(0, 20, true), (10, 20, true), (20, 20, true)];
        assert_eq!(of([Some(100), None, None, Some(2)], &twice), [0.5, 0.5]);
        assert_eq!(of([None, None, None, None], &twice), [0.0, 0.0]);
    }
}
