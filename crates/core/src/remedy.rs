//! The remedy for a request that failed.

use serde::{Deserialize, Serialize};

use crate::trouble::{Parameter, Trouble};

/// Waits (ms) that are longer stop the streams; shorter ones are sat out.
const LONGEST_WAIT: u64 = 120_000;

/// Why a stream can't go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// The key is wrong or lacks the right.
    Auth,
    /// The account's money is gone.
    Spend,
    /// A quota of a day or month is used up.
    Quota,
    /// The provider is not reached, or broken.
    ProviderDown,
    /// The model or the path is not known.
    NotFound,
    /// The provider refuses the request.
    Rejected,
    /// No answer to the task has a valid row, however it is asked.
    NoAnswers,
    /// `llm_batch.enabled` is off.
    Disabled,
}

/// The end of streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    /// Why.
    pub reason: StopReason,
    /// All streams to the account and model end, not only those like the request's.
    pub is_for_all: bool,
    /// When to try again, ms from now, if that is known.
    pub retry_after: Option<u64>,
}

impl End {
    /// The end of the streams like the request's.
    pub fn of_group(reason: StopReason) -> Self {
        Self { reason, is_for_all: false, retry_after: None }
    }

    /// The end of all streams to the account and model.
    pub fn of_all(reason: StopReason, retry_after: Option<u64>) -> Self {
        Self { reason, is_for_all: true, retry_after }
    }
}

/// The facts about a request that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// Single rows of several requests are refused and none was ever accepted: the request is wrong, not a row.
    pub is_wrong: bool,
    /// The cap of its answer, tokens.
    pub cap: u64,
    /// The cap might be larger.
    pub can_grow: bool,
}

/// The remedy for a request that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remedy {
    /// The streams end.
    Stop(End),
    /// Nothing is sent for a while. The wait in milliseconds, if the provider said.
    Wait(Option<u64>),
    /// Nothing is sent at the tier "flex" for a while. The wait in milliseconds, if the provider said.
    NoCapacity(Option<u64>),
    /// The cap of the answer grows.
    LargerCap,
    /// The cap of the answer shrinks.
    SmallerCap,
    /// The next request is smaller. By a limit of the account, or else by the model's context.
    SmallerRequest {
        /// By a limit of the account.
        is_limit: bool,
    },
    /// The request is written without this parameter.
    Without(Parameter),
    /// The rows go into smaller requests, until the row is alone that is refused.
    FindRow,
    /// The request is sent again later. The wait in milliseconds, if the provider said.
    Again(Option<u64>),
}

