//! The limits: an exact log of what was admitted within the last window.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Admissions of the last window, oldest first.
#[derive(Default)]
pub(crate) struct Window {
    log: VecDeque<(Instant, u64)>,
    tokens: u64,
}

/// Why a request is not admitted.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Full {
    /// It needs more tokens than a whole window has.
    TooLarge,
    /// It would fit after this time, were nothing else admitted.
    Tokens(Duration),
    /// A request would fit after this time, were nothing else admitted.
    Requests(Duration),
}

impl Window {
    /// Admits a request that needs `need` tokens, or says why not.
    pub(crate) fn admit(
        &mut self,
        now: Instant,
        window: Duration,
        need: u64,
        token_cap: Option<u64>,
        request_cap: Option<u64>,
    ) -> Result<(), Full> {
        self.expire(now, window);
        if let Some(cap) = token_cap {
            if need > cap {
                return Err(Full::TooLarge);
            }
            if self.tokens + need > cap {
                return Err(Full::Tokens(self.wait_for_tokens(now, window, cap - need)));
            }
        }
        if let Some(cap) = request_cap
            && self.requests() >= cap
        {
            // The entries before this one must go too, and they go earlier.
            let last_to_go = (self.requests() - cap) as usize;
            return Err(Full::Requests(self.expiry(now, window, last_to_go)));
        }
        self.log.push_back((now, need));
        self.tokens += need;
        Ok(())
    }

    /// Tokens admitted within the window, as of the last call of `admit` or `expire`.
    pub(crate) fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Requests admitted within the window, as of the last call of `admit` or `expire`.
    pub(crate) fn requests(&self) -> u64 {
        self.log.len() as u64
    }

    /// Time until the window is empty.
    pub(crate) fn empty_in(&self, now: Instant, window: Duration) -> Duration {
        match self.log.len() {
            0 => Duration::ZERO,
            len => self.expiry(now, window, len - 1),
        }
    }

    /// Forgets what left the window.
    pub(crate) fn expire(&mut self, now: Instant, window: Duration) {
        while let Some(&(at, tokens)) = self.log.front()
            && now.saturating_duration_since(at) >= window
        {
            self.log.pop_front();
            self.tokens -= tokens;
        }
    }

    /// Time until at most `room` tokens are left in the window.
    fn wait_for_tokens(&self, now: Instant, window: Duration, room: u64) -> Duration {
        let mut left = self.tokens;
        for (index, (_, tokens)) in self.log.iter().enumerate() {
            left -= tokens;
            if left <= room {
                return self.expiry(now, window, index);
            }
        }
        Duration::ZERO
    }

    fn expiry(&self, now: Instant, window: Duration, index: usize) -> Duration {
        self.log.get(index).map_or(Duration::ZERO, |(at, _)| window.saturating_sub(now.saturating_duration_since(*at)))
    }
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
        assert_eq!(window.admit(at(0), W, 40, Some(100), None), Ok(()));
        assert_eq!(window.admit(at(4), W, 60, Some(100), None), Ok(()));
        let wait = |s| Err(Full::Tokens(Duration::from_secs(s)));
        assert_eq!(window.admit(at(5), W, 40, Some(100), None), wait(5));
        assert_eq!(window.admit(at(5), W, 41, Some(100), None), wait(9));
        assert_eq!(window.admit(at(5), W, 101, Some(100), None), Err(Full::TooLarge));
        assert_eq!(window.admit(at(10), W, 40, Some(100), None), Ok(()));
        assert_eq!((window.tokens(), window.requests()), (100, 2));
        assert_eq!(window.empty_in(at(12), W), Duration::from_secs(8));
    }

    #[test]
    fn requests_come_back_as_the_oldest_leaves() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut window = Window::default();
        for s in [0, 1, 2] {
            assert_eq!(window.admit(at(s), W, 1, None, None), Ok(()));
        }
        // The cap was lowered meanwhile: two must leave before one fits.
        let wait = Err(Full::Requests(Duration::from_secs(8)));
        assert_eq!(window.admit(at(3), W, 1, None, Some(2)), wait);
        assert_eq!(window.admit(at(11), W, 1, None, Some(2)), Ok(()));
    }
}
