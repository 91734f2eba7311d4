//! Failure points of the main threads, see the gateway's `failure.rs`.

/// A place where a test may have the process fail; nothing in other builds.
#[cfg(feature = "failure_points")]
macro_rules! failure_point {
    ($name:literal) => {
        $crate::failure::pass($name, "")
    };
    ($name:literal, $text:expr) => {
        $crate::failure::pass($name, $text)
    };
}

#[cfg(not(feature = "failure_points"))]
macro_rules! failure_point {
    ($name:literal) => {};
    ($name:literal, $text:expr) => {
        let _ = $text;
    };
}

pub(crate) use failure_point;

/// Does what a test wants at this point. A SIGTERM is heeded here, and not at the next check for interrupts.
#[cfg(feature = "failure_points")]
pub fn pass(name: &str, text: &str) {
    if let Some(action) = llm_batch_gateway::failure::pass(name, text) {
        if action == "error" {
            pgrx::error!("failure point {name}");
        }
        pgrx::check_for_interrupts!();
    }
}
