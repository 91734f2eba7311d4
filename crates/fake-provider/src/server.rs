//! The server: a thread and its connections.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

use crate::chat::{Admitted, Verdict, authorized};
use crate::control;
use crate::http::{Connection, Next, Request};
use crate::reply::Reply;
use crate::state::{Shared, State};
use crate::wire::{self, Wire};
use crate::{Config, Fault, Stats};

/// A running provider. Dropping it closes every connection and frees the port.
pub struct FakeProvider {
    address: SocketAddr,
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl FakeProvider {
    /// Listens and serves on a new thread.
    pub fn start(config: Config) -> io::Result<Self> {
        // Reading the vocabulary takes a while; no request shall wait for it.
        bpe_openai::o200k_base();
        let listener = std::net::TcpListener::bind(config.listen)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let shared = Arc::new(Shared::new(config));
        let (stop, stopped) = oneshot::channel();
        let served = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("fake-provider".to_owned()).spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = accept(listener, served) => {}
                    _ = stopped => {}
                }
            });
        })?;
        Ok(Self { address, shared, stop: Some(stop), thread: Some(thread) })
    }

    /// `http://127.0.0.1:PORT/v1`: what clients call the base URL.
    pub fn base_url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// The same for the dialect of this name; of one that it does not speak, where nothing is served.
    pub fn base_of(&self, api: &str) -> String {
        let wire = wire::WIRES.iter().find(|wire| wire.name() == api);
        format!("http://{}{}", self.address, wire.map_or("/nowhere", |wire| wire.base()))
    }

    /// The base URL of each dialect, by its name.
    pub fn bases(&self) -> BTreeMap<&'static str, String> {
        wire::WIRES.iter().map(|wire| (wire.name(), self.base_of(wire.name()))).collect()
    }

    /// The address that it listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The counts so far.
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }

    /// Starts the counts anew. Requests in flight and the content of the window stay.
    pub fn reset_stats(&self) {
        self.shared.lock().reset_stats();
    }

    /// Sets the faults of the next chat requests, one each, in order; `None` is
    /// a normal answer. The configured probabilities apply once these are used
    /// up. A request refused for its contents, or by the limits, uses none up,
    /// except that a fault which refuses comes before the limits.
    pub fn script(&self, faults: impl IntoIterator<Item = Option<Fault>>) {
        self.shared.lock().script.extend(faults);
    }

    /// Changes the configuration; a change of `listen` or `seed` has no effect.
    pub fn configure(&self, change: impl FnOnce(&mut Config)) {
        self.shared.lock().configure(change);
    }

    /// Holds all answers back. Requests are still admitted, charged and billed.
    pub fn hold(&self) {
        self.shared.hold();
    }

    /// Gives so many more answers and holds all that come after them, from the next request's on. The answers that a
    /// test then finds does not hang on who was faster.
    pub fn hold_after(&self, answers: u64) {
        self.shared.hold_after(answers);
    }

    /// Returns true if answers are held back by now.
    pub fn holds(&self) -> bool {
        self.shared.holds()
    }

    /// Lets go of the answers held back and of the requests that hang, also when answers are held again at once.
    pub fn release(&self) {
        self.shared.release();
    }

    /// The last 100 bodies of chat requests that were JSON, oldest first.
    pub fn bodies(&self) -> Vec<Value> {
        self.shared.lock().bodies.iter().cloned().collect()
    }
}

impl Drop for FakeProvider {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has printed itself.
            let _ = thread.join();
        }
    }
}

async fn accept(listener: std::net::TcpListener, shared: Arc<Shared>) {
    let Ok(listener) = TcpListener::from_std(listener) else {
        return;
    };
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(serve(stream, Arc::clone(&shared)));
            }
            // Out of file descriptors, say: let connections end.
            Err(_) => tokio::time::sleep(std::time::Duration::from_millis(10)).await,
        }
    }
}

async fn serve(stream: TcpStream, shared: Arc<Shared>) {
    // Small answers must not wait for acknowledgements.
    let _ = stream.set_nodelay(true);
    let mut connection = Connection::new(stream);
    loop {
        let request = match connection.next().await {
            Next::Request(request) => request,
            Next::Closed => return,
            Next::Bad(status, message) => {
                let reply = Reply::error(status, "invalid_request_error", "", "", message);
                let _ = connection.send(&reply, false, 1).await;
                return;
            }
        };
        let keep_alive = request.keep_alive;
        let found = wire::find(&request.path).filter(|_| request.method == "POST");
        let (reply, times) = match found {
            Some((wire, model)) => match chat(&shared, (wire, model), &request, &connection).await {
                After::Reply(reply, times) => {
                    let mut reply = wire::translate(wire, reply);
                    reply.extra_head.clone_from(&shared.lock().config.extra_head);
                    (reply, times)
                }
                After::Reset => return connection.reset(),
                After::Broken(fault) => return connection.misbehave(&fault).await,
                After::Left => return,
            },
            None => (route(&shared, &request), 1),
        };
        if connection.send(&reply, keep_alive, times).await.is_err() || !keep_alive {
            return;
        }
    }
}

