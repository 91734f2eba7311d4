//! Causes of failed writes that rows may share.

use std::collections::BTreeSet;
use std::fmt;

use pgrx::PgSqlErrorCode as Code;

use crate::error::sqlstate;

/// A cause that may be at fault, beside the row.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Cause {
    /// A label.
    Label(String),
    /// The task's checks or the columns' types, and the class of what they say.
    Refused(String),
    /// The error's SQLSTATE, if values are not labels.
    State(String),
}

impl Cause {
    /// The cause for an answer whose UPDATE raised. `label`: its label, if it is one.
    pub fn of(label: Option<&String>, code: Code) -> Self {
        label.map_or_else(|| Self::State(sqlstate(code)), |label| Self::Label(label.clone()))
    }

    /// Returns true if a row that has these values would have met it too.
    pub fn is_refuted(&self, written: &BTreeSet<String>) -> bool {
        match self {
            Self::Label(label) => written.contains(label),
            Self::State(_) | Self::Refused(_) => !written.is_empty(),
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Label(label) => write!(f, "label \"{label}\""),
            Self::Refused(class) => write!(f, "{class}"),
            Self::State(state) => write!(f, "error {state}"),
        }
    }
}
