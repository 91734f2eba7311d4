//! The queues of one account and model (a lane), and how the next pack is taken from them.

use std::collections::VecDeque;
use std::rc::Rc;

use llm_batch_core::codes::Legend;
use llm_batch_core::dialect::FRAME_TOKENS;
use llm_batch_core::limiter::{Limiter, Tokens};
use llm_batch_core::options::{StructuredOutput, TooLong};
use llm_batch_core::pack::{self, Bounds, Ratio};
use llm_batch_core::prompt;

use crate::protocol::{Item, Stream, most_text};
use crate::tokens;

/// How long rows wait for company while their task has a request under way, ms.
const GATHER: u64 = 10;
/// Requests under way at the same time where the model sets no number.
const DEFAULT_CONCURRENCY: usize = 16;
/// A lane with fewer free tokens of answer than this cuts answers of models that write more than they are asked to.
const SPARE_ANSWER_TOKENS: u64 = 64;
/// Most that grows to, for models that think before they answer.
const MOST_SPARE_ANSWER_TOKENS: u64 = 16_384;

/// A row that waits.
#[derive(Debug)]
pub struct Queued {
    pub conn: u64,
    pub n: u64,
    /// Its text as a JSON string.
    quoted: String,
    /// Tokens of its line.
    tokens: usize,
    /// Bytes of text that count against the gateway's memory.
    pub bytes: usize,
    /// Completed requests that contained it and gave no valid answer.
    pub attempts: u32,
    /// Points of trouble that were not the row's fault; see `State::row_in_trouble`.
    pub trouble: u32,
    /// Most rows of its next request.
    pub most_rows: usize,
    /// Not before this time (ms).
    pub not_before: u64,
}

/// Rows of the same stream settings: they may share requests.
#[derive(Debug)]
pub struct Group {
    pub stream: Rc<Stream>,
    pub legend: Rc<Legend>,
    system: String,
    /// Tokens of the fixed prefix.
    prefix_tokens: usize,
    /// Tokens of the longest answer to one row.
    answer_tokens: usize,
    fresh: VecDeque<Queued>,
    retry: VecDeque<Queued>,
    /// Requests under way.
    pub in_flight: usize,
    /// When (ms) the first of the fresh rows came.
    waiting_since: u64,
    /// A request of this group has been answered with a 2xx.
    pub succeeded: bool,
    /// Rows sent, divided by priority: the group with the least goes next.
    served: f64,
}

/// What a group has to send.
pub enum Next {
    Rows(Vec<Queued>),
    /// Nothing before this time (ms).
    Until(u64),
    Empty,
}

impl Group {
    pub fn new(stream: Stream, served: f64) -> Self {
        let legend = Legend::new(&stream.task.labels, stream.task.options.codes, &tokens::count);
        let system = prompt::system(&stream.task, &legend);
        let shape = stream.task.options.answer_shape;
        let answer_tokens =
            legend.codes().iter().map(|c| tokens::count(&prompt::sample_answer(shape, c))).max().unwrap_or(1);
        Self {
            prefix_tokens: tokens::count(&system) + FRAME_TOKENS,
            system,
            answer_tokens,
            legend: Rc::new(legend),
            stream: Rc::new(stream),
            fresh: VecDeque::new(),
            retry: VecDeque::new(),
            in_flight: 0,
            waiting_since: 0,
            succeeded: false,
            served,
        }
    }

    /// Queues a row, cut if it has to be and may be. The row's number comes back if it is larger than a request.
    pub fn push(&mut self, now: u64, conn: u64, item: Item) -> Result<(), u64> {
        let options = &self.stream.task.options;
        let fixed = self.prefix_tokens + self.answer_tokens + tokens::count(&prompt::row(417, ""));
        let most = (self.stream.model.max_request_tokens as usize).saturating_sub(fixed);
        let bytes = item.text.len();
        // Counting a text that can't fit anyway would be wasted work.
        let hopeless = bytes >= most_text(self.stream.model.max_request_tokens);
        let mut quoted = if hopeless { String::new() } else { prompt::quote(&item.text) };
        if hopeless || tokens::count(&quoted) > most {
            match options.too_long {
                TooLong::Skip => return Err(item.n),
                TooLong::Truncate => {
                    let cut = tokens::beginning(&item.text, most);
                    if cut.is_empty() {
                        return Err(item.n);
                    }
                    quoted = prompt::quote(cut);
                }
            }
        }
        if self.fresh.is_empty() {
            self.waiting_since = now;
        }
        self.fresh.push_back(Queued {
            conn,
            n: item.n,
            tokens: tokens::count(&prompt::row(417, &quoted)),
            quoted,
            bytes,
            attempts: 0,
            trouble: 0,
            most_rows: options.max_rows_per_request as usize,
            not_before: 0,
        });
        Ok(())
    }

