//! Helpers for tests with the extension: a cluster with a fake provider, marked rows, the accounts of a job.

// Each test file is a crate of its own and uses a part of this.
#![allow(dead_code)]

use std::ops::RangeInclusive;
use std::time::Duration;

use llm_fake_provider::{Config, FakeProvider, Latency};
use pg_llm_batch_e2e::{Builder, Cluster, wait_until};
use postgres::Client;

/// The labels of the classifier `topic`.
pub const LABELS: [&str; 8] = ["billing", "bug", "shipping", "refund", "account", "praise", "spam", "other"];

/// For a job to end, or anything else that is not to be timed.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// A cluster and the provider its jobs ask. In database `postgres`: the extension, the server `fake` (with a key
/// `sk-test-…` for everybody), the model `m` without limits and with prices, the classifier `topic`, which reuses no answers.
pub struct Bed {
    /// First, so that it is dropped before the provider: nobody logs that it has gone.
    pub cluster: Cluster,
    pub provider: FakeProvider,
}

impl Bed {
    /// Starts a cluster with `postgres` set up against a provider without limits.
    #[track_caller]
    pub fn new(name: &str) -> Self {
        Self::with(name, Config::default())
    }

    /// The same with another provider.
    #[track_caller]
    pub fn with(name: &str, config: Config) -> Self {
        Self::build(Cluster::builder(name), config)
    }

    /// The same with another cluster.
    #[track_caller]
    pub fn build(builder: Builder, config: Config) -> Self {
        let provider = FakeProvider::start(config).unwrap();
        let bed = Self { cluster: builder.start(), provider };
        let mut client = bed.connect();
        install(&mut client, &bed.provider.base_url());
        model(&mut client, "m", "input_price => 0.15, output_price => 0.60");
        // Tests count how often a row is asked: no answer is kept for later ones, but where a test wants it.
        classifier(&mut client, "topic", &labels_json(&LABELS), "m", "{\"reuse\": false}");
        bed
    }

    /// A superuser's session in `postgres`.
    #[track_caller]
    pub fn connect(&self) -> Client {
        self.cluster.connect("postgres")
    }

    /// Waits until a job of database `postgres` is done, and checks its accounts.
    #[track_caller]
    pub fn done(&self, job: i64) -> Progress {
        wait_status(&mut self.connect(), job, "done")
    }
}

/// A provider that takes its time, in ms, for each answer.
pub fn slow(ms: u64) -> Config {
    Config { latency: Latency { base: Duration::from_millis(ms), ..Latency::default() }, ..Config::default() }
}

/// A superuser's session, also of a server that is just being reset.
#[track_caller]
pub fn reconnect(bed: &Bed) -> Client {
    let mut last = None;
    wait_until(
        "the server takes connections",
        PATIENCE,
        || match bed.cluster.try_connect_as("postgres", "postgres") {
            Ok(client) => {
                last = Some(client);
                String::new()
            }
            Err(e) => e.to_string(),
        },
        String::is_empty,
    );
    last.unwrap()
}

/// Process ids by type.
pub fn pids(client: &mut Client, kind: &str) -> Vec<i32> {
    let rows = client.query("SELECT pid FROM pg_stat_activity WHERE backend_type = $1 ORDER BY 1", &[&kind]).unwrap();
    rows.iter().map(|r| r.get(0)).collect()
}

/// Makes the extension, the server `fake` and a key for everybody.
#[track_caller]
pub fn install(client: &mut Client, base_url: &str) {
    run(client, "CREATE EXTENSION pg_llm_batch");
    run(
        client,
        &format!("CREATE SERVER fake FOREIGN DATA WRAPPER llm_provider OPTIONS (api 'openai', base_url '{base_url}')"),
    );
    run(client, "CREATE USER MAPPING FOR PUBLIC SERVER fake OPTIONS (api_key 'sk-test-0123456789abcdef')");
}

/// Makes a model of the server `fake`; `settings` are further arguments of `create_model()`, or empty.
#[track_caller]
pub fn model(client: &mut Client, name: &str, settings: &str) {
    let comma = if settings.is_empty() { "" } else { ", " };
    run(
        client,
        &format!("SELECT llm_batch.create_model('{name}', server => 'fake', model => 'fake-{name}'{comma}{settings})"),
    );
}

