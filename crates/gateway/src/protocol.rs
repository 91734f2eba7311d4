//! The messages between clients (sessions and job workers) and the gateway, over the Unix socket.
//!
//! A frame is a length (4 bytes, little endian) and so many bytes of JSON. A connection carries one stream: `Open`
//! says what to ask, `Items` brings rows, `Outcomes` answers them in any order.

mod stream;

pub use llm_batch_core::remedy::StopReason;
pub use llm_batch_core::route::Rates;

pub use self::stream::{
    Alternative, Endpoint, MAX_REQUEST_TOKENS, MOST_MODELS, Model, Policy, Prices, Secret, Stream, most_text,
};

use llm_batch_core::breaker;
use llm_batch_core::task::Answer;
use llm_batch_core::trouble;
use serde::{Deserialize, Serialize};

/// Largest frame, bytes. A row's text must fit with room to spare.
pub const MAX_FRAME: usize = 16 << 20;
/// Most rows of one connection that may be without an outcome.
pub const MAX_OUTSTANDING_ITEMS: usize = 4_096;
/// Most bytes of text of one connection that may be without an outcome. One row may be larger.
pub const MAX_OUTSTANDING_BYTES: usize = 8 << 20;

/// An amount that a stream with a budget may spend, or that a request may take at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Allowance {
    /// Picodollars; `u64::MAX` is no limit.
    pub cost: u64,
    /// Tokens, prompts and answers together; `u64::MAX` is no limit.
    pub tokens: u64,
}

/// One row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Item {
    /// The client's own number of it.
    pub n: u64,
    /// Its text.
    pub text: String,
    /// Stands for the value that keeps it apart: a row never shares a request or an answer with one of another value,
    /// nor with one that has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub isolation: Option<String>,
    /// It was answered before, and the client refused the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub again: Option<Again>,
}

/// Why a row is asked again. An answer that was kept for its text is not taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Again {
    /// Its answers so far.
    pub attempts: u32,
    /// The value that is wanted, for the model: nothing of what a model wrote, since other rows share the request.
    pub hint: String,
}

/// A message of a client.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToGateway {
    /// Sets what to ask from now on. Only while no row is without an outcome.
    Open(Box<Stream>),
    /// Adds to what a stream with a budget may spend.
    Allow(Allowance),
    /// Asks whether the model answers at all; answered by `Probed`.
    Probe,
    /// Asks what rows would take, without sending them; answered by `Estimated`.
    Estimate(Vec<Item>),
    /// Rows to ask about.
    Items(Vec<Item>),
    /// Rows that have not been sent come back as `Withdrawn`; what was sent is still answered.
    Withdraw,
    /// The same, and rows under way come back as well. A request that nobody else waits for is given up; what it may have
    /// cost at the most is told as unconfirmed.
    Abandon,
    /// Asks for the state of all models; answered by `Activity`.
    Activity,
}

/// The fate of a row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Its answer.
    Answer(Answer),
    /// The model would not or could not answer.
    Skip {
        /// `no_answer`, `refused`, `too_long`
        class: String,
        /// In words.
        detail: String,
    },
    /// It went wrong.
    Fail {
        /// `unknown_code`, `contradicted`, `rejected`, `provider_error`
        class: String,
        /// In words.
        detail: String,
    },
    /// It was not sent.
    Withdrawn,
}

/// A row's outcome.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// The client's own number of the row.
    pub n: u64,
    /// Its fate.
    pub verdict: Verdict,
    /// Completed requests that contained it.
    pub attempts: u32,
    /// Its answer was paid for with another row of the same text.
    pub reused: bool,
    /// The probability of its answer, 0 to 1, if the provider gives one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confidence: Option<f64>,
}

