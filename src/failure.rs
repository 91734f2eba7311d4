//! Failure points of the main threads, see the gateway's `failure.rs`.

pub use llm_batch_gateway::failure_point;

/// Does what a test wants at this point. A SIGTERM takes effect here, and not at the next check for interrupts.
#[cfg(feature = "failure_points")]
pub fn pass(name: &str, text: &str) {
    if let Some(action) = llm_batch_gateway::failure::pass(name, text) {
        if action == "error" {
            pgrx::error!("failure point {name}");
        }
        pgrx::check_for_interrupts!();
    }
}
