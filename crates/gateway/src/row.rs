//! A row that waits for its answer, and the clients that wait for the row.

use llm_batch_core::dialect::Service;
use llm_batch_core::task::Span;

use crate::cache::TextKey;

/// Requests that may be paid for a row, for each time that it may be asked on its own account; and at least.
const PAID: u32 = 3;
const LEAST_PAID: u32 = 9;

fn most_paid(max_attempts: u32) -> u32 {
    max_attempts.saturating_mul(PAID).max(LEAST_PAID)
}

/// A row that waits or is under way. Its waiters are in its group.
#[derive(Debug)]
pub struct Row {
    pub key: TextKey,
    /// Only rows of the same compartment share a request.
    pub compartment: TextKey,
    /// The client in whose turn it is sent.
    pub conn: u64,
    /// Its text as a JSON string.
    pub quoted: String,
    /// Tokens of its line, and of its answer.
    pub tokens: usize,
    pub answer: Span,
    /// Completed requests that contained it and gave no valid answer.
    pub attempts: u32,
    /// Requests that contained it and were paid for, or may have been.
    pub paid: u32,
    /// Points of trouble that were not the row's fault; see `State::row_in_trouble`.
    pub trouble: u32,
    /// Number of times it was refused alone as larger than a limit of the account.
    pub over_limit: u32,
    /// Most rows of its next request.
    pub most_rows: usize,
    /// Answers that were cut off before they came to it, for which it was not charged.
    pub cut: u32,
    /// The value that was wanted, if its last answer was another.
    pub wanted: Option<String>,
    /// The service that its last request asked.
    pub service: Service,
    /// The probability of its answer, if the provider gave one.
    pub confidence: Option<f64>,
    /// The largest cap of its answer that is not known to be refused where it was alone, tokens.
    pub most_answer: u64,
    /// The last request of several rows that was refused, this one among them.
    pub refused_in: Option<u64>,
    /// The members of its group that could not answer it: a bit each.
    pub failed: u32,
    /// Not before this time (ms).
    pub not_before: u64,
}

impl Row {
    pub fn new(
        key: TextKey,
        compartment: TextKey,
        conn: u64,
        quoted: String,
        (tokens, answer): (usize, Span),
        most_rows: usize,
    ) -> Self {
        Self {
            key,
            compartment,
            conn,
            quoted,
            tokens,
            answer,
            attempts: 0,
            paid: 0,
            trouble: 0,
            over_limit: 0,
            most_rows,
            cut: 0,
            wanted: None,
            confidence: None,
            service: Service::default(),
            most_answer: u64::MAX,
            refused_in: None,
            failed: 0,
            not_before: 0,
        }
    }

    /// It was in no request so far.
    pub fn is_new(&self) -> bool {
        self.paid == 0 && self.attempts == 0 && self.trouble == 0 && self.failed == 0
    }

    /// Nothing more is paid for it, where a task asks a row so often at most.
    pub fn is_spent(&self, max_attempts: u32) -> bool {
        self.paid >= most_paid(max_attempts)
    }

    /// A request of `size` rows that contained it may have been paid for, and was not answered: first it may be sent as it
    /// is, then with a quarter of the rows, and before nothing more is paid for it alone.
    pub fn is_unanswered(&mut self, size: usize, max_attempts: u32) {
        let most = most_paid(max_attempts);
        if self.paid + 2 >= most {
            self.most_rows = 1;
        } else if self.paid >= most / 3 {
            self.most_rows = size.div_ceil(4);
        }
    }

    /// Tokens of its line and of its answer.
    pub fn size(&self) -> usize {
        self.tokens + self.answer.planned
    }

    /// Another member is to answer it, as if nobody had been asked.
    pub fn fails_over(&mut self, from: u32, most_rows: usize) {
        self.failed |= from;
        (self.paid, self.attempts, self.trouble, self.over_limit, self.cut) = (0, 0, 0, 0, 0);
        (self.most_rows, self.most_answer, self.not_before) = (most_rows, u64::MAX, 0);
        (self.wanted, self.refused_in) = (None, None);
    }

    /// Its attempts were not its fault.
    pub fn forgive(&mut self, most_rows: usize) {
        if self.attempts > 0 && self.refused_in.is_none() {
            (self.attempts, self.most_rows) = (0, most_rows);
        }
    }
}

/// A client that waits for a row.
#[derive(Debug, Clone, Copy)]
pub struct Waiter {
    pub conn: u64,
    /// Its own number of the row.
    pub n: u64,
    /// Bytes of its text, which count against memory.
    pub bytes: usize,
}
