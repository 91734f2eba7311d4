//! Failure points, which builds with the feature `failure_points` have: places where a process of ours fails.

use std::fs;
use std::path::PathBuf;

use crate::Cluster;
use crate::install::give_to_server;

impl Cluster {
    /// Has the next processes that come to `point` fail there, so many times. `action` is `error`, `panic`, `term` (it
    /// sends itself a SIGTERM), `kill`, or `stop` (it waits for a SIGCONT).
    #[track_caller]
    pub fn fail_at(&self, point: &str, action: &str, times: u32) {
        self.fail_at_text(point, action, times, "");
    }

    /// The same for a text that contains `part`.
    #[track_caller]
    pub fn fail_at_text(&self, point: &str, action: &str, times: u32, part: &str) {
        let (dir, file) = (self.data_dir().join("failure_points"), self.failure(point));
        fs::create_dir_all(&dir).expect("the data directory can be written");
        give_to_server(&dir);
        // Whole or not at all.
        let new = dir.join(format!("{point}.new"));
        fs::write(&new, format!("{action} {times} {part}")).expect("the directory was just made");
        give_to_server(&new);
        fs::rename(&new, &file).expect("the file was just written");
    }

    /// Returns true if all failures wanted at `point` have happened.
    pub fn has_failed_at(&self, point: &str) -> bool {
        !self.failure(point).exists()
    }

    fn failure(&self, point: &str) -> PathBuf {
        self.data_dir().join("failure_points").join(point)
    }
}