/// The spending of a stream since the last frame that reported it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Spent {
    /// Requests that were answered with a 2xx.
    pub requests: u64,
    /// Tokens of prompts, as the provider counts.
    pub input_tokens: u64,
    /// Those of them that the provider had cached.
    pub cached_input_tokens: u64,
    /// Those of them that it has written into its cache, if they cost more for that.
    pub written_input_tokens: u64,
    /// Tokens of answers, as the provider counts.
    pub output_tokens: u64,
    /// Tokens of prompts of requests that broke off, which may have been charged or not; by our count, at the worst.
    pub unconfirmed_input_tokens: u64,
    /// Tokens of answers of such requests, at the worst.
    pub unconfirmed_output_tokens: u64,
    /// Time that rows were with the provider in requests that were answered, ms, summed over all rows.
    pub row_ms: u64,
    /// Of these tokens those of requests that were served at the tier "flex": of prompts, those of them that the provider had
    /// cached, or has written into its cache, and of answers.
    #[serde(default)]
    pub flex: [u64; 4],
}

impl Spent {
    /// Adds up.
    pub fn add(&mut self, more: &Self) {
        self.requests += more.requests;
        self.input_tokens += more.input_tokens;
        // A cached part that is larger than the whole must not make a cost negative.
        let cached = more.cached_input_tokens.min(more.input_tokens);
        self.cached_input_tokens += cached;
        self.written_input_tokens += more.written_input_tokens.min(more.input_tokens - cached);
        self.output_tokens += more.output_tokens;
        self.unconfirmed_input_tokens += more.unconfirmed_input_tokens;
        self.unconfirmed_output_tokens += more.unconfirmed_output_tokens;
        self.row_ms += more.row_ms;
        self.flex.iter_mut().zip(more.flex).for_each(|(all, more)| *all += more);
    }

    /// What was spent at the normal tier, and at the tier "flex".
    pub fn by_tier(&self) -> [Self; 2] {
        let [input, cached, written, output] = self.flex;
        let normal = Self {
            input_tokens: self.input_tokens.saturating_sub(input),
            cached_input_tokens: self.cached_input_tokens.saturating_sub(cached),
            written_input_tokens: self.written_input_tokens.saturating_sub(written),
            output_tokens: self.output_tokens.saturating_sub(output),
            flex: [0; 4],
            ..*self
        };
        let flex = Self {
            input_tokens: self.input_tokens - normal.input_tokens,
            cached_input_tokens: self.cached_input_tokens - normal.cached_input_tokens,
            written_input_tokens: self.written_input_tokens - normal.written_input_tokens,
            output_tokens: self.output_tokens - normal.output_tokens,
            ..Self::default()
        };
        [normal, flex]
    }
}

/// The end of a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stop {
    /// Why.
    pub reason: StopReason,
    /// In words, keys redacted.
    pub message: String,
    /// When to try again, ms from now, if that is known.
    pub retry_after_ms: Option<u64>,
}

/// There is no place for a session's stream: others have them all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Full {
    /// This many streams of the same role are open.
    Role(usize),
    /// This many clients are connected.
    Gateway(usize),
    /// Their tasks take this memory, bytes.
    Memory(usize),
}

/// The state of one account and model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Activity {
    /// The account.
    pub account: String,
    /// The provider's name of the model.
    pub model: String,
    /// The oids of the roles that have streams open.
    pub roles: Vec<u32>,
    /// Rows that wait.
    pub queued: u64,
    /// Requests under way.
    pub in_flight_requests: u64,
    /// Rows in them.
    pub in_flight_rows: u64,
    /// Tokens that count against the limit at present, scaled to a minute.
    pub tokens_in_window: u64,
    /// Tokens a minute.
    pub tokens_limit: Option<u64>,
    /// Requests that count against the limit at present, scaled to a minute.
    pub requests_in_window: u64,
    /// Requests a minute.
    pub requests_limit: Option<u64>,
    /// The part of the tightest limit that is used up, 0 to 1.
    pub used: Option<f64>,
    /// Most requests that may be under way, as it has proved useful so far.
    pub requests_allowed: u64,
    /// Most rows in a request at present: less than the task allows after incomplete or slow answers.
    pub rows_allowed: Option<u64>,
    /// The part of the limit that is left to us, 0 to 1: less than 1 after refusals that nothing else explains.
    pub share: f64,
    /// Tokens that the provider said were left, and what we reckon is left of them now.
    pub reported_left: Option<u64>,
    /// Tokens of prompts as the provider counts them, for each that we count.
    pub token_ratio: f64,
    /// Tokens of an answer for each that we expected.
    pub answer_ratio: f64,
    /// Tokens that the model spends before it answers, a request, of late.
    pub thinking_tokens: u64,
    /// Time from sending to the answer of late, ms.
    pub latency_ms: Option<u64>,
    /// Rows that were answered without being sent, since the gateway started.
    pub rows_reused: u64,
    /// Tells whether requests are sent, or the endpoint is left alone because it does not answer.
    pub breaker: breaker::State,
    /// Nothing is sent for so many ms more, because the provider said so or is in trouble.
    pub waiting_ms: Option<u64>,
    /// Requests that were sent since the gateway started.
    pub requests_total: u64,
    /// Rows in them.
    pub rows_total: u64,
    /// Requests that were answered with a 429.
    pub throttled: u64,
    /// Requests that went wrong otherwise.
    pub errors: u64,
    /// The last error.
    pub last_error: Option<Words>,
    /// The service that the last request asked.
    #[serde(default)]
    pub asked_by: Option<String>,
}

