//! Waiting for a state, instead of sleeping and hoping.

use std::fmt::Debug;
use std::time::{Duration, Instant};

const PAUSE: Duration = Duration::from_millis(20);

/// Fetches a value until it is right, and returns it. There is at least one
/// fetch; after `timeout` it panics with `what` was awaited and the last value.
#[track_caller]
pub fn wait_until<T: Debug>(what: &str, timeout: Duration, mut fetch: impl FnMut() -> T, ok: impl Fn(&T) -> bool) -> T {
    let deadline = Instant::now() + timeout;
    loop {
        let value = fetch();
        if ok(&value) {
            return value;
        }
        if Instant::now() >= deadline {
            panic!("{what}: not within {timeout:?}; the last value is {value:?}");
        }
        std::thread::sleep(PAUSE);
    }
}
