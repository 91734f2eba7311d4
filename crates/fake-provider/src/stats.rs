//! The counts of a provider.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::amounts::Caps;
use crate::answer::Answer;
use crate::mean::Means;
use crate::meter::Meter;
use crate::prompt::{RowId, Shape, Task};

/// Counts since the start, or since the last
/// [`reset_stats`](crate::FakeProvider::reset_stats).
#[derive(Clone, Debug, Default, Serialize)]
pub struct Stats {
    /// Chat requests that arrived whole, refused ones included.
    pub requests: u64,
    /// Chat requests that passed the limits, and are charged.
    pub admitted: u64,
    /// Chat requests by the status they were answered.
    pub by_status: BTreeMap<u16, u64>,
    /// Connections ended by a reset, with `ResetBefore` or `ResetAfter`.
    pub connections_reset: u64,
    /// Admitted requests whose client left before the answer.
    pub abandoned: u64,
    /// Prompt tokens billed. Billing happens at admission, except for `Hang`.
    pub prompt_tokens: u64,
    /// Prompt tokens of those that were reported as cached.
    pub cached_tokens: u64,
    /// Prompt tokens that were written into the cache.
    pub written_tokens: u64,
    /// Completion tokens billed.
    pub completion_tokens: u64,
    /// Prompt tokens of those that were billed at the tier "flex".
    pub flex_prompt_tokens: u64,
    /// Completion tokens that were billed at that tier.
    pub flex_completion_tokens: u64,
    /// Tokens charged against the window, see [`Reserve`](crate::Reserve).
    pub charged_tokens: u64,
    /// Tokens of those given back, see [`Config::release`](crate::Config::release).
    pub released_tokens: u64,
    /// Requests admitted and neither answered nor abandoned yet.
    pub in_flight: u64,
    /// The most requests ever in flight.
    pub peak_in_flight: u64,
    /// Rows of the requests in flight.
    pub rows_in_flight: u64,
    /// The most rows ever in flight.
    pub peak_rows_in_flight: u64,
    /// The mean number of requests in flight, over the time from the first
    /// admission to the last answer.
    pub in_flight_mean: f64,
    /// The mean number of rows in flight, over the same time.
    pub rows_in_flight_mean: f64,
    /// The mean delay asked for of the answers to admitted requests, in ms: by
    /// [`Latency`](crate::Latency), without `hold` and without the provider's own work.
    pub latency_ms_mean: f64,
    /// The longest of them.
    pub latency_ms_max: f64,
    /// The most tokens ever admitted within any window.
    pub peak_window_tokens: u64,
    /// The most requests ever admitted within any window.
    pub peak_window_requests: u64,
    /// Share in use (0 to 1) of the limit that is used most: the mean over time,
    /// from the end of the first window to the last admission, of what the
    /// window holds. 0 when there is no limit or all happened within one window.
    pub window_used: f64,
    /// The same, with what [`OtherClient`](crate::OtherClient) takes.
    pub window_used_all: f64,
    /// The most tokens charged within any window, those of the other client included.
    pub peak_window_tokens_all: u64,
    /// Tokens charged to the other client.
    pub other_tokens: u64,
    /// Rows with a marker, by the marker's id as written (`000123`).
    pub rows: BTreeMap<String, Row>,
    /// Rows without a marker that were asked.
    pub unmarked_rows: u64,
    /// Admitted requests that asked no row.
    pub probes: u64,
    /// Faults that applied, by the variant's name.
    pub faults: BTreeMap<String, u64>,
    /// Arrival of the first chat request, in ms since the provider's start.
    pub first_request_ms: Option<u64>,
    /// The last answer to an admitted request (a reset after it was billed
    /// included), in ms since the provider's start.
    pub last_answer_ms: Option<u64>,
}

/// The counts of one row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Row {
    /// Times it was in an admitted request.
    pub asked: u32,
    /// Times its right code, under its right id, was in a billed answer's text,
    /// whether or not the client got to read it. With the fault `DoubleId` the
    /// row counts, although another code comes after the right one.
    pub answered: u32,
}

/// Stats in the making.
pub(crate) struct Tally {
    /// Without the rows.
    pub(crate) stats: Stats,
    rows: HashMap<RowId, Row>,
    started: Instant,
    /// Means of the requests and rows in flight.
    in_flight: Means<2>,
    /// Answers, and the sum of their delays.
    answers: u64,
    delays: Duration,
    longest: Duration,
}

