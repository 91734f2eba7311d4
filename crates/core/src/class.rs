//! The classes of trouble with a request.

/// A class of trouble. Only `Rejected` and what comes with a 2xx is held against the rows of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// Too much at once: wait. The wait in milliseconds, if the provider said.
    Rate(Option<u64>),
    /// There is no capacity for a request at the tier "flex", which says nothing of others. The wait in milliseconds, if the
    /// provider said.
    NoCapacity(Option<u64>),
    /// The request is larger than the model's context: send less in one.
    TooLarge,
    /// The request is larger than a limit of the account, by what is said: send less in one.
    OverLimit,
    /// The endpoint refuses this parameter of the request: do without.
    Unsupported(Parameter),
    /// The key is wrong or lacks the right (401, 403).
    Auth,
    /// The account's money is gone.
    Spend,
    /// The quota of a day or month is used up. Milliseconds until it is renewed, if the provider said.
    Quota(Option<u64>),
    /// The model or the path is not known (404).
    NotFound,
    /// The provider's filter refuses the content.
    Filtered,
    /// The request is refused for another reason (400, 413, 422): it may be one of its rows.
    Rejected,
    /// The address does not serve such requests (a redirect, 405, …).
    Misplaced,
    /// The cap of the answer is larger than the model allows.
    AnswerCap,
    /// There is no answer since its cap did not suffice for what the model thinks before it.
    CutOff,
    /// The provider is overloaded or broken (5xx, 408, 409, a 2xx that is no answer), or not reached: try later. The
    /// wait in milliseconds, if it said.
    Overload(Option<u64>),
}

impl Trouble {
    /// Makes trouble pass where there was an answer before: an address or a model that is gone now comes back, as a
    /// proxy's does.
    pub fn may_pass(&mut self) {
        if matches!(self, Self::NotFound | Self::Misplaced) {
            *self = Self::Overload(None);
        }
    }
}

/// A parameter of a request that a server may refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parameter {
    /// `response_format` in this form, or at all.
    ResponseFormat,
    /// A message of the system.
    SystemRole,
    /// `max_tokens`, where `max_completion_tokens` is wanted.
    MaxTokens,
    /// A parameter of the user's for how the model draws its words, such as `temperature`.
    Sampling,
    /// The tier "flex".
    Tier,
}
