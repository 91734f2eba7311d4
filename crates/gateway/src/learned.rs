//! What was learnt about a model's server: what it refuses, how its tokens and its answers relate to ours.

use llm_batch_core::forms::{Form, Forms};
use llm_batch_core::options::{Options, ServiceTier};
use llm_batch_core::pack::Ratio;
use llm_batch_core::thought::Thinking;
use llm_batch_core::trouble::Parameter;

use crate::protocol::Stream;
use crate::sizes::{ENOUGH_ANSWERS, Sizes};

/// Tokens of answer beyond what is expected, at first.
pub const SPARE_ANSWER_TOKENS: u64 = 16;
/// Most that grows to; a request's tokens and what the model allows bound it further.
pub const MOST_SPARE_ANSWER_TOKENS: u64 = 131_072;
/// The factor by which a cap grows that was too small.
const GROWTH: u64 = 4;

/// Answers after which their times are known; and the time (ms) that is added to twice the longest.
const ENOUGH_TIMES: u32 = 8;
const SPARE_TIME: u64 = 1_000;

/// The forms that a server was found to refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Learned {
    /// Forms of `response_format`; what its answers in them are like is each task's matter.
    pub forms: Forms,
    /// Messages of the system: the instructions go to the head of the user's.
    pub no_system_role: bool,
    /// The cap of an answer must be called `max_completion_tokens`.
    pub max_completion_tokens: bool,
    /// Parameters of how the model draws its words, such as `temperature`: they are left out.
    pub no_sampling: bool,
    /// The tier "flex": tasks that may are asked without it.
    pub no_flex: bool,
    /// Tokens of answer beyond what is expected; grows when answers are cut off.
    pub spare_answer_tokens: u64,
    /// The largest cap of an answer that is not known to be refused.
    pub most_answer_tokens: u64,
    /// Most tokens of a request, prompt and cap, as the server said.
    pub most_request_tokens: u64,
    /// Most choices of a decision that are not known to be refused; none where there are no decisions.
    pub most_choices: usize,
}

impl Learned {
    /// The form in which a task is asked.
    pub fn form(&self, options: &Options) -> Form {
        self.forms.next(options.answer_shape, options.structured_output)
    }

    /// A parameter of a request was refused that was written by what had been learnt `before`, for a task with these
    /// options. Returns true if it can be written in another way. Requests that were under way together are refused
    /// together.
    pub fn refused(&mut self, parameter: Parameter, before: Self, options: &Options) -> bool {
        match parameter {
            Parameter::MaxTokens => {
                self.max_completion_tokens = true;
                !before.max_completion_tokens
            }
            Parameter::SystemRole => {
                self.no_system_role = true;
                !before.no_system_role
            }
            Parameter::Sampling => {
                self.no_sampling = true;
                !before.no_sampling
            }
            // Others may not pay more.
            Parameter::Tier if options.service_tier != ServiceTier::FlexOrDefault => false,
            Parameter::Tier => {
                self.no_flex = true;
                !before.no_flex
            }
            Parameter::ResponseFormat => {
                let form = before.form(options);
                if form == Form::Plain {
                    return false;
                }
                self.forms.give_up(form);
                self.forms.left(options.answer_shape, options.structured_output).next().is_some()
            }
        }
    }

    /// An answer of at most `cap` tokens was cut off there, or not. Those that were under way together with the same cap
    /// are cut off together, and count once.
    pub fn observe_end(&mut self, is_cut: bool, cap: u64) {
        let now = &mut self.spare_answer_tokens;
        if is_cut {
            *now = cap.saturating_mul(GROWTH).clamp(*now, MOST_SPARE_ANSWER_TOKENS.max(*now));
        } else {
            *now = (*now - *now / 64).max(SPARE_ANSWER_TOKENS);
        }
    }
}

/// The relation of a server's tokens and answers to what we count and expect.
#[derive(Debug, Clone, Copy, Default)]
pub struct Measured {
    /// Tokens of prompts as it counts them, for each that we count.
    pub prompt: Ratio,
    /// A prompt has been measured.
    pub has_prompt: bool,
    /// Its thinking before it answers.
    pub thinking: Thinking,
    /// The sizes of this task's answers. In a lane: those of the task that was answered last.
    pub sizes: Sizes,
    /// Bytes of an answer for each number of its vectors, if the last request for some was answered.
    pub number: Option<f64>,
}

impl Measured {
    /// Takes the prompt of an answer into account.
    pub fn observe(&mut self, expected: u64, actual: u64) {
        self.prompt.observe(expected, actual);
        self.has_prompt = true;
    }

    /// Tokens that an answer will have where the mean over all answers has so many.
    pub fn usual_answer(&self, mean: f64) -> u64 {
        let (means, actual) = self.sizes.means;
        (if means > 0.0 { mean * actual / means } else { mean }).round() as u64 + self.thinking.usual()
    }

    /// Bytes of each number of a vector in the next answer, where that was measured: other encodings are asked for in turn
    /// where a server refuses base64.
    pub fn number(&self, learned: Learned, stream: &Stream) -> Option<f64> {
        self.number.filter(|_| learned.form(&stream.task.options) == Form::Object)
    }

    /// Tokens of an answer at most, as answers have been so far, without what is thought before; by our count they are so
    /// many.
    pub fn expected_answer(&self, counted: u64) -> u64 {
        let expected = self.sizes.answer().apply(counted);
        if self.sizes.seen < ENOUGH_ANSWERS { expected * 2 } else { expected }
    }

    /// The cap of an answer of so many tokens by our count: loose until answers have been seen.
    pub fn most_answer(&self, counted: u64, spare: u64) -> u64 {
        let expected = self.expected_answer(counted);
        let looser = if self.sizes.seen < ENOUGH_ANSWERS { 48 } else { expected / 4 };
        expected + looser + self.spared(spare)
    }

    /// The cap that an answer of so many tokens by our count needs, with what is thought before it.
    pub fn least_cap(&self, counted: u64) -> u64 {
        self.expected_answer(counted) + self.thinking.reserved()
    }

    /// Tokens of a cap beyond what is expected of the answer itself.
    pub fn spared(&self, spare: u64) -> u64 {
        spare.max(self.thinking.room())
    }

    /// Tokens of a prompt at the worst: a measured relation is good to some percent, a guessed one to a factor.
    pub fn most_prompt(&self, counted: u64) -> u64 {
        let expected = self.prompt.apply(counted);
        16 + if self.has_prompt { expected + expected / 10 } else { expected * 2 }
    }
}

/// The record of a service that a model is asked for.
#[derive(Debug, Default)]
pub struct Record {
    pub measured: Measured,
    /// The number of answers, and the longest time (ms) that one took of late.
    slowest: (u32, u64),
    /// When (ms) a request was last answered with a 2xx.
    pub last_success: Option<u64>,
}

impl Record {
    /// An answer took so long (ms).
    pub fn took(&mut self, ms: u64) {
        let (count, slowest) = self.slowest;
        self.slowest = (count.saturating_add(1), ms.max(slowest - slowest / 256));
    }

    /// After which time (ms) without an answer another model is asked, if enough answers were seen.
    pub fn patience(&self) -> Option<u64> {
        let (count, slowest) = self.slowest;
        (count >= ENOUGH_TIMES).then(|| slowest.saturating_mul(2).saturating_add(SPARE_TIME))
    }
}
