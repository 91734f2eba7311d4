//! Helpers that the gateway's tests share: a gateway on a socket, clients of it, marked rows.

// Each test file is a crate of its own and uses a part of this.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod relay;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use llm_batch_core::dialect::{Api, Counts};
use llm_batch_core::options::Options;
use llm_batch_core::task::{Answer, Spec, Task};
use llm_batch_gateway::protocol::*;
use llm_batch_gateway::{Gateway, Places, Settings, Stock};
use llm_fake_provider::{Config, FakeProvider};
use serde_json::json;

pub const LABELS: [&str; 4] = ["billing", "bug", "shipping", "other"];

/// For anything that is to happen and is not to be timed.
const PATIENCE: Duration = Duration::from_secs(300);

/// Enough for all clients of a test, which are of one process.
pub const ROOMY: Places = Places { sessions: 1000, of_a_role: 1000, others: 1000, requests: 1000, connections: 1000 };

/// A gateway on a socket of its own.
pub struct Setup {
    gateway: Option<Gateway>,
    path: PathBuf,
    pub log: mpsc::Receiver<String>,
}

impl Setup {
    /// One that keeps no answers.
    pub fn new(memory: usize) -> Self {
        Self::with(Settings { enabled: true, memory, cache: 0 }, ROOMY, Stock::default())
    }

    /// One that keeps answers in so many bytes.
    pub fn with_cache(cache: usize) -> Self {
        Self::with(Settings { enabled: true, memory: 64 << 20, cache }, ROOMY, Stock::default())
    }

    /// One that follows another one.
    pub fn after(before: Stock) -> Self {
        Self::with(Settings { enabled: true, memory: 64 << 20, cache: 0 }, ROOMY, before)
    }

    /// One that has only so many places.
    pub fn within(places: Places) -> Self {
        Self::with(Settings { enabled: true, memory: 64 << 20, cache: 0 }, places, Stock::default())
    }

    /// The state that is kept for the next one.
    pub fn stock(&self) -> Stock {
        self.gateway.as_ref().unwrap().kept().stock()
    }

    fn with(settings: Settings, places: Places, before: Stock) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("llm_batch-test-{}-{}.sock", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        let (sender, log) = mpsc::channel();
        let listener = UnixListener::bind(&path).unwrap();
        let gateway = Gateway::start(listener, settings, places, before, sender).unwrap();
        Self { gateway: Some(gateway), path, log }
    }

    pub fn configure(&self, settings: Settings) {
        self.gateway.as_ref().unwrap().configure(settings);
    }

    pub fn connect(&self) -> Client {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        Client { stream, buffer: Vec::new() }
    }

    /// A client with a stream.
    pub fn client(&self, provider: &FakeProvider, change: impl FnOnce(&mut Stream)) -> Client {
        let mut client = self.connect();
        client.open(provider, change);
        client
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        self.gateway = None;
        let _ = std::fs::remove_file(&self.path);
    }
}

#[derive(Debug)]
pub struct Client {
    pub stream: UnixStream,
    buffer: Vec<u8>,
}

impl Client {
    pub fn say(&mut self, message: &ToGateway) {
        self.stream.write_all(&encode(message).unwrap()).unwrap();
    }

    /// The next message, or `None` if the gateway closed the connection.
    #[track_caller]
    pub fn hear(&mut self, what: &str) -> Option<FromGateway> {
        let start = Instant::now();
        loop {
            if let Some(message) = decode(&mut self.buffer).unwrap() {
                return Some(message);
            }
            assert!(start.elapsed() < PATIENCE, "waited in vain for {what}");
            let mut chunk = [0; 65536];
            match self.stream.read(&mut chunk) {
                Ok(0) => return None,
                Ok(n) => self.buffer.extend_from_slice(&chunk[..n]),
                Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
                Err(_) => return None,
            }
        }
    }

    pub fn open(&mut self, provider: &FakeProvider, change: impl FnOnce(&mut Stream)) {
        let mut stream = stream(provider);
        change(&mut stream);
        self.say(&ToGateway::Open(Box::new(stream)));
    }

    /// Rows whose numbers are those of their texts.
    pub fn rows(&mut self, n: std::ops::Range<u64>) {
        self.texts(n.map(|n| (n, n)));
    }

