//! Places in which no function of ours asks a model: while a job, or its preparation, reads or writes rows. It would
//! wait for the network inside a transaction, and pay for each look at a row. Calls that can be seen are refused
//! beforehand; those inside a function's body can't be.

use std::cell::Cell;

use pgrx::prelude::*;

use crate::error::{Error, Result};

thread_local! {
    static IS_REFUSED: Cell<bool> = const { Cell::new(false) };
}

/// Refuses all asking in this process from now on: it is a job's.
pub fn refuse() {
    IS_REFUSED.set(true);
}

/// Nobody asks while `f` runs.
pub fn refused<T>(f: impl FnOnce() -> T) -> T {
    struct Before(bool);
    impl Drop for Before {
        fn drop(&mut self) {
            IS_REFUSED.set(self.0);
        }
    }
    let _before = Before(IS_REFUSED.replace(true));
    f()
}

/// Checks whether a model can be asked here.
pub fn check() -> Result<()> {
    let refuse = |message: &str| Error::new(PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED, message);
    if IS_REFUSED.get() {
        return Err(refuse("a model can't be asked while a job reads or writes rows")
            .detail("A function that the input, the filter, a trigger or a policy calls would ask it.")
            .hint("Let another job fill a column with the answers of the model, and read that column."));
    }
    // SAFETY: read on the main thread.
    if unsafe { pg_sys::ParallelWorkerNumber } >= 0 {
        // The leader's state is not known here.
        return Err(refuse("a model can't be asked by a parallel worker")
            .hint("Declare the function that asks it PARALLEL RESTRICTED."));
    }
    Ok(())
}
