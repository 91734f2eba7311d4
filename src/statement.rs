//! The budget of a statement: what all its llm_*() calls may spend together. A scalar function is called row by row, so
//! the sum is kept from call to call, until another statement begins.

use std::cell::Cell;

use llm_batch_gateway::protocol::{Allowance, Prices, Spent, Stream};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use crate::budget::{self, Funds, Price, UNLIMITED, dollars};
use crate::error::{Error, Result};

/// The spending of the current statement so far.
#[derive(Debug, Clone, Copy)]
struct Totals {
    /// When it began: no two of a session begin at the same time.
    began: i64,
    spent: Allowance,
    /// Granted to its open streams, and not known to be spent.
    reserved: Allowance,
    /// Rows that were answered.
    rows: u64,
    /// Rows that were asked about one by one.
    single: u64,
}

const NOTHING: Allowance = Allowance { cost: 0, tokens: 0 };
/// A statement with more rows than this that go one by one raises a NOTICE.
const FEW: u64 = 10;

impl Totals {
    const fn new(began: i64) -> Self {
        Self { began, spent: NOTHING, reserved: NOTHING, rows: 0, single: 0 }
    }

    /// Those of the statement that runs; at its first call they begin.
    fn now() -> Self {
        let began = began();
        if TOTALS.get().began != began {
            TOTALS.set(Self::new(began));
        }
        TOTALS.get()
    }
}

thread_local! {
    static TOTALS: Cell<Totals> = const { Cell::new(Totals::new(0)) };
}

/// A row is asked about in a request of its own. A statement that does so with more than a few is told, once.
pub fn count_single() {
    let mut totals = Totals::now();
    totals.single += 1;
    TOTALS.set(totals);
    if totals.single == FEW + 1 {
        ErrorReport::new(
            PgSqlErrorCode::ERRCODE_SUCCESSFUL_COMPLETION,
            "rows of this statement are sent to the model one by one",
            "pg_llm_batch",
        )
        .set_detail("Each row takes a request of its own.")
        .set_hint(
            "Rows share requests where EXPLAIN shows a node \"LLM Batch\", and always in llm_classify_batch() and \
             llm_batch.backfill().",
        )
        .report(PgLogLevel::NOTICE);
    }
}

/// When the statement that runs began; a function's or a procedure's is part of whatever called it.
pub fn began() -> i64 {
    // SAFETY: reads a variable on the main thread.
    unsafe { pg_sys::GetCurrentStatementStartTimestamp() }
}

fn add(sum: &mut Allowance, more: Allowance) {
    sum.cost = sum.cost.saturating_add(more.cost);
    sum.tokens = sum.tokens.saturating_add(more.tokens);
}

fn subtract(sum: &mut Allowance, less: Allowance) {
    sum.cost = sum.cost.saturating_sub(less.cost);
    sum.tokens = sum.tokens.saturating_sub(less.tokens);
}

/// The part of its statement's budget that an open stream may spend.
pub struct Purse {
    began: i64,
    limit: Allowance,
    /// Those of the stream's models.
    models: Vec<Price>,
    /// The gateway's prices, if it keeps a budget.
    prices: Option<Prices>,
    /// Granted to the stream, and not known to be spent.
    reserved: Allowance,
    /// The grant it should have at hand, if there is enough, once the gateway has reported the size of requests.
    chunk: Option<Allowance>,
    /// The gateway asked for more, got nothing, and nothing was spent since.
    in_vain: bool,
}

impl Purse {
    pub fn new(limit: Allowance, models: Vec<Price>, prices: Option<Prices>) -> Self {
        Self { began: Totals::now().began, limit, models, prices, reserved: NOTHING, chunk: None, in_vain: false }
    }

    /// Counts further spending to the statement that runs: several statements may read one cursor.
    pub fn move_on(&mut self) {
        let mut totals = Totals::now();
        if self.began != totals.began {
            self.began = totals.began;
            add(&mut totals.reserved, self.reserved);
            TOTALS.set(totals);
        }
    }

    /// Returns true if the other may spend this one's grants.
    pub fn is_same(&self, other: &Self) -> bool {
        (self.began, self.limit) == (other.began, other.limit)
    }

    /// Changes the totals, unless the statement is over.
    fn change(&self, f: impl FnOnce(&mut Totals)) {
        let mut totals = TOTALS.get();
        if totals.began == self.began {
            f(&mut totals);
            TOTALS.set(totals);
        }
    }