    /// Rows: the number of each and that of its text.
    pub fn texts(&mut self, rows: impl IntoIterator<Item = (u64, u64)>) {
        self.say(&ToGateway::Items(
            rows.into_iter().map(|(n, t)| Item { n, text: text(t), isolation: None, again: None }).collect(),
        ));
    }

    /// Rows that are kept apart: the number of each, that of its text, and its isolation.
    pub fn isolated(&mut self, rows: impl IntoIterator<Item = (u64, u64, Option<String>)>) {
        let item = |(n, t, isolation)| Item { n, text: text(t), isolation, again: None };
        self.say(&ToGateway::Items(rows.into_iter().map(item).collect()));
    }

    /// The outcomes by row when there are `n`, and all that was spent.
    #[track_caller]
    pub fn answers(&mut self, n: usize) -> (BTreeMap<u64, Outcome>, Spent) {
        let (mut got, mut spent) = (BTreeMap::new(), Spent::default());
        while got.len() < n {
            match self.hear(&format!("{n} outcomes, have {}", got.len())) {
                Some(FromGateway::Outcomes { outcomes, spent: s, .. }) => {
                    add(&mut spent, &s);
                    for o in outcomes {
                        let n = o.n;
                        assert!(got.insert(n, o).is_none(), "row {n} has two outcomes");
                    }
                }
                other => panic!("expected outcomes, got {other:?}"),
            }
        }
        (got, spent)
    }

    /// The same without what is beside the verdicts.
    #[track_caller]
    pub fn outcomes(&mut self, n: usize) -> (BTreeMap<u64, Verdict>, Spent) {
        let (got, spent) = self.answers(n);
        (got.into_iter().map(|(n, o)| (n, o.verdict)).collect(), spent)
    }

    /// The state of all models, once all that this client has said before has been dealt with. Whatever else comes
    /// before it is unexpected.
    #[track_caller]
    pub fn activity(&mut self) -> Vec<Activity> {
        self.say(&ToGateway::Activity);
        match self.hear("the activity") {
            Some(FromGateway::Activity(activity)) => activity,
            other => panic!("expected the activity, got {other:?}"),
        }
    }

    /// The state of the only model.
    #[track_caller]
    pub fn only_activity(&mut self) -> Activity {
        let all = self.activity();
        assert_eq!(all.len(), 1, "{all:#?}");
        all.into_iter().next().unwrap()
    }
}

/// A job's stream of a task with [`LABELS`].
pub fn stream(provider: &FakeProvider) -> Stream {
    stream_to(&provider.base_url())
}

/// The same to an address.
pub fn stream_to(base_url: &str) -> Stream {
    Stream {
        database: 1,
        role: 10,
        interactive: false,
        endpoint: Endpoint {
            api: Api::default(),
            api_version: None,
            base_url: base_url.to_owned(),
            is_trusted: true,
            allow_http: false,
            ca_file: None,
            account: None,
            api_key: None,
            counts: Counts::default(),
        },
        model: Model {
            model: "m".into(),
            requests_per_minute: None,
            inputs_per_minute: None,
            tokens_per_minute: None,
            input_tokens_per_minute: None,
            output_tokens_per_minute: None,
            max_concurrent_requests: Some(4),
            request_timeout_ms: 20_000,
            max_request_tokens: 16_000,
            parameters: serde_json::Map::new(),
            prices: None,
        },
        others: Vec::new(),
        policy: Policy::default(),
        rates: Vec::new(),
        task: Task { spec: tickets("Tickets."), options: Options::default() },
        budget: None,
    }
}

/// Waits until something is so.
#[track_caller]
pub fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A classifier with [`LABELS`].
pub fn tickets(instruction: &str) -> Spec {
    Spec::from_json("classify", &json!({"instruction": instruction, "labels": LABELS})).unwrap()
}

/// An answer of one text.
pub fn label(text: &str) -> Verdict {
    Verdict::Answer(Answer(vec![Some(text.to_owned())]))
}

