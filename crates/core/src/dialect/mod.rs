//! Dialects: the wires of providers as data. A file each; the common part stands here.
//!
//! A dialect says where a request goes, how it is written and how its answer is read, and in which points its provider
//! differs from the others. The parts of a request that a server refuses are learnt for all dialects alike ([`Ask`] names
//! them). Troubles ([`crate::trouble`]) and limits in headers ([`crate::headers`]) are read alike, too.
//!
//! A new dialect is a file, and its two lines here.

mod anthropic;
mod azure;
mod cohere;
pub mod decisions;
pub mod embeddings;
mod gemini;
mod mistral;
mod ollama;
mod openai;
mod systemone;
mod voyage;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::class::Trouble;
use crate::forms::Forms;
use crate::limiter::Tokens;
use crate::options::ServiceTier;
use decisions::Decisions;
use embeddings::Embeddings;

/// The dialects, by their names in the option `api`.
macro_rules! dialects {
    ($($(#[$mark:meta])* $file:ident: $name:ident,)*) => {
        /// Which wire an endpoint speaks.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
        #[serde(rename_all = "lowercase")]
        pub enum Api {
            $($(#[$mark])* #[allow(missing_docs)] $name,)*
        }

        impl Api {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// Its name in the option `api`.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($file),)* }
            }

            /// Its wire.
            pub fn dialect(self) -> &'static dyn Dialect {
                match self { $(Self::$name => &$file::$name,)* }
            }
        }
    };
}

dialects! {
    #[default]
    openai: Openai,
    azure: Azure,
    anthropic: Anthropic,
    gemini: Gemini,
    mistral: Mistral,
    cohere: Cohere,
    ollama: Ollama,
    voyage: Voyage,
    systemone: SystemOne,
}

/// A service of a provider, at an address of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Service {
    /// Answers in words.
    #[default]
    Chat,
    /// Vectors.
    Embeddings,
    /// One of the choices of each question.
    Decisions,
}

impl Service {
    /// Its name in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Chat => "chats",
            Self::Embeddings => "embeddings",
            Self::Decisions => "decisions",
        }
    }
}

/// By what of a request its answer is read.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sent<'a> {
    /// The service that was asked.
    pub service: Service,
    /// The numbers of its rows, in their order.
    pub ids: &'a [u16],
    /// Its texts, of which nothing is taken for the provider's own words.
    pub texts: &'a [String],
    /// It is to be served at the tier "flex".
    pub is_flex: bool,
}

impl Api {
    /// Returns true if it serves this.
    pub fn serves(self, service: Service) -> bool {
        let dialect = self.dialect();
        match service {
            Service::Chat => dialect.asks(),
            Service::Embeddings => dialect.embeddings().is_some(),
            Service::Decisions => dialect.decisions().is_some(),
        }
    }

    /// The address of a model. `base`: without a slash at its end.
    pub fn url(self, service: Service, base: &str, model: &str, version: Option<&str>) -> String {
        let dialect = self.dialect();
        let url = match service {
            Service::Chat => None,
            Service::Embeddings => dialect.embeddings().map(|embeddings| embeddings.url(base, model, version)),
            Service::Decisions => dialect.decisions().map(|decisions| decisions.url(base)),
        };
        url.unwrap_or_else(|| dialect.url(base, model, version))
    }

    /// Reads the body of a 2xx.
    ///
    /// # Errors
    /// If it is no answer, or carries an error.
    pub(crate) fn reply(self, sent: Sent, body: &[u8]) -> Result<Reply, Unread> {
        let dialect = self.dialect();
        let reply = match sent.service {
            Service::Chat => None,
            Service::Embeddings => dialect.embeddings().map(|embeddings| embeddings.reply(body, sent.ids.len())),
            Service::Decisions => dialect.decisions().map(|decisions| decisions.reply(body, sent.ids)),
        };
        reply.unwrap_or_else(|| dialect.reply(body))
    }
}

/// The wire of a provider.
pub trait Dialect: Sync {
    /// The address, unless the option `base_url` names another; `None` where each customer has an address.
    fn base_url(&self) -> Option<&'static str>;

    /// Returns true if the option `api_version` has a meaning.
    fn has_version(&self) -> bool {
        false
    }

    /// The tokens that count against the provider's limit, unless the option `counts` says otherwise.
    fn counts(&self) -> Counts {
        Counts::Used
    }

    /// Returns true if cached tokens of a prompt count against its limits.
    fn counts_cached(&self) -> bool {
        true
    }

