//! A row that waits for its answer, and the clients that wait for the row.

use llm_batch_core::task::Span;

use crate::cache::TextKey;

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
    /// Points of trouble that were not the row's fault; see `State::row_in_trouble`.
    pub trouble: u32,
    /// How often it was refused alone as larger than a limit of the account.
    pub over_limit: u32,
    /// Most rows of its next request.
    pub most_rows: usize,
    /// Answers that were cut off before they came to it, for which it was not charged.
    pub cut: u32,
    /// What its answer should have been, if it was something else.
    pub wanted: Option<String>,
    /// The largest cap of its answer that is not known to be refused where it was alone, tokens.
    pub most_answer: u64,
    /// The last request of several rows that was refused, this one among them.
    pub refused_in: Option<u64>,
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
            trouble: 0,
            over_limit: 0,
            most_rows,
            cut: 0,
            wanted: None,
            most_answer: u64::MAX,
            refused_in: None,
            not_before: 0,
        }
    }

    /// Tokens of its line and of its answer.
    pub fn size(&self) -> usize {
        self.tokens + self.answer.planned
    }

    /// What it was charged was not its fault.
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