pub fn add(sum: &mut Spent, more: &Spent) {
    sum.requests += more.requests;
    sum.input_tokens += more.input_tokens;
    sum.cached_input_tokens += more.cached_input_tokens;
    sum.written_input_tokens += more.written_input_tokens;
    sum.output_tokens += more.output_tokens;
    sum.unconfirmed_input_tokens += more.unconfirmed_input_tokens;
    sum.unconfirmed_output_tokens += more.unconfirmed_output_tokens;
}

pub fn text(n: u64) -> String {
    format!("row #r{n}:{}# \"quoted\"\n902: \"not a row\"", LABELS[n as usize % 4])
}

/// Returns true if a text has its label.
pub fn is_right(text: u64, verdict: &Verdict) -> bool {
    *verdict == label(LABELS[(text % 4) as usize])
}

/// Rows, all of which get their labels; what was spent for them.
#[track_caller]
pub fn all_right(client: &mut Client, rows: std::ops::Range<u64>, what: &str) -> Spent {
    client.rows(rows.clone());
    let (got, spent) = client.answers((rows.end - rows.start) as usize);
    for (n, outcome) in &got {
        assert!(is_right(*n, &outcome.verdict), "{what}: row {n}: {outcome:?}");
    }
    spent
}

/// Rows, all of which come back; why.
#[track_caller]
pub fn stopped(client: &mut Client, what: &str) -> Stop {
    client.rows(0..20);
    let (mut stop, mut back) = (None, 0);
    while back < 20 || stop.is_none() {
        match client.hear(what) {
            Some(FromGateway::Stopped(why)) => stop = Some(why),
            Some(FromGateway::Outcomes { outcomes, .. }) => {
                assert!(outcomes.iter().all(|o| o.verdict == Verdict::Withdrawn), "{what}: {outcomes:?}");
                back += outcomes.len();
            }
            other => panic!("{what}: {other:?}"),
        }
    }
    stop.unwrap()
}

/// Memory of this process, MiB.
pub fn memory() -> u64 {
    let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let pss = rollup.lines().find_map(|line| line.strip_prefix("Pss:")?.trim().strip_suffix(" kB")).unwrap();
    pss.trim().parse::<u64>().unwrap() >> 10
}

pub fn provider(config: Config) -> FakeProvider {
    FakeProvider::start(config).unwrap()
}

/// The key of providers that want one.
pub const KEY: &str = "key-0123456789abcdef";

/// A provider that wants the key.
pub fn keyed(config: Config) -> FakeProvider {
    provider(Config { api_key: Some(KEY.into()), ..config })
}

/// A client that asks in a dialect.
pub fn speaks(setup: &Setup, provider: &FakeProvider, api: Api, change: impl FnOnce(&mut Stream)) -> Client {
    setup.client(provider, |s| {
        s.endpoint.api = api;
        s.endpoint.base_url = provider.base_of(api.name());
        s.endpoint.api_key = Some(Secret(KEY.into()));
        s.endpoint.counts = api.dialect().counts();
        change(s);
    })
}

/// Looks until `ok`; what was seen last.
#[track_caller]
pub fn wait<T: Debug>(what: &str, mut look: impl FnMut() -> T, ok: impl Fn(&T) -> bool) -> T {
    let start = Instant::now();
    loop {
        let seen = look();
        if ok(&seen) {
            return seen;
        }
        assert!(start.elapsed() < PATIENCE, "waited in vain until {what}: {seen:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[track_caller]
pub fn wait_in_flight(provider: &FakeProvider, n: u64) {
    wait(&format!("{n} requests are under way"), || provider.stats().in_flight, |in_flight| *in_flight == n);
}

/// The numbers of the texts in each of the last 100 requests, in the order in which the provider got them.
pub fn packs(provider: &FakeProvider) -> Vec<Vec<u64>> {
    let of = |body: &serde_json::Value| {
        let user = body["messages"][1]["content"].as_str().unwrap_or_default();
        let number = |s: &str| s.split(':').next().and_then(|n| n.parse().ok());
        user.split("#r").skip(1).filter_map(number).collect()
    };
    provider.bodies().iter().map(of).collect()
}

/// The number of times that each text was asked.
pub fn asked(provider: &FakeProvider) -> BTreeMap<u64, u32> {
    provider.stats().rows.iter().map(|(id, row)| (id.parse().unwrap(), row.asked)).collect()
}