    pub fn push_again(&mut self, row: Queued) {
        self.retry.push_back(row);
    }

    pub fn queued(&self) -> usize {
        self.fresh.len() + self.retry.len()
    }

    /// Takes out the rows of one connection, or of all.
    pub fn withdraw(&mut self, conn: Option<u64>) -> Vec<Queued> {
        let mut out = Vec::new();
        for queue in [&mut self.fresh, &mut self.retry] {
            for row in std::mem::take(queue) {
                if conn.is_none_or(|c| c == row.conn) { out.push(row) } else { queue.push_back(row) }
            }
        }
        out
    }

    /// The next rows to send in one request of at most `tokens` (prompt and answer), by our count of tokens. Never
    /// none: a row that does not fit even alone is the caller's to notice.
    pub fn next(&mut self, now: u64, tokens: usize) -> Next {
        if self.queued() == 0 {
            return Next::Empty;
        }
        let most = self.stream.task.options.max_rows_per_request as usize;
        let retry_at = self.retry.iter().map(|r| r.not_before).min();
        let retry_ready = retry_at.is_some_and(|at| at <= now);
        if !retry_ready {
            let gathered = self.fresh.len() >= most
                || self.in_flight == 0
                || now >= self.waiting_since + GATHER
                || self.fresh.iter().map(|r| r.tokens + self.answer_tokens).sum::<usize>() >= tokens;
            if self.fresh.is_empty() || !gathered {
                let fresh_at = (!self.fresh.is_empty()).then_some(self.waiting_since + GATHER);
                return [retry_at, fresh_at].into_iter().flatten().min().map_or(Next::Empty, Next::Until);
            }
        }
        // Rows that were asked before go first; each bounds the size of the request it is in.
        let mut rows: Vec<Queued> = Vec::new();
        let mut cap = most;
        let mut i = 0;
        while let Some(row) = self.retry.get(i) {
            if rows.len() + 1 > cap.min(row.most_rows) {
                break;
            }
            if row.not_before > now {
                i += 1;
                continue;
            }
            cap = cap.min(row.most_rows);
            rows.extend(self.retry.remove(i));
        }
        while rows.len() < cap {
            match self.fresh.pop_front() {
                Some(row) => rows.push(row),
                None => break,
            }
        }
        let bounds = Bounds { rows: cap, tokens, fixed: self.prefix_tokens };
        let n = pack::fit(bounds, rows.iter().map(|r| r.tokens + self.answer_tokens)).max(1);
        self.put_back(rows.split_off(n));
        self.waiting_since = now;
        Next::Rows(rows)
    }

    /// Puts rows back to where they came from, in order.
    pub fn put_back(&mut self, rows: Vec<Queued>) {
        let most = self.stream.task.options.max_rows_per_request as usize;
        for row in rows.into_iter().rev() {
            let queue =
                if row.attempts + row.trouble > 0 || row.most_rows < most { &mut self.retry } else { &mut self.fresh };
            queue.push_front(row);
        }
    }

    /// Tokens of a request with these rows, by our count.
    pub fn tokens(&self, rows: &[Queued], format: Option<&serde_json::Value>) -> Tokens {
        let schema = format.and_then(|f| f.get("json_schema")).map_or(0, |s| tokens::count(&s.to_string()));
        let prompt = self.prefix_tokens + schema + rows.iter().map(|r| r.tokens).sum::<usize>();
        Tokens { input: prompt as u64, output: (rows.len() * self.answer_tokens) as u64 }
    }

    /// The two messages of a request: fixed prefix and rows under these ids.
    pub fn messages(&self, rows: &[Queued], ids: &[u16]) -> (&str, String) {
        let user = ids.iter().zip(rows).map(|(id, row)| prompt::row(*id, &row.quoted)).collect();
        (&self.system, user)
    }

    pub fn count_served(&mut self, rows: usize) {
        self.served += rows as f64 / f64::from(self.stream.task.options.priority.max(1));
    }
}

