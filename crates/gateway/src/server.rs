//! The socket: who may connect, frames in, frames out.

use std::cell::{Cell, RefCell};
use std::os::unix::net::UnixListener;
use std::rc::Rc;
use std::sync::mpsc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::spawn_local;

use crate::Settings;
use crate::dispatch::{Launch, PROBE_IDS, PROBE_READ_TOKENS, Probe, State, disabled};
use crate::egress::{Answer, Clients, HttpClient};
use crate::failure_point;
use crate::frames::Frames;
use crate::kept::Kept;
use crate::places::Places;
use crate::protocol::{Endpoint, FromGateway, Item, MAX_FRAME, Stream, ToGateway, announced, decode, encode};
use crate::request::{self, Answered, Question};
use crate::ruler::Line;

/// Time for which a client may be silent in the midst of a message, and before the first.
const SILENCE: Duration = Duration::from_secs(30);

/// Time that a client has to read why its connection is closed.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Rows, and bytes of text, that are taken in of one client before others have their turn.
const TURN: (usize, usize) = (32, 4 << 10);

/// The interval at which a client that has to wait is checked for having left.
const LOOK: Duration = Duration::from_millis(500);

/// Bytes of a message that may say to withdraw rows or what a budget allows, and holds none.
const MOST_CONTROL: usize = 128;

/// Bytes that a client's buffer may keep while nothing comes.
const MOST_KEPT: usize = 64 << 10;

/// Bytes of a text whose tokens take long to count.
const LONG: usize = 16 << 10;

/// The state that all tasks share. All of them run on one thread.
struct Shared {
    state: RefCell<State>,
    /// Something changed: look again what can be sent.
    changed: Notify,
    /// Memory became free.
    room: Notify,
    /// Long texts whose tokens are counted at the same time. As many threads as there are clients would leave too little of
    /// the machine for anybody else.
    counting: Semaphore,
    clients: RefCell<Clients>,
    kept: Kept,
    /// The user of this process. Clients must have the same.
    uid: u32,
    /// A task has panicked.
    broken: Cell<bool>,
}

impl Shared {
    fn now(&self) -> u64 {
        self.kept.now()
    }
}

/// Runs the gateway until the sender of `settings` is dropped.
pub async fn run(
    listener: UnixListener,
    (tls, places): (rustls::ClientConfig, Places),
    mut settings: watch::Receiver<Settings>,
    kept: Kept,
    log: mpsc::Sender<String>,
) {
    let Ok(listener) = tokio::net::UnixListener::from_std(listener) else { return };
    // The other end of a pair of our own is who we are.
    let Ok(own) = UnixStream::pair().and_then(|(end, _)| end.peer_cred()) else { return };
    let clients = Clients::new(tls, settings.borrow().memory, places.connections);
    let state = State::new(settings.borrow().clone(), places, kept.clone(), log);
    let shared = Rc::new(Shared {
        state: RefCell::new(state),
        changed: Notify::new(),
        room: Notify::new(),
        counting: Semaphore::new(std::thread::available_parallelism().map_or(1, |cores| cores.get().div_ceil(2))),
        clients: RefCell::new(clients),
        kept,
        uid: own.uid(),
        broken: Cell::new(false),
    });
    spawn(&shared, accept(Rc::clone(&shared), listener));
    loop {
        let (launches, wake) = shared.state.borrow_mut().pump(shared.now());
        for launch in launches {
            spawn(&shared, carry_out(Rc::clone(&shared), launch));
        }
        shared.room.notify_waiters();
        // Better no gateway than one that has lost track of a row: the process ends, and another one comes.
        if shared.broken.get() {
            return;
        }
        let pause =
            wake.map_or(Duration::from_secs(60), |at| Duration::from_millis(at.saturating_sub(shared.now()).max(1)));
        tokio::select! {
            () = shared.changed.notified() => {}
            () = tokio::time::sleep(pause) => {}
            change = settings.changed() => {
                if change.is_err() {
                    return;
                }
                let new = settings.borrow_and_update().clone();
                shared.clients.borrow().set_memory(new.memory);
                shared.state.borrow_mut().configure(new);
                shared.room.notify_waiters();
            }
        }
    }
}

async fn accept(shared: Rc<Shared>, listener: tokio::net::UnixListener) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => spawn(&shared, serve(Rc::clone(&shared), stream)),
            // Out of files, which those of others in the process may use up: clients wait until some are free.
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// Runs a task beside the others. A panic in it is noticed.
fn spawn(shared: &Rc<Shared>, task: impl Future<Output = ()> + 'static) {
    let shared = Rc::clone(shared);
    let handle = spawn_local(task);
    spawn_local(async move {
        if handle.await.is_err_and(|e| e.is_panic()) {
            shared.broken.set(true);
            shared.changed.notify_one();
        }
    });
}

