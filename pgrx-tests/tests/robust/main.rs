//! In the middle of a job: nobody has to wait for it, what others write stays, and everything can be stopped.

#[path = "../common/mod.rs"]
mod common;

mod changes;
mod others;
mod stops;

use common::Bed;

/// Counts rows by how often they were asked: once, twice, more often.
fn asked(bed: &Bed) -> (usize, usize, usize) {
    let stats = bed.provider.stats();
    let count = |ok: fn(u32) -> bool| stats.rows.values().filter(|r| ok(r.asked)).count();
    (count(|n| n == 1), count(|n| n == 2), count(|n| n > 2))
}
