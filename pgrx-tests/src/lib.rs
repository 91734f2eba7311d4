//! Throwaway Postgres clusters for tests that start, stop, kill and restart them.
//!
//! Linux only: processes are found through `/proc`. Everything here panics when
//! it fails, as a test does, with the end of the server's log where there is one.
//!
//! ```no_run
//! use pg_llm_batch_e2e::Cluster;
//!
//! let mut cluster = Cluster::builder("example").conf("work_mem", "1MB").start();
//! cluster.connect("postgres").batch_execute("CREATE TABLE t (a int)").unwrap();
//! cluster.kill9();
//! cluster.start();
//! cluster.connect("postgres").batch_execute("TABLE t").unwrap();
//! ```

#![deny(missing_docs)]

mod builder;
mod cluster;
mod copies;
mod failure;
mod install;
mod process;
mod wait;

pub use builder::Builder;
pub use cluster::Cluster;
pub use copies::{extension_dir, installed};
pub use process::{go_on, stop};
pub use wait::wait_until;