impl Tally {
    pub(crate) fn new(started: Instant) -> Self {
        Self {
            stats: Stats::default(),
            rows: HashMap::new(),
            started,
            in_flight: Means::default(),
            answers: 0,
            delays: Duration::ZERO,
            longest: Duration::ZERO,
        }
    }

    /// Starts anew. Requests in flight stay so.
    pub(crate) fn reset(&mut self) {
        let Stats { in_flight, rows_in_flight, .. } = self.stats;
        *self = Self::new(self.started);
        self.stats = Stats {
            in_flight,
            rows_in_flight,
            peak_in_flight: in_flight,
            peak_rows_in_flight: rows_in_flight,
            ..Stats::default()
        };
    }

    pub(crate) fn arrived(&mut self, now: Instant) {
        self.stats.requests += 1;
        let ms = self.ms(now);
        self.stats.first_request_ms.get_or_insert(ms);
    }

    pub(crate) fn admitted(&mut self, now: Instant, charge: u64, task: &Task) {
        self.in_flight.begin(Some(now));
        self.advance(now);
        let stats = &mut self.stats;
        stats.admitted += 1;
        stats.charged_tokens += charge;
        stats.in_flight += 1;
        stats.rows_in_flight += task.rows.len() as u64;
        stats.peak_in_flight = stats.peak_in_flight.max(stats.in_flight);
        stats.peak_rows_in_flight = stats.peak_rows_in_flight.max(stats.rows_in_flight);
        stats.probes += u64::from(task.shape == Shape::Probe);
        for row in &task.rows {
            match row.id {
                Some(id) => self.rows.entry(id).or_default().asked += 1,
                None => stats.unmarked_rows += 1,
            }
        }
    }

    pub(crate) fn billed(&mut self, prompt_tokens: u64, [cached, written]: [u64; 2], answer: &Answer) {
        self.stats.prompt_tokens += prompt_tokens;
        self.stats.cached_tokens += cached;
        self.stats.written_tokens += written;
        self.stats.completion_tokens += answer.completion_tokens;
        for id in &answer.answered {
            self.rows.entry(*id).or_default().answered += 1;
        }
    }

    pub(crate) fn billed_as_flex(&mut self, prompt_tokens: u64, answer: &Answer) {
        self.stats.flex_prompt_tokens += prompt_tokens;
        self.stats.flex_completion_tokens += answer.completion_tokens;
    }

    pub(crate) fn fault(&mut self, name: &str) {
        *self.stats.faults.entry(name.to_owned()).or_default() += 1;
    }

    pub(crate) fn status(&mut self, status: u16) {
        *self.stats.by_status.entry(status).or_default() += 1;
    }

    /// An admitted request is in flight no more.
    pub(crate) fn landed(&mut self, now: Instant, rows: u64) {
        self.advance(now);
        self.stats.in_flight -= 1;
        self.stats.rows_in_flight -= rows;
    }

    /// An admitted request that landed got its answer, which was to take `delay`.
    pub(crate) fn answered(&mut self, now: Instant, delay: Duration) {
        self.in_flight.mark();
        self.answers += 1;
        self.delays += delay;
        self.longest = self.longest.max(delay);
        self.stats.last_answer_ms = Some(self.ms(now));
    }

    fn advance(&mut self, now: Instant) {
        self.in_flight.advance(now, [self.stats.in_flight, self.stats.rows_in_flight]);
    }

    pub(crate) fn rows(&self) -> BTreeMap<String, Row> {
        self.rows.iter().map(|(id, row)| (id.to_string(), *row)).collect()
    }

    /// The stats without the rows, with what is worked out only when asked for.
    pub(crate) fn totals(&self, meter: &Meter, caps: &Caps) -> Stats {
        let [in_flight_mean, rows_in_flight_mean] = self.in_flight.means();
        let [window_used, window_used_all] = meter.used(caps);
        Stats {
            peak_window_tokens: meter.peak_tokens,
            peak_window_requests: meter.peak_requests,
            peak_window_tokens_all: meter.peak_tokens_all,
            other_tokens: meter.other_tokens,
            window_used,
            window_used_all,
            in_flight_mean,
            rows_in_flight_mean,
            latency_ms_mean: self.delays.as_secs_f64() * 1_000.0 / self.answers.max(1) as f64,
            latency_ms_max: self.longest.as_secs_f64() * 1_000.0,
            ..self.stats.clone()
        }
    }

    fn ms(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.started).as_millis() as u64
    }
}