async fn carry_out(shared: Rc<Shared>, launch: Launch) {
    let Launch { id, stream, ids, body, timeout, most_tokens, abandoned } = launch;
    let way = way(&shared, &stream.endpoint, most_tokens);
    shared.state.borrow_mut().sent(shared.now(), id);
    // In a task of its own, so that a panic in what reads foreign bytes ends the request, not the gateway.
    let mut sending = spawn_local(async move {
        failure_point!("net-send");
        let Stream { endpoint, model, task, .. } = &*stream;
        let (model, service) = (&model.model, task.service());
        let question = Question { endpoint, model, body: &body, timeout, most_tokens, service, ids: &ids };
        request::send(way, &question).await
    });
    let result = tokio::select! {
        joined = &mut sending => {
            Some(joined.unwrap_or_else(|e| Answered::broke_off(format!("internal error: {e}"), true)))
        }
        () = abandoned.notified() => {
            sending.abort();
            None
        }
    };
    failure_point!("net-answered");
    shared.state.borrow_mut().finish(shared.now(), id, result);
    shared.changed.notify_one();
    shared.room.notify_waiters();
}

/// The client for an endpoint, with room for an answer of so many tokens, or why there is none.
fn way(shared: &Shared, endpoint: &Endpoint, most_tokens: u64) -> Result<(HttpClient, Answer), String> {
    shared.clients.borrow_mut().of(endpoint, request::most_bytes(most_tokens))
}

/// Serves one client until it leaves or says what can't be understood.
async fn serve(shared: Rc<Shared>, mut stream: UnixStream) {
    if !stream.peer_cred().is_ok_and(|peer| peer.uid() == shared.uid) {
        return;
    }
    let full = shared.state.borrow().is_crowded();
    if let Some(full) = full {
        if let Ok(frame) = encode(&FromGateway::Full(full)) {
            let _ = stream.write_all(&frame).await;
        }
        return;
    }
    let (mut reading, mut writing) = stream.into_split();
    let (queue, mut outgoing) = tokio::sync::mpsc::unbounded_channel::<Vec<u8>>();
    let (unread, too_slow) = (Rc::new(Cell::new(0)), Rc::new(Notify::new()));
    let frames = Frames::new(queue, Rc::clone(&unread), Rc::clone(&too_slow));
    let conn = shared.state.borrow_mut().connect(frames);
    let mut writer = spawn_local(async move {
        while let Some(frame) = outgoing.recv().await {
            if writing.write_all(&frame).await.is_err() {
                break;
            }
            unread.set(unread.get().saturating_sub(frame.len()));
        }
    });
    let mut buffer = Vec::new();
    let (mut has_spoken, mut is_coming) = (false, false);
    loop {
        let room = shared.room.notified();
        if let Some(length) = announced(&buffer).filter(|_| !is_coming) {
            // Messages that are not about rows are heard in any case, unless they come behind some.
            if length > MOST_CONTROL && shared.state.borrow_mut().must_wait(conn) {
                tokio::select! {
                    () = room => continue,
                    () = left(&reading) => break,
                    () = too_slow.notified() => break,
                }
            }
            // A message has its place in memory as soon as it begins to come, and is not held up from then on.
            is_coming = true;
            shared.state.borrow_mut().comes(conn, length.min(MAX_FRAME));
        }
        match take(&shared, conn, &mut buffer).await {
            Ok(false) => {}
            Ok(true) => {
                is_coming = false;
                shared.state.borrow_mut().comes(conn, 0);
                shared.room.notify_waiters();
                if buffer.len() <= MOST_KEPT {
                    buffer.shrink_to(MOST_KEPT);
                }
                continue;
            }
            Err(_) => break,
        }
        // Between messages a client may be silent as long as it likes.
        let patience = if has_spoken && buffer.is_empty() { Duration::MAX } else { SILENCE };
        let read = tokio::select! {
            read = tokio::time::timeout(patience, reading.read_buf(&mut buffer)) => read,
            () = too_slow.notified() => break,
        };
        match read {
            Ok(Ok(n)) if n > 0 => has_spoken = true,
            _ => break,
        }
    }
    if !shared.state.borrow().is_connected(conn) {
        // It was told why.
        let _ = tokio::time::timeout(LAST_WORDS, &mut writer).await;
    }
    shared.state.borrow_mut().disconnect(shared.now(), conn);
    shared.changed.notify_one();
    shared.room.notify_waiters();
    // Nothing more is written to a client that has gone or broken the rules.
    writer.abort();
}

/// Comes to its end when a client has left from which nothing is read.
async fn left(reading: &OwnedReadHalf) {
    while !reading.ready(Interest::READABLE).await.is_ok_and(|ready| ready.is_read_closed()) {
        tokio::time::sleep(LOOK).await;
    }
}

