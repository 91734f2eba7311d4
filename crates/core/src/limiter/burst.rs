//! Bursts: the amount that a session may send at once to a limit that was idle.
//!
//! A provider may keep its limit over shorter windows than a minute, and few say over which. A burst therefore keeps what
//! holds in all windows of at least a certain length, which begins with 6 s. Beyond that a burst goes by a ninth: if the
//! provider's window is shorter, a tenth of that one burst is refused, and from then on it stays at what is certain. If
//! all of it is answered, so much is certain, and the next one goes beyond that. Where the provider says that less is
//! left it stays at that.

use super::{Amounts, Caps, Grant, Left, Limits, MINUTE, SHORTEST, Window};

/// Amounts that were let through count a little less: a part was only reserved.
const CERTAIN: f64 = 0.99;
/// Our windows are so many times as long as the provider's: a request may be slower on its way than the one before. With
/// less (1.03) simulated windows of 10 s refuse a request now and then.
const LONGER: f64 = 1.06;
/// If more than this part of a burst is refused, its provider's windows are shorter than any that we reckon with.
const MOST_REFUSED: u64 = 5;
/// Refusals that say nothing about a burst's size: a tenth of a small one is less than a whole request.
const FEW: u64 = 2;

#[derive(Debug, Default)]
pub(super) struct Burst {
    pub known: Known,
    /// When (ms) a request last went that was not paced; how many went since none had for 6 s, and how many of
    /// those were refused.
    at: Option<u64>,
    sent: u64,
    refused: u64,
}

/// The results of learning so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Known {
    limits: Limits,
    /// At these limits a window of so many ms lets through what was let through at once; 0 before anything was.
    certain: u64,
    /// Something was refused beyond that.
    is_shorter: bool,
    /// A large part was refused, or a part of what was certain.
    is_off: bool,
    /// The most that the provider has said would be left if the request had not been sent.
    stated: Caps,
}

impl Burst {
    /// The limits are these from now on. A burst that was let through is an amount; in ms of a larger limit it is less.
    pub fn set_limits(&mut self, limits: Limits) {
        let scale = |(old, new): (Option<u64>, Option<u64>)| Some(old.unwrap_or(0) as f64 / new? as f64);
        let known = &mut self.known;
        let scale = known.limits.caps().into_iter().zip(limits.caps()).filter_map(scale).reduce(f64::min);
        known.certain = ((known.certain as f64 * scale.unwrap_or(0.0)) as u64).min(MINUTE);
        known.limits = limits;
    }

    pub fn is_off(&self) -> bool {
        self.known.is_off
    }

    /// The time (ms) between `now` and the last request that was not paced, if there was one.
    pub fn age(&self, now: u64) -> Option<u64> {
        self.at.map(|at| now.saturating_sub(at))
    }

    /// Goes on where another one was whose last burst was at `at` (ms).
    pub fn restore(&mut self, known: Known, at: Option<u64>) {
        (self.known, self.at) = (known, at);
    }

    /// When (ms) `want` may be sent beside what was sent in the last minute, if that is not `now`, so that no window of the
    /// certain length or a longer one holds more than the limit. `share` of it is ours; `spare` is to stay free. What
    /// `is_paced` looks only at windows that a burst is in.
    pub fn fits_at(
        &self,
        now: u64,
        want: Amounts,
        spare: Amounts,
        share: f64,
        minute: &Window,
        is_paced: bool,
    ) -> Option<u64> {
        let since = if is_paced { self.at.filter(|at| now <= at + MINUTE)? } else { u64::MAX };
        let Known { certain, is_shorter, stated, limits, .. } = self.known;
        let certain = certain.max(SHORTEST);
        let length = if is_shorter { certain } else { (certain * 10 / 9).min(MINUTE) } as f64;
        let kinds = limits.caps().into_iter().zip(stated).zip(want.into_iter().zip(spare)).enumerate();
        let mut latest = None;
        for (kind, ((limit, stated), (want, spare))) in kinds {
            let Some(limit) = limit else { continue };
            let rate = limit as f64 * share / MINUTE as f64;
            let stated = stated.map_or(length, |left| (left as f64 / rate).max(SHORTEST as f64));
            let mut sum = (want + spare) as f64;
            for (at, amounts) in minute.sent().rev() {
                sum += amounts.get(kind).copied().unwrap_or(0) as f64;
                // A window of so many ms holds what was sent since then.
                let needed = sum / rate;
                if needed > length.min(stated) && Window::slot(at) <= Window::slot(since) + 1 {
                    latest = latest.max(Some(at + (needed * LONGER).ceil() as u64));
                }
            }
        }
        latest.filter(|at| *at > now)
    }

    /// Returns true if more was sent within the 6 s up to `now` (ms) than the limits let through.
    pub fn is_beyond(&self, now: u64, minute: &Window) -> bool {
        let sent = minute.since(now.saturating_sub(SHORTEST));
        let is_beyond = |(sent, limit): (u64, Option<u64>)| limit.is_some_and(|limit| sent * MINUTE > limit * SHORTEST);
        sent.into_iter().zip(self.known.limits.caps()).any(is_beyond)
    }

    /// A request went at `now` (ms) that was not paced.
    pub fn goes(&mut self, now: u64) {
        if self.at.is_none_or(|at| now > at + SHORTEST) {
            (self.sent, self.refused) = (0, 0);
        }
        self.sent += 1;
        self.at = Some(now);
    }

    /// A request was answered that counts by now; `left`: what was left when the provider got it. `took`: what it took.
    pub fn settled(&mut self, grant: &Grant, took: Amounts, left: Left, minute: &Window) {
        let known = &mut self.known;
        let left = [left.requests, left.tokens, left.input_tokens, left.output_tokens];
        for ((stated, left), took) in known.stated.iter_mut().zip(left).zip(took) {
            *stated = (*stated).max(left.map(|left| left + took));
        }
        if grant.beyond && !known.is_shorter {
            let least = known.limits.caps().into_iter().enumerate().filter_map(|(kind, limit)| {
                // A part of the amounts sent may have come back within the same time.
                let (rate, mut sum, mut most) = (limit? as f64 / MINUTE as f64, 0.0, 0.0_f64);
                for (at, amounts) in minute.sent().rev().filter(|(at, _)| Window::slot(*at) <= grant.slot + 1) {
                    sum += amounts.get(kind).copied().unwrap_or(0) as f64 / rate;
                    most = most.max(sum - grant.at.saturating_sub(at) as f64);
                }
                Some(most * CERTAIN)
            });
            known.certain = known.certain.max((least.reduce(f64::min).unwrap_or(0.0) as u64).min(MINUTE));
        }
    }

    /// A request was refused: whether that is since too much was sent at once.
    pub fn refused(&mut self, grant: &Grant) -> bool {
        if self.at.is_none_or(|at| grant.at.abs_diff(at) > SHORTEST) {
            return false;
        }
        self.refused += 1;
        let known = &mut self.known;
        let is_new = self.refused == 1;
        if self.refused > FEW && self.refused * MOST_REFUSED > self.sent || is_new && known.is_shorter {
            (known.is_off, known.certain) = (true, 0);
        }
        known.is_shorter = true;
        true
    }
}
