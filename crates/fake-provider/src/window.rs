//! The rolling log: exactly what was admitted within the last window.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::limits::{Amounts, Limit};

/// Admissions of the last window, oldest first.
#[derive(Default)]
pub(crate) struct Window {
    log: VecDeque<(Instant, Amounts)>,
    /// How many have left the log: the number of its first entry.
    gone: u64,
    used: Amounts,
}

impl Window {
    /// Adds an admission, the latest, and returns its number.
    pub(crate) fn push(&mut self, now: Instant, charge: Amounts) -> u64 {
        self.log.push_back((now, charge));
        for (used, amount) in self.used.iter_mut().zip(charge) {
            *used += amount;
        }
        self.gone + self.log.len() as u64 - 1
    }

    /// Lowers the tokens of an admission, if it is still in the window.
    pub(crate) fn lower(&mut self, number: u64, tokens: u64) {
        let index = number.checked_sub(self.gone);
        if let Some((_, charge)) = index.and_then(|index| self.log.get_mut(index as usize)) {
            let lowered = tokens.min(charge[Limit::Tokens as usize]);
            charge[Limit::Tokens as usize] -= lowered;
            self.used[Limit::Tokens as usize] -= lowered;
        }
    }

    /// What was admitted within the window, as of the last call of `push` or `expire`.
    pub(crate) fn used(&self, limit: Limit) -> u64 {
        self.used[limit as usize]
    }

    /// Time until the window is empty.
    pub(crate) fn empty_in(&self, now: Instant, window: Duration) -> Duration {
        self.log.back().map_or(Duration::ZERO, |(at, _)| expiry(*at, now, window))
    }

    /// Forgets what left the window.
    pub(crate) fn expire(&mut self, now: Instant, window: Duration) {
        while let Some((at, charge)) = self.log.front()
            && now.saturating_duration_since(*at) >= window
        {
            for (used, amount) in self.used.iter_mut().zip(charge) {
                *used -= amount;
            }
            self.log.pop_front();
            self.gone += 1;
        }
    }

    /// Time until at most `room` is left of what was admitted.
    pub(crate) fn wait(&self, now: Instant, window: Duration, limit: Limit, room: u64) -> Duration {
        let mut left = self.used(limit);
        for (at, charge) in &self.log {
            left -= charge[limit as usize];
            if left <= room {
                return expiry(*at, now, window);
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
        window.push(at(0), [40, 30, 10, 1]);
        window.push(at(4), [60, 40, 20, 1]);
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
        let early = window.push(at(0), [40, 0, 0, 1]);
        let late = window.push(at(4), [60, 0, 0, 1]);
        window.lower(late, 50);
        assert_eq!(window.used(Limit::Tokens), 50);
        window.expire(at(10), W);
        window.lower(early, 30);
        assert_eq!(window.used(Limit::Tokens), 10);
        window.lower(late, 5);
        window.expire(at(14), W);
        assert_eq!(window.used(Limit::Tokens), 0);
    }

    #[test]
    fn requests_come_back_as_the_oldest_leaves() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut window = Window::default();
        for s in [0, 1, 2] {
            window.push(at(s), [1, 1, 0, 1]);
        }
        // The cap was lowered to two meanwhile: two must leave before one fits.
        assert_eq!(window.wait(at(3), W, Limit::Requests, 1), Duration::from_secs(8));
        window.expire(at(11), W);
        assert_eq!(window.used(Limit::Requests), 1);
    }
}