/// Makes a classifier; `labels` and `options` are JSON.
#[track_caller]
pub fn classifier(client: &mut Client, name: &str, labels: &str, model: &str, options: &str) {
    run(
        client,
        &format!(
            "SELECT llm_batch.create_classifier('{name}', labels => '{labels}', model => '{model}', \
             instruction => 'Tickets of a web shop.', options => '{options}')"
        ),
    );
}

/// Labels as a JSON array.
pub fn labels_json(labels: &[&str]) -> String {
    serde_json::to_string(labels).unwrap()
}

/// Makes a table `(id bigint primary key, body text, want text, topic text)` and fills it with [`rows`].
#[track_caller]
pub fn tickets(client: &mut Client, table: &str, ids: RangeInclusive<i64>) {
    run(
        client,
        &format!(
            "CREATE TABLE {table} (id bigint PRIMARY KEY, body text, want text NOT NULL, topic text DEFAULT NULL)"
        ),
    );
    rows(client, table, ids);
}

/// Inserts rows whose body carries the marker `#r000123:LABEL#`, and whose `want` is that label.
#[track_caller]
pub fn rows(client: &mut Client, table: &str, ids: RangeInclusive<i64>) {
    let (first, last) = (ids.start(), ids.end());
    let labels = LABELS.join(",");
    run(
        client,
        &format!(
            "INSERT INTO {table} (id, body, want)
             SELECT i, concat('My order #r', lpad(i::text, 6, '0'), ':', l, '# is not what I wanted'), l
               FROM generate_series({first}, {last}) i, LATERAL (SELECT ('{{{labels}}}'::text[])[1 + i % 8]) x (l)"
        ),
    );
}

/// Starts a job on `table` (`body` → `topic`, classifier `topic`).
#[track_caller]
pub fn backfill(client: &mut Client, table: &str) -> i64 {
    backfill_with(client, table, "")
}

/// The same with further arguments of `backfill()`, or none; a later one must not repeat an earlier one.
#[track_caller]
pub fn backfill_with(client: &mut Client, table: &str, more: &str) -> i64 {
    let comma = if more.is_empty() { "" } else { ", " };
    one(
        client,
        &format!(
            "SELECT llm_batch.backfill('{table}', input => 'body', target => 'topic', task => 'topic'{comma}{more})"
        ),
    )
}

/// A row of `llm_batch.progress`.
#[derive(Clone, Debug, PartialEq)]
pub struct Progress {
    pub status: String,
    pub reason: Option<String>,
    /// -1 until they are counted.
    pub total: i64,
    pub done: i64,
    pub skipped: i64,
    pub failed: i64,
    pub superseded: i64,
    /// -1 until they are counted.
    pub left: i64,
    pub input_tokens: i64,
    pub output_tokens: i64,
    pub requests: i64,
    /// As SQL writes it, without trailing zeros.
    pub cost: String,
    pub last_error: Option<String>,
}

impl Progress {
    /// Promise 7: total = done + skipped + failed + superseded + left.
    #[track_caller]
    pub fn adds_up(&self) {
        if self.total >= 0 {
            let sum = self.done + self.skipped + self.failed + self.superseded + self.left;
            assert_eq!(self.total, sum, "the accounts do not add up: {self:?}");
        }
    }

    /// (total, done, skipped, failed, superseded, left)
    pub fn counts(&self) -> (i64, i64, i64, i64, i64, i64) {
        (self.total, self.done, self.skipped, self.failed, self.superseded, self.left)
    }
}

/// A job's progress. Its accounts are checked at every look.
#[track_caller]
pub fn progress(client: &mut Client, job: i64) -> Progress {
    let row = client
        .query_one(
            "SELECT status, reason, coalesce(rows_total, -1), rows_done, rows_skipped, rows_failed, rows_superseded,
                    coalesce(rows_left, -1), input_tokens, output_tokens, requests, cost::text, last_error
               FROM llm_batch.progress WHERE job_id = $1",
            &[&job],
        )
        .unwrap_or_else(|e| panic!("progress of job {job}: {e:?}"));
    let progress = Progress {
        status: row.get(0),
        reason: row.get(1),
        total: row.get(2),
        done: row.get(3),
        skipped: row.get(4),
        failed: row.get(5),
        superseded: row.get(6),
        left: row.get(7),
        input_tokens: row.get(8),
        output_tokens: row.get(9),
        requests: row.get(10),
        cost: row.get(11),
        last_error: row.get(12),
    };
    progress.adds_up();
    progress
}