    fn funds(&self) -> Funds {
        let Totals { mut spent, reserved, .. } = TOTALS.get();
        add(&mut spent, reserved);
        let left = |limit: u64, gone: u64| if limit == UNLIMITED { UNLIMITED } else { limit.saturating_sub(gone) };
        let free = Allowance { cost: left(self.limit.cost, spent.cost), tokens: left(self.limit.tokens, spent.tokens) };
        Funds { free, reserved: self.reserved }
    }

    fn reserve(&mut self, allowance: Allowance) -> Allowance {
        let limited = |n: u64| if n == UNLIMITED { 0 } else { n };
        let more = Allowance { cost: limited(allowance.cost), tokens: limited(allowance.tokens) };
        add(&mut self.reserved, more);
        self.change(|t| add(&mut t.reserved, more));
        allowance
    }

    /// At most a quarter of what is left: a statement may have several streams.
    fn share(&self, chunk: Allowance) -> Allowance {
        let free = self.funds().free;
        Allowance { cost: chunk.cost.min(free.cost / 4), tokens: chunk.tokens.min(free.tokens / 4) }
    }

    /// A grant for a stream that can't send its next request.
    pub fn grant(&mut self, least: Allowance, full: Allowance, stream: &Stream) -> Result<Allowance> {
        let chunk = *self.chunk.insert(budget::chunk(full, stream));
        let chunk = self.share(chunk);
        let allowance = self.funds().grant(least, chunk, self.in_vain).ok_or_else(|| self.used_up(least))?;
        self.in_vain = budget::is_nothing(allowance);
        Ok(self.reserve(allowance))
    }

    /// More for a stream that will soon be short of it.
    pub fn top_up(&mut self) -> Option<Allowance> {
        let allowance = self.funds().top_up(self.share(self.chunk?))?;
        Some(self.reserve(allowance))
    }

    /// Enters the spending on a model and the number of answered rows, as the gateway reports them. Returns the cost,
    /// picodollars.
    pub fn spend(&mut self, model: usize, spent: &Spent, rows: u64) -> u64 {
        self.in_vain &= *spent == Spent::default();
        let mut taken = budget::taken(spent, self.prices.unwrap_or_default());
        taken = Allowance { cost: taken.cost.min(self.reserved.cost), tokens: taken.tokens.min(self.reserved.tokens) };
        subtract(&mut self.reserved, taken);
        let paid = self.models.get(model).cloned().unwrap_or_default().paid(spent);
        self.change(|t| {
            subtract(&mut t.reserved, taken);
            add(&mut t.spent, paid);
            t.rows += rows;
        });
        paid.cost
    }

    /// The stream is closed, or lost. In doubt all it was allowed may have been spent.
    pub fn release(&mut self, in_doubt: bool) {
        let reserved = std::mem::replace(&mut self.reserved, NOTHING);
        self.chunk = None;
        self.change(|t| {
            subtract(&mut t.reserved, reserved);
            if in_doubt {
                add(&mut t.spent, reserved);
            }
        });
    }

    /// 53400: the next request may take `least`, and the budget does not have it.
    fn used_up(&self, least: Allowance) -> Error {
        let (limit, Totals { spent: gone, rows, .. }) = (self.limit, TOTALS.get());
        let mut spent = Vec::new();
        if limit.cost != UNLIMITED {
            spent.push(format!("{} of {}", dollars(gone.cost), dollars(limit.cost)));
        }
        let of = if limit.tokens == UNLIMITED { String::new() } else { format!(" of {}", limit.tokens) };
        spent.push(format!("{}{of} tokens", gone.tokens));
        Error::new(PgSqlErrorCode::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED, "the budget of the statement is exhausted")
            .detail(format!(
                "Spent so far: {}, for {} answered rows; {}.",
                spent.join(" and "),
                rows,
                budget::next_request(least)
            ))
            .hint(
                "Raise llm_batch.statement_max_cost or the option max_cost or max_tokens, or fill a column with \
             llm_batch.backfill(), which keeps what was paid for.",
            )
    }
}

impl Drop for Purse {
    /// After an error in a call, requests may still be under way.
    fn drop(&mut self) {
        self.release(true);
    }
}
