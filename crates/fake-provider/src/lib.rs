//! An OpenAI-compatible chat completions endpoint for tests and benchmarks.
//!
//! It enforces limits over an exact rolling window or as token buckets, bills
//! tokens as a provider does, waits as a model does, and fails on demand. It
//! knows the prompt of `pg_llm_batch` (see `prompt.rs`): row texts carry markers
//! such as `#r000123:billing#`, so it can give the right answer and keep count,
//! row by row, of what was asked and what was answered and paid for.
//!
//! The server runs on a thread of its own; the tests that use it stay
//! synchronous.
//!
//! ```
//! use llm_fake_provider::{Config, FakeProvider, Fault};
//!
//! let provider = FakeProvider::start(Config {
//!     tokens_per_window: Some(10_000),
//!     ..Config::default()
//! })?;
//! provider.script([Some(Fault::Http500), None]);
//! assert!(provider.base_url().ends_with("/v1"));
//! assert_eq!(provider.stats().requests, 0);
//! # Ok::<(), std::io::Error>(())
//! ```

#![deny(missing_docs)]

mod amounts;
mod answer;
mod bucket;
mod chat;
mod config;
mod control;
mod date;
mod decisions;
mod embeddings;
mod fault;
mod headers;
mod http;
mod kinds;
mod limits;
mod mean;
mod meter;
mod network;
mod other;
mod prefix;
mod prompt;
mod reply;
mod request;
mod server;
mod state;
mod stats;
mod tokens;
mod values;
mod window;
mod wire;

pub use chat::probability;
pub use config::{Config, Latency, Limiter, OtherClient, RateHeaders, Reserve, RetryAfter};
pub use embeddings::embedding;
pub use fault::Fault;
pub use kinds::kinds;
pub use network::{CA, OTHER_CA, TlsFront, private_address};
pub use server::FakeProvider;
pub use stats::{Row, Stats};
