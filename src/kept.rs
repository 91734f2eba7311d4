//! The limits that a gateway knew when it ended, in shared memory, for the next one. After a crash of the server shared
//! memory is new, and nothing is known.

use llm_batch_gateway::{KeptLane, MOST_LANES, Stock};
use pgrx::prelude::*;
use pgrx::{PGRXSharedMemory, PgLwLock, pg_shmem_init};

#[derive(Clone, Copy)]
struct Table {
    /// When (ms of the machine's monotonic clock) the gateway ended; 0: none has.
    at: u64,
    known_for: u64,
    lanes: [Option<KeptLane>; MOST_LANES],
}

// SAFETY: plain data without pointers.
unsafe impl PGRXSharedMemory for Table {}

impl Default for Table {
    fn default() -> Self {
        Self { at: 0, known_for: 0, lanes: [None; MOST_LANES] }
    }
}

// SAFETY: the name is this library's own.
static TABLE: PgLwLock<Table> = unsafe { PgLwLock::new(c"llm_batch limits") };

pub fn init() {
    pg_shmem_init!(TABLE);
}

/// A clock that all processes of the machine share, and that nobody sets.
fn now() -> u64 {
    // SAFETY: fills a structure of our own; a clock that does not exist would leave it at zero.
    let time = unsafe {
        let mut time: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time);
        time
    };
    time.tv_sec as u64 * 1000 + time.tv_nsec as u64 / 1_000_000
}

/// A gateway ends.
pub fn put(stock: &Stock) {
    let mut table = TABLE.exclusive();
    (table.at, table.known_for) = (now().max(1), stock.known_for);
    let mut lanes = stock.lanes.iter();
    for place in &mut table.lanes {
        *place = lanes.next().copied();
    }
}

/// The notes of the last gateway.
pub fn get() -> Stock {
    let table = TABLE.share();
    if table.at == 0 {
        return Stock::default();
    }
    let stock = Stock { known_for: table.known_for, lanes: table.lanes.iter().flatten().copied().collect() };
    stock.later(now().saturating_sub(table.at))
}