/// Waits until a job has a status. The accounts are checked at every look.
#[track_caller]
pub fn wait_status(client: &mut Client, job: i64, status: &str) -> Progress {
    wait_until(
        &format!("job {job} is {status}"),
        PATIENCE,
        || progress(client, job),
        |p| p.status == status || (matches!(p.status.as_str(), "done" | "failed" | "cancelled") && status != p.status),
    )
    .checked(status)
}

impl Progress {
    #[track_caller]
    fn checked(self, status: &str) -> Self {
        assert_eq!(self.status, status, "{self:?}");
        self
    }
}

/// A row of `llm_batch.failure`: key, state, class, attempts, detail.
pub type Failure = (serde_json::Value, String, String, i32, String);

/// The rows of `llm_batch.failure` for a job, by key.
#[track_caller]
pub fn failures(client: &mut Client, job: i64) -> Vec<Failure> {
    client
        .query(
            "SELECT key::text, state, class, attempts, coalesce(detail, '') FROM llm_batch.failure WHERE job_id = $1 ORDER BY key",
            &[&job],
        )
        .unwrap()
        .iter()
        .map(|r| (serde_json::from_str(r.get(0)).unwrap(), r.get(1), r.get(2), r.get(3), r.get(4)))
        .collect()
}

/// Rows of a [`tickets`] table with a value that is not the wanted one.
#[track_caller]
pub fn wrong(client: &mut Client, table: &str) -> i64 {
    one(client, &format!("SELECT count(*) FROM {table} WHERE topic <> want"))
}

/// Rows of a [`tickets`] table without a value.
#[track_caller]
pub fn left(client: &mut Client, table: &str) -> i64 {
    one(client, &format!("SELECT count(*) FROM {table} WHERE topic IS NULL"))
}

/// Runs a script.
#[track_caller]
pub fn run(client: &mut Client, sql: &str) {
    if let Err(error) = client.batch_execute(sql) {
        panic!("{sql}\n{error:?}");
    }
}

/// The single number a query yields.
#[track_caller]
pub fn one(client: &mut Client, sql: &str) -> i64 {
    match client.query_one(sql, &[]) {
        Ok(row) => row.get(0),
        Err(error) => panic!("{sql}\n{error:?}"),
    }
}

/// The single text a query yields; NULL is empty.
#[track_caller]
pub fn text(client: &mut Client, sql: &str) -> String {
    let output = client.simple_query(sql).unwrap_or_else(|e| panic!("{sql}\n{e:?}"));
    output
        .iter()
        .find_map(|m| match m {
            postgres::SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or_default().to_owned()),
            _ => None,
        })
        .unwrap_or_else(|| panic!("{sql}\nno row"))
}

/// The error of a statement that has to fail: SQLSTATE, message, detail and hint (empty if there is none).
#[track_caller]
pub fn error(client: &mut Client, sql: &str) -> (String, String, String, String) {
    let error = match client.batch_execute(sql) {
        Ok(()) => panic!("{sql}\nshould have failed"),
        Err(error) => error,
    };
    let Some(db) = error.as_db_error() else { panic!("{sql}\n{error:?}") };
    let or_empty = |t: Option<&str>| t.unwrap_or_default().to_owned();
    (db.code().code().to_owned(), db.message().to_owned(), or_empty(db.detail()), or_empty(db.hint()))
}

/// The version of the server, such as 150020.
#[track_caller]
pub fn version(client: &mut Client) -> i64 {
    one(client, "SELECT current_setting('server_version_num')::bigint")
}

/// A statement fails with this SQLSTATE, and says each of these things in its message, detail or hint. Returns the three.
#[track_caller]
pub fn refused(client: &mut Client, sql: &str, code: &str, says: &[&str]) -> [String; 3] {
    let (found, message, detail, hint) = error(client, sql);
    let all = format!("{message}\n{detail}\n{hint}");
    assert_eq!(found, code, "{sql}\n{all}");
    for part in says {
        assert!(all.contains(part), "{sql}\nnothing of \"{part}\" in\n{all}");
    }
    [message, detail, hint]
}

/// Sets a parameter for all, and waits until a new session has it.
#[track_caller]
pub fn set(bed: &Bed, name: &str, value: &str) {
    let client = &mut bed.connect();
    run(client, &format!("ALTER SYSTEM SET {name} = '{value}'"));
    run(client, "SELECT pg_reload_conf()");
    wait_until("the parameter is set", PATIENCE, || text(&mut bed.connect(), &format!("SHOW {name}")), |v| v == value);
}