/// An error, and the role whose request it was.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Words {
    /// The role's oid.
    pub role: u32,
    /// In words, keys redacted. The provider's may quote a row.
    pub message: String,
}

impl Words {
    /// For its own role and those who may see everything, or for others.
    pub fn shown(&self, is_own: bool) -> &str {
        if is_own { &self.message } else { trouble::without_words(&self.message) }
    }
}

/// An estimate of rows that are not sent.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Estimate {
    /// Rows that would be sent: not too long, and not the same as one before where the task reuses answers.
    pub rows: u64,
    /// Requests.
    pub requests: u64,
    /// Tokens of prompts, by our count and the relation measured so far.
    pub input_tokens: u64,
    /// Tokens of answers.
    pub output_tokens: u64,
    /// The first request's body, as JSON.
    pub example: Option<String>,
}

/// A message of the gateway.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromGateway {
    /// Rows that are done with, and what was spent meanwhile.
    Outcomes {
        /// The model that answered them, by its place in the stream.
        #[serde(default)]
        model: usize,
        /// The rows; may be none.
        outcomes: Vec<Outcome>,
        /// The spending since the last such message.
        spent: Spent,
    },
    /// The stream can't go on. Rows not sent have been withdrawn, rows under way are still answered.
    Stopped(Stop),
    /// The stream was not opened, and the connection is closed.
    Full(Full),
    /// The rest of the allowance does not suffice for the smallest next request, and nothing is under way that could
    /// give some back. The client answers with `Allow` or `Withdraw`.
    Exhausted {
        /// Most that the next request may take with a single row.
        least: Allowance,
        /// Most that a full request may take.
        full: Allowance,
    },
    /// The answer to `Estimate`.
    Estimated(Estimate),
    /// The answer to `Probe`: nothing if the model answers, else what is wrong.
    Probed(Option<Stop>),
    /// The answer to `Activity`.
    Activity(Vec<Activity>),
}

/// A message as a frame.
///
/// # Errors
/// If it can't be written as JSON or would be larger than a frame may be.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, String> {
    let mut frame = vec![0; 4];
    serde_json::to_writer(&mut frame, message).map_err(|e| e.to_string())?;
    let length = frame.len() - 4;
    if length > MAX_FRAME {
        return Err(format!("a message of {length} bytes is larger than a frame may be"));
    }
    frame[..4].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(frame)
}

/// Bytes of the frame that begins in `buffer`, if that says so yet.
pub fn announced(buffer: &[u8]) -> Option<usize> {
    buffer.first_chunk::<4>().map(|head| u32::from_le_bytes(*head) as usize)
}

