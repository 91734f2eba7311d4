//! The pure part of pg_llm_batch: what to ask, how to pack it, how to read what comes back, how much may be sent.
//!
//! Nothing here reads a clock, draws a random number or does I/O: the caller passes them in. So every rule can be
//! tested by properties and under a virtual clock.
#![deny(missing_docs)]
#![forbid(unsafe_code)]

pub mod answer;
pub mod breaker;
pub mod cheaper;
pub mod choices;
pub mod class;
pub mod codes;
pub mod concurrency;
pub mod dialect;
mod error;
pub mod flex;
pub mod forms;
pub mod headers;
pub mod limiter;
mod members;
pub mod options;
pub mod pack;
mod parts;
pub mod patience;
pub mod prompt;
pub mod quoted;
pub mod remedy;
pub mod request;
pub mod route;
pub mod split;
pub mod task;
pub mod thinking;
pub mod thought;
pub mod trouble;
pub mod url;
pub mod vector;

pub use error::Error;

/// Counts the tokens of a text. The vocabulary (some tens of megabytes of tables) is loaded by the gateway alone.
pub type CountTokens<'a> = &'a dyn Fn(&str) -> usize;