/// What a server was found to refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Learned {
    /// The strongest form of `response_format` not known to be refused; `Auto` as long as none is.
    pub format: StructuredOutput,
    /// The cap of an answer must be called `max_completion_tokens`.
    pub max_completion_tokens: bool,
    /// Tokens of answer beyond what is expected; doubled when answers are cut off.
    pub spare_answer_tokens: u64,
}

impl Learned {
    /// Which form to ask for when the task leaves it open or names one.
    pub fn format(&self, wanted: StructuredOutput) -> StructuredOutput {
        if wanted == StructuredOutput::Auto { self.format } else { wanted }
    }

    pub fn answers_are_cut(&mut self) {
        self.spare_answer_tokens = (self.spare_answer_tokens * 4).min(MOST_SPARE_ANSWER_TOKENS);
    }
}

/// One account and model.
#[derive(Debug)]
pub struct Lane {
    pub limiter: Limiter,
    pub groups: Vec<(String, Group)>,
    pub learned: Learned,
    pub prompt_ratio: Ratio,
    pub answer_ratio: Ratio,
    pub max_concurrent: usize,
    pub in_flight: usize,
    pub in_flight_rows: usize,
    /// Requests in a row that were not answered; those that timed out count twice.
    pub failures: u32,
    /// After a 429: how many requests may be under way, and when (ms) it came. One at first, one more for each that was
    /// sent since and answered.
    pub throttled_to: Option<(usize, u64)>,
    /// When (ms) the first of them failed.
    pub failing_since: Option<u64>,
    /// When (ms) a request was last answered with a 2xx.
    pub last_success: Option<u64>,
    pub requests_total: u64,
    pub rows_total: u64,
    pub throttled: u64,
    pub errors: u64,
    pub last_error: Option<String>,
}

impl Lane {
    pub fn new(limiter: Limiter) -> Self {
        Self {
            limiter,
            groups: Vec::new(),
            learned: Learned {
                format: StructuredOutput::Auto,
                max_completion_tokens: false,
                spare_answer_tokens: SPARE_ANSWER_TOKENS,
            },
            prompt_ratio: Ratio::default(),
            answer_ratio: Ratio::default(),
            max_concurrent: DEFAULT_CONCURRENCY,
            in_flight: 0,
            in_flight_rows: 0,
            failures: 0,
            failing_since: None,
            throttled_to: None,
            last_success: None,
            requests_total: 0,
            rows_total: 0,
            throttled: 0,
            errors: 0,
            last_error: None,
        }
    }

    /// A request that was sent at `sent` (ms) was answered with a 2xx.
    pub fn answers(&mut self, now: u64, sent: u64) {
        self.failures = 0;
        self.failing_since = None;
        if let Some((most, since)) = &mut self.throttled_to
            && sent > *since
        {
            *most += 1;
            if *most >= self.max_concurrent {
                self.throttled_to = None;
            }
        }
        self.last_success = Some(now);
    }

    /// Most requests that may be under way now.
    pub fn may_be_in_flight(&self) -> usize {
        self.throttled_to.map_or(self.max_concurrent, |(most, _)| most.min(self.max_concurrent))
    }

    pub fn set_max_concurrent(&mut self, most: Option<u32>) {
        self.max_concurrent = most.map_or(DEFAULT_CONCURRENCY, |n| n.max(1) as usize);
    }

    pub fn group(&mut self, key: &str) -> Option<&mut Group> {
        self.groups.iter_mut().find(|(k, _)| k == key).map(|(_, g)| g)
    }

    /// The group of this key, made if there is none. A new one begins level with the others.
    pub fn group_or_new(&mut self, key: &str, stream: &Stream) {
        if self.group(key).is_none() {
            let level = self.groups.iter().map(|(_, g)| g.served).fold(f64::INFINITY, f64::min);
            let level = if level.is_finite() { level } else { 0.0 };
            self.groups.push((key.to_owned(), Group::new(stream.clone(), level)));
        }
    }

    /// The order in which groups are served: whoever waits first, then by what they have had.
    pub fn order(&mut self) {
        self.groups.sort_by(|(_, a), (_, b)| {
            b.stream.interactive.cmp(&a.stream.interactive).then(a.served.total_cmp(&b.served))
        });
    }

    /// A lane that nothing is queued in or under way.
    pub fn is_idle(&self) -> bool {
        self.in_flight == 0 && self.groups.is_empty()
    }
}
