//! The budget of a running job. The gateway is granted a chunk at a time. Each chunk is entered as reserved and
//! committed before the gateway receives it.

use llm_batch_gateway::protocol::{Allowance, Spent, Stream};

use crate::budget::{Funds, chunk, is_nothing};

/// The state of the open stream's allowance.
#[derive(Debug, Default)]
pub(super) struct Money {
    /// The amount that the gateway should have at hand, once it has said what requests take.
    chunk: Option<Allowance>,
    /// Least amount that its next request takes: it can't send it.
    least: Option<Allowance>,
    /// It asked before, got nothing, and nothing was spent since.
    in_vain: bool,
    /// The connection was lost: what was granted may have been spent.
    pub(super) in_doubt: bool,
}

/// The decision about the gateway's allowance.
#[derive(Debug, Clone, Copy)]
pub(super) enum Decision {
    Nothing,
    Grant(Allowance),
    /// The next request may take this, and the budget does not have it.
    UsedUp(Allowance),
}

impl Money {
    /// The gateway can't go on: its next request takes `least`, a full one `full`.
    pub(super) fn exhausted(&mut self, least: Allowance, full: Allowance, stream: &Stream) {
        self.least = Some(least);
        self.chunk = Some(chunk(full, stream));
    }

    /// The gateway is gone, and what it was allowed with it.
    pub(super) fn lost(&mut self) {
        *self = Self { in_doubt: true, ..Self::default() };
    }

    /// Something waits for the next settlement.
    pub(super) fn waits(&self) -> bool {
        self.least.is_some() || self.in_doubt
    }

    pub(super) fn decide(&self, funds: &Funds) -> Decision {
        match (self.least, self.chunk) {
            (Some(least), Some(chunk)) => {
                funds.grant(least, chunk, self.in_vain).map_or(Decision::UsedUp(least), Decision::Grant)
            }
            (None, Some(chunk)) => funds.top_up(chunk).map_or(Decision::Nothing, Decision::Grant),
            _ => Decision::Nothing,
        }
    }

    /// The decision is committed.
    pub(super) fn settled(&mut self, decision: Decision) {
        if let Decision::Grant(allowance) = decision {
            self.in_vain = is_nothing(allowance);
        }
        (self.least, self.in_doubt) = (None, false);
    }

    pub(super) fn spent(&mut self, spent: &Spent) {
        self.in_vain &= *spent == Spent::default();
    }
}
