//! Fates of rows, with a simulated clock and made-up answers.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ops::Range;

use llm_batch_core::dialect::{Api, Sent};
use llm_batch_core::options::StructuredOutput;
use serde_json::json;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::clients::IDLE;
use super::*;
use crate::frames::Frames;
use crate::kept::Stock;
use crate::protocol::{self, decode};

/// A request: the numbers of its rows and those of their texts, and all of it.
pub(super) struct Question {
    pub(super) rows: Vec<(u16, u64)>,
    pub(super) body: Value,
}

impl Question {
    fn of(body: Value) -> Self {
        Self { rows: rows(&body), body }
    }

    pub(super) fn right(&self) -> Answered {
        self.answered(20, 5)
    }

    /// The right answer, which took so many tokens of a prompt and of an answer.
    pub(super) fn answered(&self, input: usize, output: usize) -> Answered {
        let answers: Value =
            self.rows.iter().map(|(id, _)| (id.to_string(), json!("a"))).collect::<serde_json::Map<_, _>>().into();
        let text = if self.rows.is_empty() { "ok".to_owned() } else { answers.to_string() };
        said(
            200,
            &json!({
                "choices": [{"message": {"content": text}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": input, "completion_tokens": output},
            }),
        )
    }
}

/// An answer with this status and body.
pub(super) fn said(status: u16, body: &Value) -> Answered {
    self::body(status, body.to_string().as_bytes(), None)
}

/// The same with a body of any kind, and a wait (ms) that is asked for.
pub(super) fn body(status: u16, body: &[u8], retry_after: Option<u64>) -> Answered {
    answer_in(Sent::default(), (status, body), retry_after)
}

/// The answer to a request that asked for this.
pub(super) fn answer(sent: Sent<'_>, status: u16, body: &[u8]) -> Answered {
    answer_in(sent, (status, body), None)
}

fn answer_in(sent: Sent<'_>, (status, body): (u16, &[u8]), retry_after: Option<u64>) -> Answered {
    let result = trouble::outcome(Api::Openai, sent, status, body, retry_after);
    let mut answered = Answered::broke_off(String::new(), false);
    (answered.result, answered.has_begun) = (result, status == 200);
    answered
}

/// The messages of a gateway to its client.
pub(super) struct Heard {
    frames: UnboundedReceiver<Vec<u8>>,
    unread: Rc<Cell<usize>>,
}

impl Heard {
    pub(super) fn next(&mut self) -> Option<FromGateway> {
        let Ok(mut frame) = self.frames.try_recv() else {
            self.unread.set(0);
            return None;
        };
        decode(&mut frame).unwrap()
    }
}

/// A gateway that has run for two minutes, the time (ms), and a client of it.
pub(super) fn connect() -> (State, u64, u64, Heard) {
    let settings = Settings { enabled: true, memory: 64 << 20, cache: 0 };
    let (log, _) = mpsc::channel();
    let kept = Kept::new(Stock::default());
    let now = kept.now() + 120_000;
    let mut state = State::new(settings, Places::within(16_384), kept, log);
    let (conn, heard) = client(&mut state);
    (state, now, conn, heard)
}

/// A further client.
pub(super) fn client(state: &mut State) -> (u64, Heard) {
    let (queue, frames) = unbounded_channel();
    let unread = Rc::new(Cell::new(0));
    let conn = state.connect(Frames::new(queue, Rc::clone(&unread), Rc::new(Notify::new())));
    (conn, Heard { frames, unread })
}

/// The rows of a request, by their numbers and those of their texts.
pub(super) fn rows(body: &Value) -> Vec<(u16, u64)> {
    let row = |line: &str| {
        let (id, text) = line.split_once(": \"row ")?;
        Some((id.parse().ok()?, text.split([' ', '"']).next()?.parse().ok()?))
    };
    let text = body["messages"][1]["content"].as_str().or(body["input"].as_str()).unwrap_or_default();
    text.lines().filter_map(row).collect()
}

/// The right answer to a chat or to questions, with these tokens of a prompt and of an answer.
pub(super) fn right(launch: &Launch, input: usize, output: usize) -> Answered {
    let ids = &launch.ids;
    let sent = Sent { service: launch.stream.task.service(), ids, ..Sent::default() };
    let body = if sent.service == Service::Decisions {
        let answers: Vec<Value> =
            ids.iter().map(|id| json!({"type": "choice", "name": id.to_string(), "choice": "a"})).collect();
        json!({"answers": answers, "usage": {"input_tokens": input, "output_tokens": output}})
    } else {
        let is_bare = rows(&launch.body).is_empty();
        let answers: serde_json::Map<_, _> = ids.iter().map(|id| (id.to_string(), json!("a"))).collect();
        let text = if is_bare { "ok".to_owned() } else { Value::from(answers).to_string() };
        let choice = json!({"message": {"content": text}, "finish_reason": "stop"});
        json!({"choices": [choice], "usage": {"prompt_tokens": input, "completion_tokens": output}})
    };
    answer(sent, 200, body.to_string().as_bytes())
}

/// A client of a gateway.
pub(super) struct Sim {
    state: State,
    pub(super) now: u64,
    conn: u64,
    heard: Heard,
    pub(super) outcomes: BTreeMap<u64, Outcome>,
    pub(super) stop: Option<Stop>,
    /// Requests that each text was in.
    pub(super) asked: BTreeMap<u64, u32>,
    pub(super) requests: u32,
}

impl Sim {
    pub(super) fn new(change: impl FnOnce(&mut Stream)) -> Self {
        let (state, now, conn, heard) = connect();
        let (outcomes, asked) = Default::default();
        let mut sim = Self { state, now, conn, heard, outcomes, stop: None, asked, requests: 0 };
        sim.open(change);
        sim
    }

    pub(super) fn open(&mut self, change: impl FnOnce(&mut Stream)) {
        let mut stream = protocol::tests::stream();
        change(&mut stream);
        self.state.open(self.now, self.conn, stream).unwrap();
    }

    pub(super) fn state(&self) -> &State {
        &self.state
    }

    /// Asks for rows, and what came of them.
    pub(super) fn ask(&mut self, rows: Range<u64>, long: &str, mut answer: impl FnMut(&Question) -> Answered) {
        self.outcomes.clear();
        (self.stop, self.requests) = (None, 0);
        let count = rows.end - rows.start;
        let item = |n| (Item { n, text: format!("row {n} {long}"), isolation: None, again: None }, None);
        self.state.items(self.now, self.conn, rows.map(item).collect()).unwrap();
        for _ in 0..100_000 {
            while let Some(message) = self.heard.next() {
                match message {
                    FromGateway::Outcomes { outcomes, .. } => {
                        self.outcomes.extend(outcomes.into_iter().map(|o| (o.n, o)));
                    }
                    FromGateway::Stopped(stop) => self.stop = Some(stop),
                    other => panic!("{other:?}"),
                }
            }
            if self.outcomes.len() as u64 == count {
                return;
            }
            let (launches, wake) = self.state.pump(self.now);
            let least = if launches.is_empty() { wake.unwrap_or(self.now) } else { 0 };
            launches.iter().for_each(|launch| self.state.sent(self.now, launch.id));
            self.now = (self.now + 100).max(least);
            for launch in launches {
                let question = Question::of(launch.body);
                self.requests += 1;
                question.rows.iter().for_each(|(_, n)| *self.asked.entry(*n).or_default() += 1);
                self.state.finish(self.now, launch.id, Some(answer(&question)));
            }
        }
        panic!("{} of {count} rows have an outcome: {:?}", self.outcomes.len(), self.state.lanes);
    }

    pub(super) fn is_answered(&self) -> bool {
        self.stop.is_none()
            && self.outcomes.values().all(|o| matches!(o.verdict, Verdict::Answer(_)) && o.attempts == 1)
    }

    pub(super) fn is_withdrawn(&self, reason: StopReason) -> bool {
        self.stop.as_ref().is_some_and(|stop| stop.reason == reason)
            && self.outcomes.values().all(|o| o.verdict == Verdict::Withdrawn && o.attempts == 0)
    }
}

#[test]
fn what_has_been_answered_is_not_failed_for_an_address_that_is_gone_for_a_while() {
    for status in [302, 404, 405] {
        let gone = || said(status, &json!({"error": {"message": "no such route", "code": "model_not_found"}}));
        let mut sim = Sim::new(|_| {});
        sim.ask(0..50, "", |_| gone());
        assert!(
            sim.requests == 1 && sim.stop.as_ref().is_some_and(|stop| stop.retry_after_ms.is_none()),
            "{:?}",
            sim.stop
        );
        sim.open(|_| {});
        sim.ask(100..150, "", Question::right);
        assert!(sim.is_answered());
        // Once in the middle.
        let mut n = 0;
        sim.ask(200..300, "", |question| {
            n += 1;
            if n == 1 { gone() } else { question.right() }
        });
        assert!(sim.is_answered(), "{status}: {:?} {:?}", sim.stop, sim.outcomes);
        // For long: it pauses, and goes on.
        sim.ask(300..400, "", |_| gone());
        assert!(sim.is_withdrawn(StopReason::ProviderDown), "{status}: {:?}", sim.stop);
        let stop = sim.stop.clone().unwrap();
        assert!(stop.message.contains(&status.to_string()) && sim.requests < 20, "{stop:?} {}", sim.requests);
        sim.now += stop.retry_after_ms.unwrap();
        sim.open(|_| {});
        sim.ask(300..400, "", Question::right);
        assert!(sim.is_answered(), "{:?}", sim.stop);
    }
}

/// A request without a readable answer may have been charged like any other.
#[test]
fn what_a_row_may_cost_is_bounded() {
    type Broken = fn(&Question) -> Answered;
    let broken: [(&str, Broken); 3] = [
        ("no JSON", |_| body(200, b"<html>", None)),
        ("no text", |_| said(200, &json!({"choices": []}))),
        ("broken off", |_| Answered::broke_off("the connection failed".into(), true)),
    ];
    for (what, broken) in broken {
        let (mut most, mut failed, mut stops) = (0, 0, 0);
        for seed in 0..20 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut sim = Sim::new(|s| s.task.options.max_rows_per_request = 20);
            sim.ask(0..100, "", Question::right);
            assert!(sim.is_answered());
            sim.ask(1_000..1_400, "", |q| if random.f64() < 0.8 { broken(q) } else { q.right() });
            most = sim.asked.values().copied().fold(most, u32::max);
            let is_charged = |o: &&Outcome| matches!(o.verdict, Verdict::Fail { .. } | Verdict::Skip { .. });
            failed += sim.outcomes.values().filter(is_charged).count();
            stops += usize::from(sim.stop.is_some());
        }
        println!(
            "{what}: a row is in up to {most} requests, {failed} of 8,000 rows are charged, {stops} of 20 jobs pause"
        );
        assert!(most <= 9 && failed <= 80 && stops > 15, "{what}: {most}, {failed}, {stops}");
    }
}

/// The right answer but for the rows that `is_wrong` names: theirs is no label.
fn but_for(question: &Question, mut is_wrong: impl FnMut(u64) -> bool) -> Answered {
    let answer = |(id, n): &(u16, u64)| (id.to_string(), json!(if is_wrong(*n) { "none of them" } else { "a" }));
    let answers: serde_json::Map<String, Value> = question.rows.iter().map(answer).collect();
    said(
        200,
        &json!({
            "choices": [{"message": {"content": Value::from(answers).to_string()}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 20, "completion_tokens": 5},
        }),
    )
}

/// A limit is not used up by what no request can have taken.
#[test]
fn an_absurd_account_of_a_request_is_none() {
    let absurd = 4_294_967_295_u64;
    for usage in [
        json!({"prompt_tokens": absurd, "completion_tokens": 5}),
        json!({"prompt_tokens": 20, "completion_tokens": absurd}),
        json!({"prompt_tokens": 20, "total_tokens": u64::MAX}),
    ] {
        let mut sim = Sim::new(|s| s.model.tokens_per_minute = Some(100_000));
        let begin = sim.now;
        sim.ask(0..200, "", |q| {
            let answers: serde_json::Map<String, Value> =
                q.rows.iter().map(|(id, _)| (id.to_string(), json!("a"))).collect();
            let content = Value::from(answers).to_string();
            said(200, &json!({"choices": [{"message": {"content": content}, "finish_reason": "stop"}], "usage": usage}))
        });
        assert!(sim.is_answered(), "{usage}: {:?} {:?}", sim.stop, sim.outcomes);
        assert!(sim.now - begin < 60_000, "{usage}: {} ms", sim.now - begin);
    }
}

/// Rows that have no valid answer for some times lose nothing where others are answered when they are asked again. A row that
/// never has one is asked as often as its task says where no others fail, and is in no more than nine requests in any case.
#[test]
fn what_fails_in_passing_loses_no_row() {
    let ask = |often: u32, others: u32| {
        let mut asked = BTreeMap::<u64, u32>::new();
        let mut sim = Sim::new(|_| {});
        sim.ask(0..2_000, "", |q| {
            but_for(q, |n| {
                let times = asked.entry(n).or_default();
                *times += 1;
                *times <= if n % 500 == 7 { often } else { others * u32::from(n % 4 == 0) }
            })
        });
        assert!(sim.stop.is_none(), "{:?}", sim.stop);
        let (odd, plain): (Vec<_>, Vec<_>) = sim.outcomes.into_values().partition(|o| o.n % 500 == 7);
        assert!(plain.iter().all(|o| matches!(o.verdict, Verdict::Answer(_))), "{often}, {others}");
        odd.into_iter().map(|o| (matches!(o.verdict, Verdict::Answer(_)), o.attempts)).collect::<Vec<_>>()
    };
    assert_eq!(ask(6, 1), [(true, 7); 4]);
    assert_eq!(ask(6, 0), [(false, 3); 4]);
    assert_eq!(ask(u32::MAX, 0), [(false, 3); 4]);
    let hopeless = ask(u32::MAX, 1);
    assert!(hopeless.iter().all(|(has_answer, attempts)| !has_answer && (4..=9).contains(attempts)), "{hopeless:?}");
}

/// Rows that are never answered are found, be they the last ones.
#[test]
fn rows_that_break_a_server_are_found_and_the_others_answered() {
    for bad in [vec![1_017], vec![1_000, 1_199], (1_194..1_200).collect()] {
        let mut sim = Sim::new(|_| {});
        sim.ask(0..500, "", Question::right);
        let broken = |question: &Question| question.rows.iter().any(|(_, n)| bad.contains(n));
        let mut left: Vec<u64> = Vec::new();
        sim.ask(
            1_000..1_200,
            "",
            |question| if broken(question) { body(200, b"<html>", None) } else { question.right() },
        );
        left.extend(sim.outcomes.values().filter(|o| !matches!(o.verdict, Verdict::Answer(_))).map(|o| o.n));
        assert!(sim.stop.is_none() && left == bad, "{bad:?}: {:?} {left:?}", sim.stop);
        assert!(sim.asked.values().all(|n| *n <= 9), "{:?}", sim.asked.values().max());
    }
}

#[test]
fn what_is_refused_with_parameters_of_ones_own_teaches_no_other() {
    let refused = json!({"error": {"message": "response_format is not supported together with tools"}});
    let mut sim = Sim::new(|s| s.model.parameters = serde_json::Map::from_iter([("tools".into(), json!([]))]));
    let mut formats = Vec::new();
    let mut answer = |question: &Question| {
        let has_form = !question.body["response_format"].is_null();
        formats.push(has_form);
        if has_form && !question.body["tools"].is_null() { said(400, &refused) } else { question.right() }
    };
    sim.ask(0..20, "", &mut answer);
    assert!(sim.is_answered(), "{:?}", sim.stop);
    // It is known of them from then on.
    sim.ask(20..40, "", &mut answer);
    assert!(sim.is_answered() && sim.requests == 1);
    sim.open(|_| {});
    sim.ask(40..60, "", &mut answer);
    assert!(sim.is_answered());
    assert_eq!(formats.last(), Some(&true), "{formats:?}");
}

/// After a restart nothing is known of what was served.
#[test]
fn rows_larger_than_a_limit_are_told_from_a_limit_that_is_none() {
    let over = |limit: u32| {
        let message = format!("Request too large for m on tokens per min (TPM): Limit {limit}, Requested 9000.");
        said(429, &json!({"error": {"message": message, "code": "rate_limit_exceeded", "type": "tokens"}}))
    };
    let long = "word ".repeat(3_000);
    let mut sim = Sim::new(|s| s.task.options.max_rows_per_request = 1);
    sim.ask(0..3, &long, |question| if question.rows.is_empty() { question.right() } else { over(1_000) });
    assert!(sim.stop.is_none(), "{:?}", sim.stop);
    let is_skip = |o: &Outcome| matches!(&o.verdict, Verdict::Skip { class, detail } if class == "too_long" && detail.contains("Limit 1000"));
    assert!(sim.outcomes.values().all(is_skip), "{:?}", sim.outcomes);
    // If no row gets past the limit, no row is at fault.
    let mut sim = Sim::new(|s| s.task.options.max_rows_per_request = 1);
    sim.ask(0..5, &long, |_| over(1));
    assert!(
        sim.is_withdrawn(StopReason::Quota) && sim.requests <= 12,
        "{:?} {} {:?}",
        sim.stop,
        sim.requests,
        sim.outcomes
    );
}

/// Counting the tokens of a long text takes longer than a session may be idle.
#[test]
fn a_session_whose_rows_are_coming_is_not_idle() {
    let mut sim = Sim::new(|s| s.interactive = true);
    let gives_way = |sim: &Sim, now| sim.state.conns[&sim.conn].gives_way(now);
    assert!(!gives_way(&sim, sim.now + IDLE - 1) && gives_way(&sim, sim.now + IDLE));
    let group = sim.state.rows_come(sim.conn);
    assert!(!gives_way(&sim, sim.now + 60 * IDLE));
    sim.state.rows_came(sim.conn, group);
    assert!(gives_way(&sim, sim.now + IDLE));
    // A part of a message has come.
    sim.state.comes(sim.conn, 1_000);
    assert!(!gives_way(&sim, sim.now + 60 * IDLE));
    sim.state.comes(sim.conn, 0);
    assert!(gives_way(&sim, sim.now + IDLE));
    // It is not read, since others have all memory.
    let other = sim.state.connect(Frames::new(unbounded_channel().0, Rc::default(), Rc::default()));
    sim.state.comes(other, sim.state.settings.memory);
    assert!(sim.state.must_wait(sim.conn) && !gives_way(&sim, sim.now + 60 * IDLE));
    sim.state.comes(other, 0);
    assert!(!sim.state.must_wait(sim.conn) && gives_way(&sim, sim.now + IDLE));
}

#[test]
fn a_text_gets_no_more_tokens_than_its_user_has_set() {
    let task = json!({"instruction": "Explain it.", "max_output_tokens": 60});
    let spec = |s: &mut Stream| s.task.spec = llm_batch_core::task::Spec::from_json("generate", &task).unwrap();
    let mut caps = Vec::new();
    let mut sim = Sim::new(spec);
    sim.ask(0..1, "", |question| {
        caps.push(question.body["max_tokens"].as_u64().unwrap());
        question.right()
    });
    assert!(sim.is_answered() && caps.iter().all(|cap| (66..110).contains(cap)), "{caps:?}");
    // An answer that runs into it gets no larger cap; one that only thinks does.
    let long = format!("{{\"417\":\"{}", "It is long. ".repeat(100));
    gets_more(spec, &[(&long, false), ("", true)]);
}

/// Checks whether a row whose answers run into their cap with these texts gets a larger cap.
#[track_caller]
fn gets_more(spec: impl Fn(&mut Stream), texts: &[(&str, bool)]) {
    for (text, more) in texts {
        let (mut sim, mut caps) = (Sim::new(&spec), Vec::new());
        sim.ask(0..1, "", |question| {
            let cap = question.body["max_tokens"].as_u64().unwrap();
            caps.push(cap);
            said(
                200,
                &json!({
                    "choices": [{"message": {"content": text}, "finish_reason": "length"}],
                    "usage": {"prompt_tokens": 20, "completion_tokens": cap},
                }),
            )
        });
        assert_eq!(caps.iter().max() > caps.first(), *more, "{text}: {caps:?}");
    }
}

/// Some models take the ends of a range for the rows' numbers, and repeat them until the cap, whatever it is.
#[test]
fn a_score_that_writes_on_gets_no_larger_cap() {
    let task = json!({"instruction": "How glad?", "low": -4, "high": 4});
    let spec = |s: &mut Stream| s.task.spec = llm_batch_core::task::Spec::from_json("score", &task).unwrap();
    let endless = format!("{{{}", "\"4\":4,\"-4\":-4,\"0\":0,".repeat(40));
    gets_more(spec, &[(&endless, false), ("Let me think. ", true), ("{\"", true)]);
}

/// As many texts a minute as the model takes, however many of them go in a request.
#[test]
fn a_limit_of_texts_holds_for_the_rows_of_requests() {
    let mut sim = Sim::new(|s| s.model.inputs_per_minute = Some(300));
    let (mut most, begin) = (0, sim.now);
    sim.ask(0..1_200, "", |question| {
        most = question.rows.len().max(most);
        question.right()
    });
    assert!(sim.is_answered() && most > 10);
    // The first 300 might go at once; each minute after those takes 300.
    let took = sim.now - begin;
    assert!((180_000..240_000).contains(&took), "{took} ms");
    // A request never has more texts than a minute takes.
    let mut sim = Sim::new(|s| s.model.inputs_per_minute = Some(7));
    most = 0;
    sim.ask(0..20, "", |question| {
        most = question.rows.len().max(most);
        question.right()
    });
    assert!(sim.is_answered() && most <= 7, "{most}");
}

/// A schema that a dialect has no words for is not sent, and its tokens are not counted.
#[test]
fn a_schema_that_is_not_sent_takes_no_tokens() {
    let of = |api| {
        let mut sim = Sim::new(|s| {
            s.endpoint.api = api;
            s.task.options.structured_output = StructuredOutput::JsonSchema;
        });
        let item = |n| (Item { n, text: format!("row {n}"), isolation: None, again: None }, None);
        let estimate = sim.state.estimate(sim.now, sim.conn, (0..20).map(item).collect());
        (estimate.example.unwrap().contains("schema"), estimate.input_tokens)
    };
    let ((is_sent, with), (is_sent_too, without)) = (of(Api::Openai), of(Api::Anthropic));
    assert!(is_sent && !is_sent_too && with > without + 10, "{with} {without}");
}
