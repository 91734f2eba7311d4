//! The money that a stream with a budget may still spend. The worst case of a request is taken out before it is sent; the
//! unused part comes back with its answer.

use llm_batch_core::limiter::Tokens;

use crate::protocol::{Allowance, Prices};

/// The allowance of a stream.
#[derive(Debug)]
pub struct Purse {
    /// The client whose stream it is.
    pub conn: u64,
    prices: Prices,
    /// Less than nothing, if a request took more than it could.
    cost_left: i128,
    tokens_left: i128,
    /// The client was told that it does not suffice, and has not said anything to that.
    has_asked: bool,
    /// The last grant is all there is: requests are cut to it.
    is_last: bool,
}

/// An answer to the question whether a request can be paid for.
#[derive(Debug, PartialEq, Eq)]
pub enum Pays {
    Yes,
    /// If it is made smaller.
    Less,
    /// Not before others have been answered, or the client has allowed more.
    Later,
    /// The client is to be asked for more.
    Ask,
}

impl Purse {
    pub fn new(conn: u64, prices: Prices) -> Self {
        Self { conn, prices, cost_left: 0, tokens_left: 0, has_asked: false, is_last: false }
    }

    /// The price of so many tokens.
    pub fn worth(&self, tokens: Tokens) -> Allowance {
        let cost = tokens.input.saturating_mul(self.prices.input);
        Allowance {
            cost: cost.saturating_add(tokens.output.saturating_mul(self.prices.output)),
            tokens: tokens.input.saturating_add(tokens.output),
        }
    }

    /// The client was told that it does not suffice, and has not said anything to that.
    pub fn has_asked(&self) -> bool {
        self.has_asked
    }

    pub fn allow(&mut self, more: Allowance) {
        self.add(more, 1);
        self.is_last = std::mem::take(&mut self.has_asked);
    }

    pub fn covers(&self, worst: Tokens) -> bool {
        let worst = self.worth(worst);
        i128::from(worst.cost) <= self.cost_left && i128::from(worst.tokens) <= self.tokens_left
    }

    /// Decides whether a request can be paid for. `full`: most tokens that it takes; `least`: the same with a single
    /// row; `is_idle`: nothing else of the stream is under way.
    pub fn pays(&mut self, full: Tokens, least: Tokens, is_idle: bool) -> Pays {
        if self.covers(full) {
            Pays::Yes
        } else if !is_idle || self.has_asked {
            Pays::Later
        } else if self.is_last && self.covers(least) {
            Pays::Less
        } else {
            self.has_asked = true;
            Pays::Ask
        }
    }

    /// A request goes out that takes so much at the worst.
    pub fn take(&mut self, worst: Tokens) {
        self.add(self.worth(worst), -1);
    }

    /// It took so much.
    pub fn give_back(&mut self, worst: Tokens, used: Tokens) {
        self.add(self.worth(worst), 1);
        self.add(self.worth(used), -1);
    }

    /// No limit (`u64::MAX`) is more than requests can ever take.
    fn add(&mut self, worth: Allowance, sign: i128) {
        self.cost_left += sign * i128::from(worth.cost);
        self.tokens_left += sign * i128::from(worth.tokens);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(input: u64, output: u64) -> Tokens {
        Tokens { input, output }
    }

    #[test]
    fn requests_are_paid_waited_for_asked_for_and_cut_in_that_order() {
        let mut p = Purse::new(1, Prices { input: 2, output: 10 });
        assert_eq!(p.pays(of(100, 10), of(10, 1), true), Pays::Ask);
        assert_eq!(p.pays(of(100, 10), of(10, 1), true), Pays::Later);
        p.allow(Allowance { cost: 400, tokens: u64::MAX });
        assert_eq!(p.pays(of(100, 10), of(10, 1), true), Pays::Yes);
        p.take(of(100, 10));
        assert_eq!(p.pays(of(100, 10), of(10, 1), false), Pays::Later);
        p.give_back(of(100, 10), of(90, 5));
        assert_eq!((p.cost_left, p.tokens_left), (400 - 230, i128::from(u64::MAX) - 95));
        // The client has said that this is all.
        assert_eq!(p.pays(of(100, 10), of(10, 1), true), Pays::Less);
        p.take(of(80, 0));
        assert_eq!(p.pays(of(100, 10), of(10, 1), true), Pays::Ask);
    }
}