/// Takes rows. Their tokens are counted, which takes time: others have their turn in between.
/// Until all are there, those that are do not make up a request that is not full.
async fn take_rows(shared: &Shared, conn: u64, items: Vec<Item>) -> Result<(), String> {
    let group = shared.state.borrow_mut().rows_come(conn);
    let taken = take_parts(shared, conn, items).await;
    shared.state.borrow_mut().rows_came(conn, group);
    taken
}

async fn take_parts(shared: &Shared, conn: u64, items: Vec<Item>) -> Result<(), String> {
    let (mut part, mut bytes) = (Vec::new(), 0);
    for item in items {
        failure_point!("poison-gateway", &item.text);
        bytes += item.text.len();
        part.push(line(shared, conn, item).await?);
        if part.len() >= TURN.0 || bytes >= TURN.1 {
            bytes = 0;
            shared.state.borrow_mut().items(shared.now(), conn, std::mem::take(&mut part))?;
            tokio::task::yield_now().await;
        }
    }
    shared.state.borrow_mut().items(shared.now(), conn, part)
}

/// A row with its line, if that takes long to make: it is made on another thread.
async fn line(shared: &Shared, conn: u64, item: Item) -> Result<(Item, Option<Line>), String> {
    if item.text.len() < LONG {
        return Ok((item, None));
    }
    let ruler = shared.state.borrow_mut().ruler(conn);
    let Some(ruler) = ruler else { return Ok((item, None)) };
    let _turn = shared.counting.acquire().await.map_err(|e| format!("internal error: {e}"))?;
    let making = tokio::task::spawn_blocking(move || {
        let line = ruler.line(&item.text);
        (item, Some(line))
    });
    making.await.map_err(|e| format!("internal error: {e}"))
}

/// Does what the first message of a buffer says, if it is there as a whole. Whether it is.
async fn take(shared: &Rc<Shared>, conn: u64, buffer: &mut Vec<u8>) -> Result<bool, String> {
    let Some(message) = decode::<ToGateway>(buffer)? else { return Ok(false) };
    failure_point!("net-take");
    let state = || shared.state.borrow_mut();
    match message {
        ToGateway::Open(stream) => state().open(shared.now(), conn, *stream)?,
        ToGateway::Items(items) => take_rows(shared, conn, items).await?,
        ToGateway::Withdraw => state().withdraw(conn),
        ToGateway::Abandon => state().abandon(conn),
        ToGateway::Allow(more) => state().allow(conn, more),
        ToGateway::Estimate(items) => {
            let mut lines = Vec::new();
            for item in items {
                lines.push(line(shared, conn, item).await?);
            }
            let estimate = state().estimate(shared.now(), conn, lines);
            state().say(conn, &FromGateway::Estimated(estimate));
        }
        ToGateway::Activity => {
            let activity = state().activity(shared.now());
            state().say(conn, &FromGateway::Activity(activity));
        }
        ToGateway::Probe => spawn(shared, probe(Rc::clone(shared), conn)),
    }
    shared.changed.notify_one();
    Ok(true)
}

/// Finds out whether a client's model answers at all; of several, whether one does.
async fn probe(shared: Rc<Shared>, conn: u64) {
    let (mut tries, mut at) = (0, 0);
    let answer = loop {
        let now = shared.now();
        let next = shared.state.borrow_mut().probe(now, conn, at);
        match next {
            None => return,
            Some(Probe::Alive) => break None,
            Some(Probe::Disabled) => break Some(disabled()),
            Some(Probe::Until(at)) => {
                tokio::time::sleep(Duration::from_millis(at.saturating_sub(now).clamp(1, 1000))).await
            }
            Some(Probe::Send(stream, body, timeout, left)) => {
                tries += 1;
                let Stream { endpoint, model, task, .. } = &*stream;
                let way = way(&shared, endpoint, PROBE_READ_TOKENS);
                let (most_tokens, service) = (PROBE_READ_TOKENS, task.service());
                let (model, ids) = (&model.model, &PROBE_IDS);
                let question = Question { endpoint, model, body: &body, timeout, most_tokens, service, ids };
                let result = tokio::select! {
                    answered = request::send(way, &question) => answered.result,
                    () = left.notified() => return,
                };
                let end = shared.state.borrow_mut().probed(shared.now(), (conn, &stream), tries, result);
                match end {
                    Some(Some(_)) if at + 1 < shared.state.borrow().models(conn) => (tries, at) = (0, at + 1),
                    Some(answer) => break answer,
                    None => tokio::time::sleep(Duration::from_millis(300)).await,
                }
            }
        }
    };
    shared.state.borrow_mut().say(conn, &FromGateway::Probed(answer));
}