/// The routes other than the chat's.
fn route(shared: &Shared, request: &Request) -> Reply {
    match (request.method.as_str(), request.path.as_str()) {
        ("GET", "/health") => Reply::json(200, &json!({ "status": "ok" })),
        ("GET", "/stats") => stats_reply(&shared.stats()),
        // Cheap, however many rows there were.
        ("GET", "/stats/totals") => stats_reply(&shared.lock().totals()),
        ("POST", "/control") => match control::apply(shared, &request.body) {
            Ok(()) => Reply::json(200, &json!({})),
            Err(message) => Reply::invalid("", "", &message),
        },
        ("GET", "/v1/models") => {
            let state = shared.lock();
            if let Err(reply) = authorized(&state.config, wire::key(wire::HOME, request)) {
                return reply;
            }
            let default = vec!["fake-model".to_owned()];
            let names = state.config.models.as_ref().unwrap_or(&default);
            let models: Vec<Value> = names
                .iter()
                .map(|id| json!({ "id": id, "object": "model", "created": 0, "owned_by": "fake" }))
                .collect();
            Reply::json(200, &json!({ "object": "list", "data": models }))
        }
        (method, path) => {
            let message = format!("Unknown request URL: {method} {path}.");
            Reply::error(404, "invalid_request_error", "", "unknown_url", &message)
        }
    }
}

fn stats_reply(stats: &Stats) -> Reply {
    match serde_json::to_string(stats) {
        Ok(stats) => Reply::text(200, stats),
        Err(error) => Reply::error(500, "server_error", "", "", &error.to_string()),
    }
}

/// The end of a chat request.
enum After {
    /// A reply, and the number of times that it is sent.
    Reply(Reply, usize),
    Reset,
    Broken(Fault),
    /// The client did not wait.
    Left,
}

/// Counts are kept up before the client sees the outcome: a test that has its
/// answer can look at the stats.
async fn chat(
    shared: &Shared,
    to: (&'static dyn Wire, Option<&str>),
    request: &Request,
    connection: &Connection,
) -> After {
    let mut gate = shared.gate.subscribe();
    let releases_before = gate.borrow().releases;
    let verdict = shared.lock().judge(to, request);
    let admitted = match verdict {
        Verdict::Refused(mut reply) => {
            let mut state = shared.lock();
            state.tally.status(reply.status);
            reply.headers.push(("x-request-id", request_id(&mut state)));
            return After::Reply(reply, 1);
        }
        Verdict::Broken(Fault::ResetBefore) => {
            shared.lock().tally.stats.connections_reset += 1;
            return After::Reset;
        }
        Verdict::Broken(fault) => return After::Broken(fault),
        Verdict::Admitted(admitted) => admitted,
    };
    let hangs = admitted.fault == Some(Fault::Hang);
    let wait = async {
        tokio::time::sleep(admitted.delay).await;
        shared.pass(&mut gate, releases_before, hangs).await;
    };
    let stayed = tokio::select! {
        () = wait => true,
        () = connection.left() => false,
    };
    finish(&mut shared.lock(), *admitted, stayed)
}

/// Takes an admitted request out of flight.
fn finish(state: &mut State, mut admitted: Admitted, stayed: bool) -> After {
    let now = Instant::now();
    // A client that leaves does not stop its answer, except one that hangs.
    if stayed || admitted.fault != Some(Fault::Hang) {
        release_reservation(state, now, &admitted);
    }
    let tally = &mut state.tally;
    tally.landed(now, admitted.rows);
    if !stayed {
        tally.stats.abandoned += 1;
        return After::Left;
    }
    tally.answered(now, admitted.delay);
    match admitted.fault {
        Some(Fault::ResetAfter) => {
            tally.stats.connections_reset += 1;
            return After::Reset;
        }
        Some(Fault::Hang) => tally.billed(admitted.prompt_tokens, admitted.cached_tokens, &admitted.answer),
        _ => {}
    }
    tally.status(admitted.reply.status);
    let id = request_id(state);
    admitted.reply.headers.push(("x-request-id", id));
    let times = if admitted.fault == Some(Fault::Twice) { 2 } else { 1 };
    After::Reply(admitted.reply, times)
}

/// Takes back what an admitted request was charged and did not use.
fn release_reservation(state: &mut State, now: Instant, admitted: &Admitted) {
    let (number, charged) = admitted.charge;
    let unused = charged.saturating_sub(admitted.prompt_tokens + admitted.answer.completion_tokens);
    if state.config.release && unused > 0 {
        state.limits.give_back(now, &state.config, number, unused);
        state.tally.stats.released_tokens += unused;
    }
}

fn request_id(state: &mut State) -> String {
    format!("req_{:016x}", state.rng.u64(..))
}
