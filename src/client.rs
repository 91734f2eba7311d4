//! The gateway's client: in sessions and in job workers, always on the main thread. It waits on the process' latch, so
//! cancel, termination and shutdown work while an answer is under way; a dead gateway is a closed connection.

use std::cell::Cell;
use std::io::{ErrorKind, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use llm_batch_core::task::MAX_SPEC_BYTES;
use llm_batch_gateway::outgoing::Outgoing;
use llm_batch_gateway::protocol::{FromGateway, Stream, ToGateway, decode, encode};
use pgrx::prelude::*;

use crate::error::{Error, Result};
use crate::process::{Socket, is_told_to_end, wait};
use crate::shared::{self, Process};
use crate::text::Text;
use crate::version;
use crate::worker::gateway::connect;

/// Time that a gateway may take to come up or come back.
const PATIENCE: Duration = Duration::from_secs(30);
/// Most time that a process of ours takes to come up for the first time, from when sessions can connect.
const START: Duration = Duration::from_secs(3);

/// Rows handed over and not yet answered (of a job: not yet written), above which no more are fetched; a page may go
/// beyond.
pub const WINDOW_ROWS: usize = 2_000;

/// Bytes of text in one message of rows, unless a single row has more. The gateway reads a message as a whole.
pub const MESSAGE_BYTES: usize = 256 * 1024;

/// Most connections of a session at the same time. Each call of a query that asks something else takes one, the gateway's
/// files are everybody's.
const MOST_OPEN: usize = 64;

/// Gateways that may be lost in vain until a statement fails.
const MOST_LOST: u32 = 5;

/// Bytes read at once.
const MOST_AT_ONCE: u64 = 256 * 1024;

thread_local! {
    static OPEN: Cell<usize> = const { Cell::new(0) };
}

/// A file of this process that Postgres counts with its own, so that together they keep to the limit.
struct File;

impl File {
    fn acquire() -> Result<Self> {
        let open = OPEN.get();
        // SAFETY: on the main thread. Closes a file that Postgres only keeps for later, if need be.
        if open < MOST_OPEN && unsafe { pg_sys::AcquireExternalFD() } {
            OPEN.set(open + 1);
            return Ok(Self);
        }
        Err(Error::new(
            PgSqlErrorCode::ERRCODE_INSUFFICIENT_RESOURCES,
            "this session asks too many different questions at the same time",
        )
        .detail(format!("Each takes a connection to the llm_batch gateway, and {open} are open."))
        .hint("Ask fewer of them in a query, or close cursors that ask."))
    }
}

impl Drop for File {
    fn drop(&mut self) {
        OPEN.set(OPEN.get().saturating_sub(1));
        // SAFETY: counts down what acquire() has counted up.
        unsafe { pg_sys::ReleaseExternalFD() };
    }
}

/// Most bytes of what opens a stream: a task of the largest size, and as much beside it.
const MOST_OPENING: usize = 2 * MAX_SPEC_BYTES;

/// A connection to the gateway.
pub struct Client {
    stream: UnixStream,
    _file: File,
    incoming: Vec<u8>,
    outgoing: Outgoing,
}

/// The result of a wait.
pub enum Received {
    Message(FromGateway),
    /// The time was up, or something else woke the process.
    Nothing,
    /// The connection is gone, most likely as the gateway ended. Rows without an answer have to be asked again.
    Lost,
}

/// Gateways that died one after the other before they had answered anything: perhaps of what they were asked, and each
/// takes what others wait for with it.
#[derive(Default)]
pub struct LostInVain(u32);

impl LostInVain {
    pub fn answered(&mut self) {
        self.0 = 0;
    }

    /// The connection is lost once more; an error if that is enough. A gateway that was told to end does not count.
    pub fn another(&mut self) -> Result<()> {
        self.0 += u32::from(!shared::was_gateway_told());
        if self.0 < MOST_LOST {
            return Ok(());
        }
        Err(Error::new(PgSqlErrorCode::ERRCODE_CONNECTION_FAILURE, "lost the connection to the llm_batch gateway")
            .detail(format!("It was lost {MOST_LOST} times, one after the other, before there was an answer."))
            .hint("If the process \"llm_batch gateway\" ended, the server's log says why."))
    }
}

/// Without the library in `shared_preload_libraries` there is no gateway.
pub fn check_loaded() -> Result<()> {
    if shared::is_ready() {
        return Ok(());
    }
    Err(Error::state("pg_llm_batch is not loaded")
        .detail("It needs background processes, which start with the server.")
        .hint("Add pg_llm_batch to shared_preload_libraries in postgresql.conf and restart the server."))
}

/// Postgres leaves a process out where `max_worker_processes` is too small, and says so in its log alone. One that is
/// about to start is waited for.
pub fn check_came_up(process: Process) -> Result<()> {
    let start = Instant::now();
    while !shared::has_come_up(process) {
        if start.elapsed() > START {
            let name = if process == Process::Gateway { "gateway" } else { "launcher" };
            return Err(Error::new(
                PgSqlErrorCode::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
                format!("the llm_batch {name} is not running"),
            )
            .detail("It could not start: no background worker was free.")
            .hint("Raise max_worker_processes and restart the server. Each running job needs one, and pg_llm_batch three more."));
        }
        wait(None, Some(Duration::from_millis(50)));
    }
    Ok(())
}

/// Checks the conditions that every function needs.
pub fn check_usable() -> Result<()> {
    check_loaded()?;
    check_here()
}

/// Refuses a standby, where nothing can be written and no process of ours runs, and an extension that is not of the
/// library's version.
pub fn check_here() -> Result<()> {
    if in_recovery() {
        return Err(Error::new(
            PgSqlErrorCode::ERRCODE_READ_ONLY_SQL_TRANSACTION,
            "pg_llm_batch cannot be used during recovery",
        )
        .detail("This server is a standby, where no process of pg_llm_batch runs.")
        .hint("Call the function on the primary, or promote this server."));
    }
    version::check()
}

pub fn in_recovery() -> bool {
    // SAFETY: reads shared state on the main thread.
    unsafe { pg_sys::RecoveryInProgress() }
}

/// Sends what has one answer, and waits for it; asks again if the gateway ends meanwhile.
pub fn ask<T>(
    stream: &Stream,
    message: &ToGateway,
    mut answer: impl FnMut(FromGateway) -> Result<Option<T>>,
) -> Result<T> {
    let open = || -> Result<Client> {
        let mut client = Client::open(stream)?;
        client.send(message)?;
        Ok(client)
    };
    let mut client = open()?;
    let mut lost = LostInVain::default();
    loop {
        match client.receive(Duration::from_secs(5))? {
            Received::Message(message) => {
                if let Some(answer) = answer(message)? {
                    return Ok(answer);
                }
            }
            Received::Nothing => {}
            Received::Lost => {
                lost.another()?;
                client = open()?;
            }
        }
    }
}

/// A message as it is sent.
fn frame(message: &ToGateway) -> Result<Vec<u8>> {
    let frame = encode(message).map_err(|e| Error::new(PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED, e))?;
    // The gateway hangs up on what is no text. Its length comes first.
    let body = frame.get(4..).unwrap_or_default();
    if std::str::from_utf8(body).is_err() {
        Text::new(body.to_vec()).checked()?;
    }
    Ok(frame)
}

impl Client {
    /// Connects. The gateway may be about to start, or to come back: that is waited for.
    pub fn connect() -> Result<Self> {
        check_loaded()?;
        check_came_up(Process::Gateway)?;
        let file = File::acquire()?;
        let start = Instant::now();
        loop {
            match connect() {
                Ok(stream) => {
                    return Ok(Self { stream, _file: file, incoming: Vec::new(), outgoing: Outgoing::default() });
                }
                Err(e) if start.elapsed() > PATIENCE || is_told_to_end() => {
                    return Err(Error::new(
                        PgSqlErrorCode::ERRCODE_CONNECTION_FAILURE,
                        "could not connect to the llm_batch gateway",
                    )
                    .detail(e.to_string())
                    .hint("See the server log for why the process \"llm_batch gateway\" is not running."));
                }
                Err(_) => wait(None, Some(Duration::from_millis(50))),
            }
        }
    }

    /// Connects, and says what will be asked.
    pub fn open(stream: &Stream) -> Result<Self> {
        let frame = frame(&ToGateway::Open(Box::new(stream.clone())))?;
        // It stays in the gateway's memory, with what users write anywhere: task, parameters, key.
        let bytes = frame.len();
        if bytes > MOST_OPENING {
            return Err(Error::new(
                PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
                format!("the task and its model have {bytes} bytes, and may have {MOST_OPENING}"),
            )
            .hint("Shorten the task, the parameters of the model, or the options of its server and user mapping."));
        }
        let mut client = Self::connect()?;
        client.outgoing.push(&frame);
        client.write();
        Ok(client)
    }

    /// Queues a message, before rows that have not begun to be written, and writes as much as goes at once; `receive`
    /// writes the rest. A lost connection is noticed by `receive` too.
    pub fn send(&mut self, message: &ToGateway) -> Result<()> {
        let frame = frame(message)?;
        match message {
            ToGateway::Items(_) => self.outgoing.push_rows(frame),
            _ => self.outgoing.push(&frame),
        }
        self.write();
        Ok(())
    }

    fn write(&mut self) -> bool {
        self.outgoing.write(&self.stream)
    }

    /// The next message; waits for one until the time is up or the latch is set, at most once.
    pub fn receive(&mut self, timeout: Duration) -> Result<Received> {
        for is_last in [false, true] {
            if let Some(message) = self.take()? {
                return Ok(Received::Message(message));
            }
            // The last messages on a closed connection are read.
            let is_there = (self.write(), self.read());
            if is_there != (true, true) {
                return Ok(self.take()?.map_or(Received::Lost, Received::Message));
            }
            if let Some(message) = self.take()? {
                return Ok(Received::Message(message));
            }
            if !is_last {
                if timeout.is_zero() {
                    break;
                }
                let socket = Socket { descriptor: self.stream.as_raw_fd(), for_writing: !self.outgoing.is_empty() };
                wait(Some(socket), Some(timeout));
            }
        }
        Ok(Received::Nothing)
    }

    /// Returns true if nothing has come, and the gateway is there.
    pub fn is_quiet(&mut self) -> Result<bool> {
        Ok(matches!(self.receive(Duration::ZERO)?, Received::Nothing))
    }

    fn take(&mut self) -> Result<Option<FromGateway>> {
        match decode(&mut self.incoming) {
            Ok(Some(FromGateway::Full(full))) => Err(Error::from_full(full)),
            decoded => decoded.map_err(|e| Error::new(PgSqlErrorCode::ERRCODE_PROTOCOL_VIOLATION, e)),
        }
    }

    /// Takes what has come, a part of it at a time.
    fn read(&mut self) -> bool {
        match (&self.stream).take(MOST_AT_ONCE).read_to_end(&mut self.incoming) {
            // Fewer bytes mean that the other end has closed.
            Ok(n) => n as u64 == MOST_AT_ONCE,
            Err(e) => e.kind() == ErrorKind::WouldBlock,
        }
    }
}