    /// The surcharge (percent) of a model for a token of a prompt that is written into the cache, if answers tell of these.
    fn cache_write_surcharge(&self, _model: &str) -> u64 {
        0
    }

    /// Parameters of a request that a user may not set for a model, because the gateway does.
    fn reserved(&self) -> &'static [&'static str];

    /// The parameter that names the tier of a chat, if the provider has the tier "flex".
    fn tier_parameter(&self) -> Option<&'static str> {
        None
    }

    /// The forms of answers; those that the wire has no words for are out.
    fn forms(&self) -> Forms {
        Forms::default()
    }

    /// Returns true if a schema can be sent that allows any key.
    fn has_open_schemas(&self) -> bool {
        true
    }

    /// The address of a model. `base`: without a slash at its end.
    fn url(&self, base: &str, model: &str, version: Option<&str>) -> String;

    /// The name of the header with the key, and the prefix of the key in it.
    fn key_header(&self) -> (&'static str, &'static str) {
        ("authorization", "Bearer ")
    }

    /// A header with the version.
    fn version_header(&self, _version: Option<&str>) -> Option<(&'static str, String)> {
        None
    }

    /// The body of a request.
    fn body(&self, ask: &Ask) -> Value;

    /// Reads the body of a 2xx.
    ///
    /// # Errors
    /// If it is no answer, or carries an error.
    fn reply(&self, body: &[u8]) -> Result<Reply, Unread>;

    /// Returns true if it answers chats. One that does not embeds alone.
    fn asks(&self) -> bool {
        true
    }

    /// Its part for embeddings, if it has one.
    fn embeddings(&self) -> Option<&'static dyn Embeddings> {
        None
    }

    /// Its decisions, if it has them.
    fn decisions(&self) -> Option<&'static dyn Decisions> {
        None
    }

    /// The class of an error where the provider says it otherwise than others do; it goes before the common rules. `words`:
    /// all that it says, in lower case, without what it quotes of the request.
    fn trouble(&self, _status: u16, _error: &Value, _words: &str) -> Option<Trouble> {
        None
    }
}

/// The contents of a request.
#[derive(Debug)]
pub struct Ask<'a> {
    /// The provider's name of the model.
    pub model: &'a str,
    /// The fixed prefix.
    pub system: &'a str,
    /// It stands at the head of the user's message: the server knows no role of the system.
    pub no_system_role: bool,
    /// The rows.
    pub user: &'a str,
    /// Most tokens of the answer.
    pub max_tokens: u64,
    /// Name that cap `max_completion_tokens`, as newer OpenAI models want it.
    pub max_completion_tokens: bool,
    /// Most tokens of any request to this model, prompt and answer.
    pub context: u64,
    /// The form of the answer.
    pub format: Option<&'a Format>,
    /// Further parameters, as the user set them for the model.
    pub parameters: &'a Map<String, Value>,
    /// Without those of how the model draws its words: it draws them in one way alone.
    pub no_sampling: bool,
    /// At this tier: the one that the user's parameters say, "flex", or the normal one although a task asks for "flex".
    pub tier: ServiceTier,
}

/// Parameters of how a model draws its words.
const SAMPLING: [&str; 7] = ["temperature", "top_p", "top_k", "topP", "topK", "seed", "random_seed"];

impl Ask<'_> {
    /// The text of the user's message. The instructions go before it where the system has no role.
    fn user(&self) -> String {
        if self.no_system_role { format!("{}\n\n{}", self.system, self.user) } else { self.user.to_owned() }
    }

    /// The user's parameters that are not among those that are set here.
    fn others(&self, reserved: &[&str]) -> impl Iterator<Item = (String, Value)> {
        let is_out = |key: &str| reserved.contains(&key) || self.no_sampling && SAMPLING.contains(&key);
        self.parameters.iter().filter(move |(key, _)| !is_out(key)).map(|(k, v)| (k.clone(), v.clone()))
    }

    /// Writes the tier into a body.
    fn set_tier(&self, body: &mut Map<String, Value>, parameter: &str) {
        match self.tier {
            ServiceTier::Default => {}
            ServiceTier::Flex => drop(body.insert(parameter.to_owned(), "flex".into())),
            ServiceTier::FlexOrDefault => drop(body.remove(parameter)),
        }
    }
}