impl Remedy {
    /// The remedy for a trouble.
    pub fn of(trouble: &Trouble, known: Known) -> Self {
        match *trouble {
            Trouble::Rate(Some(wait)) if wait > LONGEST_WAIT => Self::Stop(End::of_all(StopReason::Quota, Some(wait))),
            Trouble::Quota(wait) => Self::Stop(End::of_all(StopReason::Quota, wait)),
            Trouble::Spend => Self::Stop(End::of_all(StopReason::Spend, None)),
            Trouble::Auth => Self::Stop(End::of_group(StopReason::Auth)),
            Trouble::NotFound => Self::Stop(End::of_group(StopReason::NotFound)),
            Trouble::Misplaced => Self::Stop(End::of_group(StopReason::Rejected)),
            Trouble::Rejected | Trouble::CutOff if known.is_wrong => Self::Stop(End::of_group(StopReason::Rejected)),
            Trouble::Rate(wait) => Self::Wait(wait),
            Trouble::NoCapacity(wait) => Self::NoCapacity(wait),
            Trouble::CutOff if known.can_grow => Self::LargerCap,
            Trouble::AnswerCap if known.cap > 1 => Self::SmallerCap,
            Trouble::TooLarge => Self::SmallerRequest { is_limit: false },
            Trouble::OverLimit => Self::SmallerRequest { is_limit: true },
            Trouble::Unsupported(parameter) => Self::Without(parameter),
            Trouble::Filtered | Trouble::Rejected | Trouble::CutOff | Trouble::AnswerCap => Self::FindRow,
            Trouble::Overload(wait) => Self::Again(wait),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PLAIN: Known = Known { is_wrong: false, cap: 64, can_grow: false };

    fn any_trouble() -> impl Strategy<Value = Trouble> {
        let waits = proptest::option::of(0..1_000_000u64);
        prop_oneof![
            waits.clone().prop_map(Trouble::Rate),
            waits.clone().prop_map(Trouble::Quota),
            waits.clone().prop_map(Trouble::NoCapacity),
            waits.prop_map(Trouble::Overload),
            proptest::sample::select(&[
                Parameter::ResponseFormat,
                Parameter::SystemRole,
                Parameter::MaxTokens,
                Parameter::Sampling,
                Parameter::Tier
            ])
            .prop_map(Trouble::Unsupported),
            proptest::sample::select(&[
                Trouble::TooLarge,
                Trouble::OverLimit,
                Trouble::Auth,
                Trouble::Spend,
                Trouble::NotFound,
                Trouble::Filtered,
                Trouble::Rejected,
                Trouble::Misplaced,
                Trouble::AnswerCap,
                Trouble::CutOff,
            ]),
        ]
    }

    #[test]
    fn a_long_wait_stops_all_and_a_short_one_is_sat_out() {
        let of = |wait| Remedy::of(&Trouble::Rate(wait), PLAIN);
        assert_eq!((of(None), of(Some(LONGEST_WAIT))), (Remedy::Wait(None), Remedy::Wait(Some(LONGEST_WAIT))));
        assert_eq!(of(Some(LONGEST_WAIT + 1)), Remedy::Stop(End::of_all(StopReason::Quota, Some(LONGEST_WAIT + 1))));
    }

    #[test]
    fn a_cap_grows_or_shrinks_while_it_can_and_then_a_row_is_looked_for() {
        let of = |trouble, cap, can_grow| Remedy::of(&trouble, Known { cap, can_grow, ..PLAIN });
        assert_eq!(of(Trouble::CutOff, 64, true), Remedy::LargerCap);
        assert_eq!(of(Trouble::CutOff, 64, false), Remedy::FindRow);
        assert_eq!(of(Trouble::AnswerCap, 2, true), Remedy::SmallerCap);
        assert_eq!(of(Trouble::AnswerCap, 1, true), Remedy::FindRow);
    }

    proptest! {
        #[test]
        fn streams_end_for_what_no_request_of_theirs_can_mend(
            trouble in any_trouble(),
            is_wrong: bool,
            cap in 0..200_000u64,
            can_grow: bool,
        ) {
            let remedy = Remedy::of(&trouble, Known { is_wrong, cap, can_grow });
            let Remedy::Stop(end) = remedy else {
                prop_assert!(!matches!(
                    trouble,
                    Trouble::Quota(_) | Trouble::Spend | Trouble::Auth | Trouble::NotFound | Trouble::Misplaced
                ));
                return Ok(());
            };
            // Trouble of the account ends all of its streams; trouble of a key or a task ends only the streams like it.
            let is_of_account = matches!(trouble, Trouble::Rate(_) | Trouble::Quota(_) | Trouble::Spend);
            prop_assert_eq!(end.is_for_all, is_of_account);
            prop_assert!(end.retry_after.is_none() || is_of_account);
            // A refusal is the request's fault only if no row was ever accepted.
            prop_assert!(is_wrong || !matches!(trouble, Trouble::Rejected | Trouble::CutOff));
            // Nothing that passes by itself ends a stream.
            prop_assert!(!matches!(
                trouble,
                Trouble::Overload(_) | Trouble::NoCapacity(_) | Trouble::TooLarge | Trouble::OverLimit | Trouble::Unsupported(_)
                    | Trouble::Filtered | Trouble::AnswerCap
            ));
        }
    }
}
