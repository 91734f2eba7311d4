//! The limits by name, and the numbers kept for each.

/// What can be limited. In this order limits are checked, and the first that is
/// full is named in the refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Limit {
    Tokens,
    Input,
    Output,
    Requests,
}

impl Limit {
    pub(crate) const ALL: [Self; 4] = [Self::Tokens, Self::Input, Self::Output, Self::Requests];
}

/// What is taken of each limit, by `Limit as usize`.
pub(crate) type Amounts = [u64; 4];

/// The most there is of each limit, by `Limit as usize`; `None` is no limit.
pub(crate) type Caps = [Option<u64>; 4];
