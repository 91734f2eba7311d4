//! The one error type of this crate: bad input from a user, worded for that user.

use std::fmt;

/// An error in a task or an option, with a hint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// One sentence in Postgres style: lower case, no full stop.
    pub message: String,
    /// The action that a user can take, as a sentence.
    pub hint: Option<String>,
    /// Nothing is wrong but its size.
    pub is_too_large: bool,
}

impl Error {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None, is_too_large: false }
    }

    pub(crate) fn too_large(message: impl Into<String>) -> Self {
        Self { is_too_large: true, ..Self::new(message) }
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}