/// A form of an answer that is asked for.
#[derive(Debug, Clone, PartialEq)]
pub enum Format {
    /// JSON.
    Json,
    /// JSON by a schema.
    Schema {
        /// The schema names every key, so that nothing else can come.
        strict: bool,
        /// The schema.
        schema: Value,
    },
}

/// Tokens that a request has beside its texts: the frame of two messages and the beginning of the answer
/// (OpenAI's cookbook, "How to count tokens with tiktoken": 3 a message and 3).
pub const FRAME_TOKENS: usize = 9;

/// The tokens of a request that a provider counts against its limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Counts {
    /// Those that it took: the rest of the reservation comes back with the answer.
    #[default]
    Used,
    /// The prompt and the cap of the answer, however short the answer is (Azure's documents).
    Reserved,
    /// The larger of the prompt and the cap of the answer (OpenAI's guide to rate limits).
    Larger,
}

impl Counts {
    /// The reservation for a request with this prompt, for whose answer so many tokens are expected, and at most asked
    /// for.
    pub fn reserve(self, prompt: u64, expected_answer: u64, most_answer: u64) -> Tokens {
        match self {
            Self::Used => Tokens { input: prompt, output: expected_answer },
            Self::Reserved => Tokens { input: prompt, output: most_answer },
            Self::Larger => Tokens { input: prompt, output: most_answer.saturating_sub(prompt) },
        }
    }

    /// The part of a reservation that stays counted when the request took `used`.
    pub fn settle(self, reserved: Tokens, used: Tokens) -> Tokens {
        if self == Self::Used { used } else { reserved }
    }
}

/// The end of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Finish {
    /// By itself.
    #[default]
    Complete,
    /// At the cap of tokens.
    Length,
    /// By the provider's filter, or the model refused.
    Refused,
}

/// The provider's account of a request. `None` for a part that it does not state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Tokens of its prompt.
    pub input: Option<u64>,
    /// Tokens of its answer, thinking included.
    pub output: Option<u64>,
}

/// A server may count so many times the tokens of a request that it can take by our count, and so many more: it has a
/// tokenizer, a template and instructions of its own.
const MOST_TIMES: u64 = 20;
const MOST_MORE: u64 = 100_000;

impl Usage {
    /// The parts that can be true of a request which may take so many tokens at the worst, by our count. A limit would be
    /// used up for minutes, and a budget for good, by a number such as 4,294,967,295.
    pub fn believable(self, worst: Tokens) -> Self {
        let most = |worst: u64| worst.saturating_mul(MOST_TIMES).saturating_add(MOST_MORE);
        Self {
            input: self.input.filter(|said| *said <= most(worst.input)),
            output: self.output.filter(|said| *said <= most(worst.output)),
        }
    }

    /// All of it, if nothing is missing.
    pub fn whole(self) -> Option<Tokens> {
        Some(Tokens { input: self.input?, output: self.output? })
    }

    /// With these in place of what is missing.
    pub fn or(self, missing: Tokens) -> Tokens {
        Tokens { input: self.input.unwrap_or(missing.input), output: self.output.unwrap_or(missing.output) }
    }

    /// That part of these which is missing.
    pub fn missing(self, of: Tokens) -> Tokens {
        let part = |known: Option<u64>, of: u64| if known.is_some() { 0 } else { of };
        Tokens { input: part(self.input, of.input), output: part(self.output, of.output) }
    }
}

/// The answer of a request with a status of 2xx.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Reply {
    /// The text; empty if there is none.
    pub text: String,
    /// Its end.
    pub finish: Finish,
    /// There is reasoning beside the text.
    pub has_reasoning: bool,
    /// The tokens that it took.
    pub usage: Usage,
    /// Tokens of it that came before the answer, if the provider says.
    pub thought: Option<u64>,
    /// Tokens of the prompt that the provider had cached.
    pub cached_input: u64,
    /// The numbers of rows that an answer is refused for, each by itself.
    pub refused: Vec<u16>,
    /// The probability of the answer to each row of this number, 0 to 1, where one is given.
    pub confidences: Vec<(u16, f64)>,
    /// Tokens of the prompt that it has written into its cache, if they cost more for that.
    pub written_input: u64,
    /// It says that it was served at the tier "flex".
    pub is_flex: bool,
}

impl Reply {
    /// The probability of the answer to a row: of several the least.
    pub fn confidence(&self, id: u16) -> Option<f64> {
        self.confidences.iter().filter(|(of, _)| *of == id).map(|(_, given)| *given).reduce(f64::min)
    }

