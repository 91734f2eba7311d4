//! The state that outlives the limiter's process: what was sent in the last minute, and what was learnt.

use super::burst::Known;
use super::{Amounts, KINDS, Limiter, Limits, Window};

/// As many seconds as the longest window is long, with what it is longer than a minute.
const SECONDS: usize = 61;

/// Plain data, to be kept where the process' end does not reach. Times are ages.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Kept {
    /// The amounts sent, by how many seconds ago.
    sent: [Amounts; SECONDS],
    burst: Known,
    /// Time since the last burst, ms, if there was one.
    burst_age: Option<u64>,
    /// The part of the limit that is ours, and at which part the last refusal came.
    share: (f64, f64),
    /// For how long (ms) nothing may be sent.
    blocked: u64,
}

impl Limiter {
    /// The state that outlives the process, at `now` (ms).
    pub fn keep(&mut self, now: u64) -> Kept {
        self.forget(now);
        let mut sent = [[0; KINDS]; SECONDS];
        let [_, minute] = &self.windows;
        for (at, amounts) in minute.sent() {
            let seconds = (now.saturating_sub(at) / 1000) as usize;
            if let Some(sum) = sent.get_mut(seconds.min(SECONDS - 1)) {
                for (sum, amount) in sum.iter_mut().zip(amounts) {
                    *sum += amount;
                }
            }
        }
        let share = (self.share.at(now), self.share.refused_at());
        let blocked = self.blocked_until.saturating_sub(now);
        Kept { sent, burst: self.burst.known, burst_age: self.burst.age(now), share, blocked }
    }

    /// A limiter that goes on where another one was `age` ms ago. It is `now` (ms).
    pub fn restore(limits: Limits, kept: &Kept, age: u64, now: u64) -> Self {
        let then = now.saturating_sub(age);
        let mut limiter = Self::new(Limits::default(), 0, now);
        limiter.burst.restore(kept.burst, kept.burst_age.map(|age| then.saturating_sub(age)));
        for (second, amounts) in kept.sent.iter().enumerate().rev() {
            if *amounts != [0; KINDS] {
                let slot = Window::slot(then.saturating_sub(second as u64 * 1000));
                for window in &mut limiter.windows {
                    window.add(slot, *amounts);
                }
            }
        }
        limiter.forget(now);
        limiter.share.restore(kept.share, then);
        limiter.blocked_until = then + kept.blocked;
        limiter.set_limits(limits, now);
        limiter
    }
}