/// Has the model answer, so that `backfill()` sends no probe for the next minute: then the provider can be told to hold
/// its answers before a job starts.
#[track_caller]
pub fn warm(client: &mut Client, table: &str) {
    run(client, "BEGIN");
    backfill(client, table);
    run(client, "ROLLBACK");
}

/// Options of a job with small requests.
pub const SMALL: &str = "options => '{\"max_rows_per_request\": 5}'";

/// A job of `tickets` with so many rows, 5 a request and `requests` at a time, whose first requests are held back.
#[track_caller]
pub fn held_job(bed: &Bed, client: &mut Client, rows: i64, requests: u64) -> i64 {
    tickets(client, "tickets", 1..=rows);
    run(client, &format!("SELECT llm_batch.alter_model('m', max_concurrent_requests => {requests})"));
    warm(client, "tickets");
    bed.provider.hold();
    let job = backfill_with(client, "tickets", SMALL);
    in_flight(bed, requests);
    job
}

/// Waits until so many requests are held.
#[track_caller]
pub fn in_flight(bed: &Bed, requests: u64) {
    wait_until(
        "requests are held",
        PATIENCE,
        || (bed.provider.holds(), bed.provider.stats().in_flight),
        |found| *found == (true, requests),
    );
}

/// Waits until requests with so many rows are held, and whatever else was answered is written to `tickets`, which has
/// `rows` rows; how many are written.
#[track_caller]
pub fn settled(bed: &Bed, rows: i64, held: i64) -> i64 {
    let client = &mut bed.connect();
    let (_, (_, _, written)) = wait_until(
        "what was answered is written",
        PATIENCE,
        || {
            let holds = bed.provider.holds();
            let stats = bed.provider.stats();
            (holds, (stats.rows.len() as i64, stats.rows_in_flight as i64, rows - left(client, "tickets")))
        },
        |(holds, (asked, in_flight, written))| *holds && *in_flight == held && asked - in_flight == *written,
    );
    written
}

/// Pauses a job whose requests are held, and lets go of them when it will send no more; then it stands still.
#[track_caller]
pub fn pause_held(bed: &Bed, client: &mut Client, job: i64) {
    run(client, &format!("SELECT llm_batch.pause({job})"));
    let queued = "SELECT sum(queued)::bigint FROM llm_batch.activity";
    wait_until("nothing is queued", PATIENCE, || one(client, queued), |n| *n == 0);
    bed.provider.release();
    let said = format!("SELECT status FROM llm_batch.job_state WHERE job_id = {job}");
    wait_until("it stands still", PATIENCE, || text(client, &said), |s| s == "paused");
}

/// The job filled all rows of `tickets`, each is right and none was asked twice.
#[track_caller]
pub fn all_right_once(bed: &Bed, client: &mut Client, p: &Progress, rows: i64) {
    assert_eq!(p.counts(), (rows, rows, 0, 0, 0, 0), "{p:?}");
    assert_eq!((wrong(client, "tickets"), left(client, "tickets")), (0, 0));
    let stats = bed.provider.stats();
    assert_eq!(stats.rows.len() as i64, rows);
    let twice: Vec<_> = stats.rows.iter().filter(|(_, r)| r.asked != 1).collect();
    assert!(twice.is_empty(), "asked more than once: {twice:?}");
}

/// A table whose rows the provider answers by their ids.
#[track_caller]
pub fn numbered(client: &mut Client, name: &str, ids: std::ops::RangeInclusive<i64>) {
    let (first, last) = (ids.start(), ids.end());
    run(
        client,
        &format!(
            "CREATE TABLE {name} (id bigint PRIMARY KEY, body text, answer text, amount numeric(5, 2), due date);
             INSERT INTO {name} (id, body) SELECT i, concat('#r', lpad(i::text, 6, '0'), ':x#') FROM generate_series({first}, {last}) i"
        ),
    );
}

/// The lines of all requests that say of the row that it is asked again.
pub fn asked_again(bed: &Bed, id: i64) -> Vec<String> {
    let row = format!("#r{id:06}:");
    let bodies = bed.provider.bodies();
    let users = bodies.iter().filter_map(|b| b["messages"][1]["content"].as_str());
    let lines = users.flat_map(|user| user.lines().map(str::to_owned));
    lines.filter(|line| line.contains(&row) && line.contains("(asked again: ")).collect()
}

/// How often the row with this id was asked.
#[track_caller]
pub fn asked_of(bed: &Bed, id: i64) -> u32 {
    bed.provider.stats().rows.get(&format!("{id:06}")).map_or(0, |row| row.asked)
}