    /// The tokens that count against the provider's limits, with these in place of missing ones.
    pub fn counted(&self, api: Api, missing: Tokens) -> Tokens {
        let all = self.usage.or(missing);
        let free = if api.dialect().counts_cached() { 0 } else { self.cached_input };
        Tokens { input: all.input.saturating_sub(free), ..all }
    }

    /// Of what the provider says that it took nothing contradicts the rest.
    fn consistent(self) -> Self {
        let input = self.usage.input.unwrap_or(0);
        let cached_input = self.cached_input.min(input);
        Self { cached_input, written_input: self.written_input.min(input - cached_input), ..self }
    }
}

/// Why the body of a 2xx holds no answer.
#[derive(Debug, PartialEq, Eq)]
pub enum Unread {
    /// It carries an error: a 200 is no success at every provider.
    Said(Value),
    /// The fault in it, in words of ours.
    Other(&'static str),
}

/// A text without the byte order mark that some servers begin with.
pub(crate) fn without_mark(body: &[u8]) -> &[u8] {
    body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body)
}

/// A number of tokens. One that no request can have is none.
fn tokens(said: &Value) -> Option<u64> {
    said.as_u64().filter(|n| *n < 1 << 32)
}

/// The JSON of a 2xx.
///
/// # Errors
/// If it is none, or carries an error.
fn parsed(body: &[u8]) -> Result<Value, Unread> {
    let json: Value =
        serde_json::from_slice(without_mark(body)).map_err(|_| Unread::Other("the provider's answer is not JSON"))?;
    if json["error"].is_null() { Ok(json) } else { Err(Unread::Said(json["error"].clone())) }
}

