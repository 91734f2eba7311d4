//! Peaks and means of the rolling log.

use std::time::{Duration, Instant};

use crate::amounts::{Amounts, Caps, Limit};
use crate::mean::Means;

/// Peaks and means of what was in the window. Kept as it happens, so that
/// nothing older than the window need be remembered.
#[derive(Default)]
pub(crate) struct Meter {
    /// Means of the amounts in the window: ours, and all.
    means: [Means<{ Limit::ALL.len() }>; 2],
    /// The most tokens of ours in any window.
    pub(crate) peak_tokens: u64,
    /// The most requests of ours in any window.
    pub(crate) peak_requests: u64,
    /// The most tokens in any window, the other client's included.
    pub(crate) peak_tokens_all: u64,
    /// Tokens charged to the other client.
    pub(crate) other_tokens: u64,
}

/// The amounts in the window.
#[derive(Clone, Copy, Default)]
pub(crate) struct Held {
    pub(crate) ours: Amounts,
    pub(crate) all: Amounts,
}

impl Held {
    pub(crate) fn add(&mut self, charge: &Amounts, is_ours: bool) {
        for limit in Limit::ALL.map(|limit| limit as usize) {
            self.all[limit] += charge[limit];
            self.ours[limit] += charge[limit] * u64::from(is_ours);
        }
    }

    pub(crate) fn subtract(&mut self, charge: &Amounts, is_ours: bool) {
        for limit in Limit::ALL.map(|limit| limit as usize) {
            self.all[limit] -= charge[limit];
            self.ours[limit] -= charge[limit] * u64::from(is_ours);
        }
    }
}

impl Meter {
    /// The window held this since the last call.
    pub(crate) fn advance(&mut self, now: Instant, held: &Held) {
        for (means, amounts) in self.means.iter_mut().zip([held.ours, held.all]) {
            means.advance(now, amounts);
        }
    }

    /// A charge was added, and the window holds this now.
    pub(crate) fn charged(&mut self, now: Instant, window: Duration, charge: &Amounts, is_ours: bool, held: &Held) {
        self.peak_tokens_all = self.peak_tokens_all.max(tokens(held.all));
        if is_ours {
            self.peak_tokens = self.peak_tokens.max(tokens(held.ours));
            self.peak_requests = self.peak_requests.max(held.ours[Limit::Requests as usize]);
            for means in &mut self.means {
                means.begin(now.checked_add(window));
                means.mark();
            }
        } else {
            self.other_tokens += tokens(*charge);
        }
    }

    /// Shares that we and all took of the limit that was used most: the means over time,
    /// from the end of the first window to our last admission.
    pub(crate) fn used(&self, caps: &Caps) -> [f64; 2] {
        let share = |(mean, cap): (f64, &Option<u64>)| cap.filter(|cap| *cap > 0).map_or(0.0, |cap| mean / cap as f64);
        self.means.each_ref().map(|means| means.means().into_iter().zip(caps).map(share).fold(0.0, f64::max))
    }
}

fn tokens(amounts: Amounts) -> u64 {
    amounts[Limit::Tokens as usize]
}
