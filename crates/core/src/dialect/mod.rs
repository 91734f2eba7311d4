//! Dialects: the wires of providers as data. A file each; what is common to them stands here.
//!
//! A dialect says where a request goes, how it is written, how its answer is read, and what its provider does otherwise
//! than others do. What a server refuses of a request is learnt for all of them alike ([`Ask`] says it), and so are the
//! troubles ([`crate::trouble`]) and the limits in headers ([`crate::headers`]).
//!
//! A new one is a file, and its two lines here.

mod openai;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::forms::Forms;
use crate::limiter::Tokens;
use crate::trouble::Trouble;

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

            /// What it is like.
            pub fn dialect(self) -> &'static dyn Dialect {
                match self { $(Self::$name => &$file::$name,)* }
            }
        }
    };
}

dialects! {
    #[default]
    openai: Openai,
}

/// The wire of a provider.
pub trait Dialect: Sync {
    /// Where it is served, unless the option `base_url` says otherwise; `None`: every customer has an address of his own.
    fn base_url(&self) -> Option<&'static str>;

    /// Whether the option `api_version` has a meaning.
    fn has_version(&self) -> bool {
        false
    }

    /// What the provider counts against its limit of tokens, unless the option `counts` says otherwise.
    fn counts(&self) -> Counts {
        Counts::Used
    }

    /// Whether tokens of a prompt that were cached count against its limits.
    fn counts_cached(&self) -> bool {
        true
    }

    /// Parameters of a request that a user may not set for a model, because the gateway does.
    fn reserved(&self) -> &'static [&'static str];

    /// Forms of answers that can't be asked for are out.
    fn forms(&self) -> Forms {
        Forms::default()
    }

    /// The address of a model. `base`: without a slash at its end.
    fn url(&self, base: &str, model: &str, version: Option<&str>) -> String;

    /// The header with the key, and what stands before the key.
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

    /// The class of an error where the provider says it otherwise than others do; it goes before the common rules. `words`:
    /// all that it says, in lower case, without what it quotes of the request.
    fn trouble(&self, _status: u16, _error: &Value, _words: &str) -> Option<Trouble> {
        None
    }
}

/// What goes into a request.
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
}

impl Ask<'_> {
    /// What the user says, and the system before it if that has no role.
    fn user(&self) -> String {
        if self.no_system_role { format!("{}\n\n{}", self.system, self.user) } else { self.user.to_owned() }
    }

    /// The user's parameters that are not among those that are set here.
    fn others(&self, reserved: &[&str]) -> impl Iterator<Item = (String, Value)> {
        self.parameters.iter().filter(|(key, _)| !reserved.contains(&key.as_str())).map(|(k, v)| (k.clone(), v.clone()))
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

/// What a provider counts against its limit of tokens for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Counts {
    /// What it took: of what is reserved before, the rest comes back with the answer.
    #[default]
    Used,
    /// The prompt and the cap of the answer, however short the answer is (Azure's documents).
    Reserved,
    /// The larger of the prompt and the cap of the answer (OpenAI's guide to rate limits).
    Larger,
}

impl Counts {
    /// What to reserve for a request with this prompt, for whose answer so many tokens are expected, and at most asked
    /// for.
    pub fn reserve(self, prompt: u64, expected_answer: u64, most_answer: u64) -> Tokens {
        match self {
            Self::Used => Tokens { input: prompt, output: expected_answer },
            Self::Reserved => Tokens { input: prompt, output: most_answer },
            Self::Larger => Tokens { input: prompt, output: most_answer.saturating_sub(prompt) },
        }
    }

    /// What stays counted of a reservation when the request took `used`.
    pub fn settle(self, reserved: Tokens, used: Tokens) -> Tokens {
        if self == Self::Used { used } else { reserved }
    }
}

/// How an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// By itself.
    Complete,
    /// At the cap of tokens.
    Length,
    /// By the provider's filter, or the model refused.
    Refused,
}

/// What the provider says a request took. What it does not say is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Tokens of its prompt.
    pub input: Option<u64>,
    /// Tokens of its answer, thinking included.
    pub output: Option<u64>,
}

impl Usage {
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The text; empty if there is none.
    pub text: String,
    /// How it ended.
    pub finish: Finish,
    /// There is reasoning beside the text.
    pub has_reasoning: bool,
    /// What it took.
    pub usage: Usage,
    /// Tokens of it that came before the answer, if the provider says.
    pub thought: Option<u64>,
    /// Tokens of the prompt that the provider had cached.
    pub cached_input: u64,
}

/// Why the body of a 2xx holds no answer.
#[derive(Debug, PartialEq, Eq)]
pub enum Unread {
    /// It carries an error: a 200 is no success at every provider.
    Said(Value),
    /// What is wrong with it, in words of ours.
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