/// Takes the first whole frame out of `buffer`; `None` if there is none yet.
///
/// # Errors
/// If the peer announces a frame that is too large or does not hold a message.
pub fn decode<T: for<'de> Deserialize<'de>>(buffer: &mut Vec<u8>) -> Result<Option<T>, String> {
    let Some(length) = announced(buffer) else { return Ok(None) };
    if length > MAX_FRAME {
        return Err(format!("a frame of {length} bytes was announced"));
    }
    let Some(payload) = buffer.get(4..4 + length) else { return Ok(None) };
    let message = serde_json::from_slice(payload).map_err(|e| format!("a frame holds no message: {e}"))?;
    buffer.drain(..4 + length);
    Ok(Some(message))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use llm_batch_core::dialect::{Api, Counts};
    use llm_batch_core::options::Options;
    use llm_batch_core::task::{Spec, Task};
    use serde_json::Map;

    /// A stream without limits, for tests.
    pub fn stream() -> Stream {
        Stream {
            database: 1,
            role: 10,
            interactive: false,
            endpoint: Endpoint {
                api: Api::default(),
                api_version: None,
                base_url: "http://127.0.0.1:1/v1".into(),
                is_trusted: true,
                allow_http: false,
                ca_file: None,
                account: None,
                api_key: None,
                counts: Counts::default(),
            },
            model: Model {
                model: "m".into(),
                requests_per_minute: None,
                inputs_per_minute: None,
                tokens_per_minute: None,
                input_tokens_per_minute: None,
                output_tokens_per_minute: None,
                max_concurrent_requests: None,
                request_timeout_ms: 20_000,
                max_request_tokens: 16_000,
                parameters: Map::new(),
                prices: None,
            },
            others: Vec::new(),
            policy: Policy::default(),
            rates: Vec::new(),
            task: Task {
                spec: Spec::from_json("classify", &serde_json::json!({"labels": ["a", "b"]})).unwrap(),
                options: Options::default(),
            },
            budget: None,
        }
    }

    #[test]
    fn texts_a_minute_are_those_of_the_provider_unless_the_user_says() {
        let mut s = stream();
        s.model.requests_per_minute = Some(100);
        for (api, want) in [(Api::Openai, None), (Api::Cohere, Some(2_000)), (Api::Gemini, Some(100))] {
            s.endpoint.api = api;
            s.task.spec = Spec::from_json("classify", &serde_json::json!({"labels": ["a", "b"]})).unwrap();
            assert_eq!(s.limits().inputs_per_minute, None, "{api:?}");
            s.task.spec = Spec::from_json("embed", &serde_json::json!({"dimensions": 3})).unwrap();
            assert_eq!(s.limits().inputs_per_minute, want, "{api:?}");
            let model = Model { inputs_per_minute: Some(7), ..s.model.clone() };
            assert_eq!(Stream { model, ..s.clone() }.limits().inputs_per_minute, Some(7), "{api:?}");
        }
    }

    #[test]
    fn keys_are_not_printed() {
        let mut stream = stream();
        stream.endpoint.api_key = Some(Secret("sk-0123456789".into()));
        let printed = format!("{:?} {:#?}", ToGateway::Open(Box::new(stream.clone())), stream);
        assert!(printed.contains("[redacted]") && !printed.contains("0123456789"), "{printed}");
    }

    #[test]
    fn frames_survive_any_cut() {
        let messages = vec![
            ToGateway::Probe,
            ToGateway::Items(vec![Item { n: 7, text: "ä\n\"".into(), isolation: None, again: None }]),
            ToGateway::Withdraw,
            ToGateway::Abandon,
        ];
        let bytes: Vec<u8> = messages.iter().flat_map(|m| encode(m).unwrap()).collect();
        for step in 1..bytes.len() {
            let (mut buffer, mut got) = (Vec::new(), Vec::new());
            for chunk in bytes.chunks(step) {
                buffer.extend_from_slice(chunk);
                while let Some(m) = decode::<ToGateway>(&mut buffer).unwrap() {
                    got.push(m);
                }
            }
            assert_eq!(got, messages);
        }
    }

    #[test]
    fn garbage_is_an_error_and_a_key_is_never_printed() {
        assert!(decode::<ToGateway>(&mut b"GET / HTTP/1.1\r\n".to_vec()).is_err());
        assert!(decode::<ToGateway>(&mut vec![2, 0, 0, 0, b'{', b'}']).is_err());
        assert_eq!(format!("{:?}", Secret("sk-123".into())), "[redacted]");
    }
}
