//! The limits by name, and the numbers kept for each.

/// The amounts that can have a limit. Limits are checked in this order, and a refusal
/// names the first that is full.
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

/// An amount of each limit, by `Limit as usize`.
pub(crate) type Amounts = [u64; 4];

/// The size of each limit, by `Limit as usize`. `None` is no limit.
pub(crate) type Caps = [Option<u64>; 4];