/// A name as a segment of a path.
fn segment(name: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~".contains(&b);
    let write = |b: u8| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") };
    name.bytes().map(write).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::embeddings::{Encoding, Texts};
    use super::*;

    /// A plain request with these parameters.
    pub fn ask(parameters: &Value) -> Ask<'_> {
        Ask {
            model: "m",
            system: "s",
            no_system_role: false,
            user: "u",
            max_tokens: 9,
            max_completion_tokens: false,
            context: 100,
            format: None,
            parameters: parameters.as_object().unwrap(),
            no_sampling: false,
            tier: ServiceTier::default(),
        }
    }

    /// A form of an answer.
    pub fn schema(strict: bool) -> Format {
        Format::Schema { strict, schema: json!({"type": "object"}) }
    }

    #[test]
    fn what_is_reserved_cannot_be_replaced_and_no_key_is_in_an_address() {
        for api in Api::ALL {
            let dialect = api.dialect();
            let mut parameters = json!({"temperature": 0.5});
            dialect.reserved().iter().for_each(|key| parameters[*key] = "theirs".into());
            let body = dialect.body(&ask(&parameters)).to_string();
            assert!(!body.contains("theirs") && body.contains("0.5") == dialect.asks(), "{api:?}: {body}");
            let url = dialect.url("https://x/v1", "a b?key=#", None);
            assert!(url.starts_with("https://x/") && !url.contains("key="), "{url}");
            assert_eq!(serde_json::to_value(api).unwrap(), api.name());
        }
    }

    /// Bodies of requests for the vectors of two texts.
    #[test]
    fn requests_for_vectors_are_written_as_documented() {
        let parameters = json!({"user": "u"});
        let texts = ["a".to_owned(), "b".to_owned()];
        let body = |api: &str, encoding: Option<Encoding>| {
            let api = Api::ALL.iter().find(|known| known.name() == api).unwrap();
            api.dialect().embeddings().unwrap().body(&Texts {
                model: "m",
                texts: &texts,
                dimensions: 3,
                input_type: Some("t"),
                encoding,
                parameters: parameters.as_object().unwrap(),
            })
        };
        let (all, bare) = (Some(Encoding::Base64), None);
        let input = json!(texts);
        let plain = json!({"model": "m", "input": input, "user": "u"});
        let with = |mut body: Value, more: Value| {
            let (Value::Object(map), Value::Object(more)) = (&mut body, more) else { panic!() };
            map.extend(more);
            body
        };
        for api in ["openai", "azure"] {
            let told = with(plain.clone(), json!({"input_type": "t"}));
            assert_eq!(body(api, all), with(told.clone(), json!({"encoding_format": "base64", "dimensions": 3})));
            assert_eq!(body(api, bare), told);
        }
        assert_eq!(
            body("mistral", all),
            with(plain.clone(), json!({"encoding_format": "base64", "output_dimension": 3}))
        );
        assert_eq!(body("mistral", bare), plain);
        assert_eq!(body("ollama", all), with(plain.clone(), json!({"dimensions": 3, "truncate": false})));
        let cohere = json!({"model": "m", "texts": input, "input_type": "t", "truncate": "NONE", "user": "u"});
        let of = json!({"embedding_types": ["base64"], "output_dimension": 3});
        assert_eq!(body("cohere", all), with(cohere.clone(), of));
        assert_eq!(body("cohere", bare), with(cohere, json!({"embedding_types": ["float"]})));
        let gemini = |text: &str| {
            let content = json!({"parts": [{"text": text}]});
            json!({"model": "models/m", "content": content, "taskType": "t", "outputDimensionality": 3, "user": "u"})
        };
        assert_eq!(body("gemini", all), json!({"requests": [gemini("a"), gemini("b")]}));
    }

    /// Answers with the vectors of two texts, in the words of each provider.
    #[test]
    fn vectors_are_read_as_documented() {
        let openai = json!({"data": [{"index": 1, "embedding": [0, 1]}, {"index": 0, "embedding": [0.6, 0.8]}],
                            "usage": {"prompt_tokens": 7, "total_tokens": 7}});
        let cohere = |of: Value| json!({"embeddings": of, "meta": {"billed_units": {"input_tokens": 7}}});
        for (api, said) in [
            ("openai", openai.clone()),
            ("azure", openai.clone()),
            ("mistral", openai),
            ("cohere", cohere(json!({"float": [[0.6, 0.8], [0, 1]]}))),
            ("cohere", cohere(json!({"base64": ["mpkZP83MTD8=", "AAAAAAAAgD8="]}))),
            ("ollama", json!({"embeddings": [[0.6, 0.8], [0, 1]], "prompt_eval_count": 7})),
            // Those of shortened vectors are made as long as those of whole ones.
            (
                "gemini",
                json!({"embeddings": [{"values": [3, 4]}, {"values": [0, 0.5]}],
                              "usageMetadata": {"promptTokenCount": 7}}),
            ),
        ] {
            let embeddings = Api::ALL.iter().find(|known| known.name() == api).unwrap().dialect().embeddings().unwrap();
            let read = |texts: usize| embeddings.reply(said.to_string().as_bytes(), texts).unwrap();
            assert_eq!(read(2).text, "{\"100\":\"mpkZP83MTD8=\",\"101\":\"AAAAAAAAgD8=\"}", "{api}");
            assert_eq!(read(2).usage, Usage { input: Some(7), output: Some(0) }, "{api}");
            let short = read(3).text;
            assert!(short == "{}" || said["data"].is_array(), "{api}: {short}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            picks in proptest::collection::vec((0_usize..22, 0_usize..8), 0..12),
        ) {
            // Members that the dialects read, with values of any kind, one in another.
            let names = [
                "content", "candidates", "message", "usage", "usageMetadata", "parts", "text", "finishReason", "done",
                "promptFeedback", "stop_reason", "input_tokens", "candidatesTokenCount", "billed_units", "type", "choices",
                "embeddings", "float", "values", "data", "embedding", "meta",
            ];
            let inner = picks.iter().fold(json!({}), |inner, (name, kind)| {
                let values =
                    [json!(null), json!(-1), json!(1_u64 << 60), json!("x"), json!([inner]), inner.clone(), json!([]), json!(true)];
                json!({ names[*name]: values[*kind], names[(name + 7) % 22]: inner })
            });
            for api in Api::ALL {
                let _ = api.dialect().reply(&bytes);
                if let Ok(reply) = api.dialect().reply(inner.to_string().as_bytes()) {
                    prop_assert!(reply.cached_input + reply.written_input <= reply.usage.input.unwrap_or(0));
                }
                if let Some(embeddings) = api.dialect().embeddings() {
                    let _ = embeddings.reply(&bytes, 1);
                    let _ = embeddings.reply(inner.to_string().as_bytes(), 1);
                }
                if let Some(decisions) = api.dialect().decisions() {
                    let _ = decisions.reply(&bytes, &[417]);
                    let _ = decisions.reply(json!({"answers": {"417": inner}}).to_string().as_bytes(), &[417]);
                }
                let _ = api.dialect().trouble(400, &inner, "");
                let _ = api.dialect().trouble(429, &inner, "");
            }
        }
    }
}
