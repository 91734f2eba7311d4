//! Routes where time is simulated: who takes rows, how long none is answered if one does not answer, and when it is back.

use std::collections::{BTreeMap, BTreeSet};

use llm_batch_core::options::AskBy;
use serde_json::json;

use super::tests::{Heard, client, connect, right, rows, said};
use super::*;
use crate::protocol::{self, Alternative, Policy, Rates};
use crate::request::TIMED_OUT;
use crate::tokens;

/// The behaviour of a model on a request.
enum Does {
    /// Answers after so long (ms).
    Answers(u64),
    /// Answers after so long, and thinks so many tokens before.
    Thinks(u64, usize),
    /// Says this at once: status and body.
    Says(u16, &'static str),
    /// The connection is refused.
    Refuses,
    /// Accepts, and is silent.
    IsSilent,
}

const POLICIES: [Policy; 4] =
    [Policy::Failover, Policy::Spread, Policy::Cheapest { overflows: false }, Policy::Cheapest { overflows: true }];

/// A client with a route, and what happened.
struct Sim {
    state: State,
    now: u64,
    conn: u64,
    heard: Heard,
    /// Requests under way by when (ms) they end, with their model, rows, and what comes back.
    under_way: BTreeMap<(u64, u64), Option<Answered>>,
    /// When (ms) rows were answered, and by which model.
    answered: Vec<(u64, usize)>,
    verdicts: BTreeMap<u64, (usize, Verdict)>,
    spent: BTreeMap<usize, Spent>,
    /// Requests with rows, by model: when (ms) each was sent, and its rows.
    sent: BTreeMap<String, Vec<(u64, Vec<u64>)>>,
    stop: Option<Stop>,
    next: u64,
}

/// The dearer the later, by a factor of ten.
fn models(names: &[&str], policy: Policy) -> Stream {
    let mut stream = protocol::tests::stream();
    stream.policy = policy;
    let price = |n| Rates { input: n, cached_input: n, written_input: n, output: 4 * n };
    stream.rates = (0..names.len() as u32).map(|n| price(10_u64.pow(n))).collect();
    stream.task.options.max_rows_per_request = 10;
    stream.task.options.reuse = false;
    stream.model.max_concurrent_requests = Some(12);
    let mut all = names.iter().map(|name| {
        let mut endpoint = stream.endpoint.clone();
        endpoint.base_url = format!("http://127.0.0.1:1/{name}");
        Alternative { endpoint, model: protocol::Model { model: (*name).into(), ..stream.model.clone() } }
    });
    let first = all.next().unwrap();
    Stream { endpoint: first.endpoint, model: first.model, others: all.collect(), ..stream }
}

/// The same, whose rows are decided.
fn deciders(names: &[&str], policy: Policy) -> Stream {
    let mut stream = models(names, policy);
    stream.task.options.ask_by = AskBy::Decisions;
    stream
}

impl Sim {
    fn new(stream: Stream) -> Self {
        let (mut state, now, conn, heard) = connect();
        state.open(now, conn, stream).unwrap();
        Self {
            state,
            now,
            conn,
            heard,
            under_way: BTreeMap::new(),
            answered: Vec::new(),
            verdicts: BTreeMap::new(),
            spent: BTreeMap::new(),
            sent: BTreeMap::new(),
            stop: None,
            next: 0,
        }
    }

    fn rows(&mut self, count: u64) {
        let item = |n| (Item { n, text: format!("row {n}"), isolation: None, again: None }, None);
        let rows = self.next..self.next + count;
        self.next += count;
        self.state.items(self.now, self.conn, rows.map(item).collect()).unwrap();
    }

    fn outstanding(&self) -> usize {
        self.next as usize - self.verdicts.len()
    }

    fn hear(&mut self) {
        while let Some(message) = self.heard.next() {
            match message {
                FromGateway::Outcomes { model, outcomes, spent } => {
                    self.spent.entry(model).or_default().add(&spent);
                    for o in outcomes {
                        if matches!(o.verdict, Verdict::Answer(_)) {
                            self.answered.push((self.now, model));
                        }
                        assert!(self.verdicts.insert(o.n, (model, o.verdict)).is_none(), "two outcomes");
                    }
                }
                FromGateway::Stopped(stop) => self.stop = Some(stop),
                other => panic!("{other:?}"),
            }
        }
    }

    /// Lets so much time (ms) pass, or until all rows have an outcome; `does` is asked with the time, the model and the
    /// rows. At least `window` rows are kept with the gateway.
    fn run(&mut self, ms: u64, window: u64, mut does: impl FnMut(u64, &str, &[u64]) -> Does) {
        let end = self.now + ms;
        loop {
            self.hear();
            if self.outstanding() < window as usize {
                self.rows(window / 2);
            }
            if self.outstanding() == 0 {
                return;
            }
            let (launches, wake) = self.state.pump(self.now);
            for launch in launches {
                self.state.sent(self.now, launch.id);
                self.launch(launch, &mut does);
            }
            self.hear();
            let next = self.under_way.keys().next().map(|(at, _)| *at);
            self.now = next.into_iter().chain(wake).min().unwrap_or(end).max(self.now + 1);
            if self.now > end {
                self.now = end;
                return;
            }
            while let Some(entry) = self.under_way.first_entry().filter(|entry| entry.key().0 <= self.now) {
                let ((_, id), answered) = entry.remove_entry();
                self.state.finish(self.now, id, answered);
            }
        }
    }

    fn launch(&mut self, launch: Launch, does: &mut impl FnMut(u64, &str, &[u64]) -> Does) {
        let rows: Vec<u64> = rows(&launch.body).into_iter().map(|(_, row)| row).collect();
        let model = launch.stream.model.model.clone();
        if !rows.is_empty() {
            self.sent.entry(model.clone()).or_default().push((self.now, rows.clone()));
        }
        let answers = |after, thought| {
            let text = |body: &Value| body.as_str().map_or(0, tokens::count);
            let all = &launch.body;
            let texts = [&all["messages"][0]["content"], &all["messages"][1]["content"], &all["input"]];
            let input = texts.into_iter().map(text).sum::<usize>() + 10;
            let output = if all["input"].is_null() { 3 + 4 * rows.len() } else { 0 };
            (after, right(&launch, input, output + thought))
        };
        let (after, answered) = match does(self.now, &model, &rows) {
            Does::Answers(after) => answers(after, 0),
            Does::Thinks(after, thought) => answers(after, thought),
            Does::Says(status, message) => (20, said(status, &json!({"error": {"message": message}}))),
            Does::Refuses => (5, Answered::broke_off("the connection failed: connection refused".into(), false)),
            Does::IsSilent => (launch.timeout.as_millis() as u64, Answered::broke_off(TIMED_OUT.into(), true)),
        };
        self.under_way.insert((self.now + after, launch.id), Some(answered));
    }

    /// The longest time (ms) without an answer, from this one on.
    fn longest_gap(&self, from: u64) -> u64 {
        let times: Vec<u64> = self.answered.iter().map(|(at, _)| *at).filter(|at| *at >= from).collect();
        let first = times.first().map_or(u64::MAX, |at| at - from);
        times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0).max(first)
    }

    fn requests(&self, model: &str) -> &[(u64, Vec<u64>)] {
        self.sent.get(model).map_or(&[], Vec::as_slice)
    }
}

#[test]
fn the_limits_of_all_models_of_a_spread_add_up() {
    let mut stream = models(&["a", "b", "c"], Policy::Spread);
    let limits = [20_000, 40_000, 80_000];
    stream.model.tokens_per_minute = Some(limits[0]);
    for (other, limit) in stream.others.iter_mut().zip(&limits[1..]) {
        other.model.tokens_per_minute = Some(*limit);
    }
    let mut sim = Sim::new(stream);
    sim.run(60_000, 2_000, |_, _, _| Does::Answers(800));
    let before = sim.spent.clone();
    sim.run(180_000, 2_000, |_, _, _| Does::Answers(800));
    for (model, limit) in limits.iter().enumerate() {
        let used = |spent: &BTreeMap<usize, Spent>| spent[&model].input_tokens + spent[&model].output_tokens;
        let used = (used(&sim.spent) - used(&before)) as f64 / (3 * limit) as f64;
        println!("model {model}: {used:.3} of its limit");
        assert!((0.96..=1.01).contains(&used), "model {model}: {used}");
    }
    assert!(sim.verdicts.values().all(|(_, verdict)| matches!(verdict, Verdict::Answer(_))));
}

#[test]
fn the_next_model_takes_over_from_one_that_does_not_answer_until_that_is_back() {
    type Fails = fn() -> Does;
    let ways: [(&str, Fails, u64); 3] = [
        ("refuses connections", || Does::Refuses, 3_000),
        ("answers 503", || Does::Says(503, "overloaded"), 3_000),
        ("is silent", || Does::IsSilent, 2 * 1_200 + 3_000),
    ];
    let names = ["first", "second"];
    let streams = [
        ("chats", models(&names, Policy::Failover)),
        ("decisions", deciders(&names, Policy::Failover)),
        ("by costs", models(&names, Policy::Cheapest { overflows: false })),
    ];
    for ((of, stream), (what, fails, most)) in streams.iter().flat_map(|stream| ways.map(|way| (stream, way))) {
        let what = format!("{of}: {what}");
        let mut stream = stream.clone();
        (stream.task.options.max_rows_per_request, stream.model.max_concurrent_requests) = (3, Some(4));
        stream.others.iter_mut().for_each(|other| other.model.max_concurrent_requests = Some(4));
        let mut sim = Sim::new(stream);
        let mut n = 0;
        let usual = move || {
            n += 1;
            Does::Answers(if n % 10 == 0 { 1_200 } else { 600 })
        };
        let mut first = usual;
        sim.run(60_000, 60, move |_, _, _| first());
        assert!(sim.requests("second").is_empty(), "{what}: the second is asked though the first answers");
        // Requests that are under way when it goes down come back.
        let down = sim.now;
        let back = down + 90_000;
        let mut second = usual;
        sim.run(90_000, 60, move |_, model, _| if model == "first" { fails() } else { second() });
        let gap = sim.longest_gap(down);
        assert!(gap <= most, "{what}: {gap} ms without an answer");
        let tried = sim.requests("first").iter().filter(|(at, _)| (down + most..back).contains(at)).count();
        assert_eq!(tried, 0, "{what}: what is down gets no rows");
        // It is back, and none of its rows is asked of both but those that were under way.
        let mut usual = usual;
        sim.run(60_000, 60, move |_, _, _| usual());
        let again = sim.requests("first").iter().map(|(at, _)| *at).find(|at| *at >= back);
        let again = again.unwrap_or(u64::MAX) - back;
        println!("{what}: {gap} ms without an answer, back after {again} ms");
        assert!(again <= 30_000, "{what}: back on the first after {again} ms");
        let last = sim.answered.last().unwrap();
        assert_eq!(last.1, 0, "{what}: the first answers at last");
        let settled = sim.requests("second").iter().filter(|(at, _)| *at > back + again + 2_000).count();
        assert_eq!(settled, 0, "{what}: the second is left alone again");
        let lost: BTreeSet<u64> = {
            let of_down = sim.requests("first").iter().filter(|(at, _)| (down - 1_300..back + again).contains(at));
            of_down.flat_map(|(_, rows)| rows).copied().collect()
        };
        let mut asked: BTreeMap<u64, u32> = BTreeMap::new();
        let all = sim.sent.values().flatten().flat_map(|(_, rows)| rows);
        all.for_each(|row| *asked.entry(*row).or_default() += 1);
        let twice: Vec<_> = asked.iter().filter(|(row, n)| **n > 1 && !lost.contains(row)).collect();
        assert!(twice.is_empty(), "{what}: asked twice: {twice:?}");
        assert!(sim.verdicts.values().all(|(_, v)| matches!(v, Verdict::Answer(_))), "{what}");
    }
}

#[test]
fn a_model_that_stops_is_struck_out_and_the_last_one_stops_the_stream() {
    for (status, message) in [(401, "wrong key"), (402, "no money"), (404, "no such model")] {
        for policy in POLICIES {
            let mut sim = Sim::new(models(&["first", "second"], policy));
            sim.rows(400);
            sim.run(120_000, 0, |_, model, _| match model {
                "first" => Does::Says(status, message),
                _ => Does::Answers(500),
            });
            assert!(sim.stop.is_none(), "{status}: {:?}", sim.stop);
            assert!(sim.verdicts.len() == 400 && sim.answered.iter().all(|(_, model)| *model == 1), "{status}");
            assert!(sim.requests("first").len() <= 8, "{status}: {} requests", sim.requests("first").len());
            assert_eq!(sim.spent.get(&0).map_or(0, |spent| spent.requests), 0, "{status}");
            // Now the other one too.
            let before = sim.verdicts.len();
            sim.rows(50);
            sim.run(120_000, 0, |_, _, _| Does::Says(status, message));
            assert!(sim.stop.is_some(), "{status}: the last one stops the stream");
            assert!(sim.verdicts.values().skip(before).all(|(_, verdict)| *verdict == Verdict::Withdrawn), "{status}");
        }
    }
}

#[test]
fn what_one_model_refuses_is_asked_of_the_next_before_it_is_given_up() {
    for policy in POLICIES {
        let mut sim = Sim::new(models(&["first", "second"], policy));
        sim.rows(300);
        sim.run(60_000, 0, |_, _, _| Does::Answers(300));
        // Row 333 is refused by the first, row 444 by both.
        sim.rows(200);
        sim.run(300_000, 0, |_, model, rows| {
            let is_refused = rows.contains(&444) || (rows.contains(&333) && model == "first");
            if is_refused { Does::Says(400, "this text is refused") } else { Does::Answers(300) }
        });
        assert!(sim.stop.is_none(), "{:?}", sim.stop);
        assert_eq!(sim.verdicts.len(), 500);
        let failed: Vec<_> = sim.verdicts.iter().filter(|(_, (_, v))| !matches!(v, Verdict::Answer(_))).collect();
        assert!(
            matches!(failed.as_slice(), [(444, (_, Verdict::Fail { class, .. }))] if class == "rejected"),
            "{failed:?}"
        );
        assert_eq!(sim.verdicts[&333].0, 1);
        let alone = |model| sim.requests(model).iter().filter(|(_, rows)| *rows == [444]).count();
        assert!(alone("first") == 1 && alone("second") == 1, "{} and {}", alone("first"), alone("second"));
    }
}

/// With a deadline, dearer models take what the cheaper have no room for; without one they take nothing.
#[test]
fn dearer_models_take_what_the_cheaper_have_no_room_for() {
    for overflows in [true, false] {
        // The cheapest is named last.
        let mut stream = models(&["a", "b", "c"], Policy::Cheapest { overflows });
        stream.rates.reverse();
        let limits = [u64::MAX, 40_000, 20_000];
        for (other, limit) in stream.others.iter_mut().zip(&limits[1..]) {
            other.model.tokens_per_minute = Some(*limit);
        }
        stream.model.max_concurrent_requests = Some(1);
        let mut sim = Sim::new(stream);
        sim.run(60_000, 2_000, |_, _, _| Does::Answers(2_000));
        let before = sim.spent.clone();
        sim.run(180_000, 2_000, |_, _, _| Does::Answers(2_000));
        let took = |model| {
            let of = |spent: &BTreeMap<usize, Spent>| spent.get(&model).map_or(0, |s| s.input_tokens + s.output_tokens);
            of(&sim.spent) - of(&before)
        };
        let used = |model| took(model) as f64 / (3 * limits[model]) as f64;
        println!("{overflows}: {:.3} and {:.3} of their limits, {} tokens of the dearest", used(2), used(1), took(0));
        assert!((0.96..=1.01).contains(&used(2)), "{overflows}: {}", used(2));
        if overflows {
            // It answers one request each two seconds.
            assert!((0.96..=1.01).contains(&used(1)) && sim.requests("a").len() > 80, "{}", used(1));
        } else {
            assert!(sim.requests("a").is_empty() && sim.requests("b").is_empty());
        }
    }
}

/// One model under two keys is no dearer than itself: both are asked, be there a deadline or not.
#[test]
fn keys_of_the_cheapest_share_its_rows() {
    let mut stream = models(&["cheap", "cheap", "dear"], Policy::Cheapest { overflows: false });
    stream.rates[1] = stream.rates[0];
    stream.others[0].endpoint.base_url.push_str("/2");
    let limits = [20_000, 40_000];
    stream.model.tokens_per_minute = Some(limits[0]);
    stream.others[0].model.tokens_per_minute = Some(limits[1]);
    let mut sim = Sim::new(stream);
    sim.run(60_000, 2_000, |_, _, _| Does::Answers(800));
    let before = sim.spent.clone();
    sim.run(120_000, 2_000, |_, _, _| Does::Answers(800));
    for (model, limit) in limits.iter().enumerate() {
        let took = |spent: &BTreeMap<usize, Spent>| spent[&model].input_tokens + spent[&model].output_tokens;
        let used = (took(&sim.spent) - took(&before)) as f64 / (2 * limit) as f64;
        assert!((0.96..=1.01).contains(&used), "{model}: {used}");
    }
    assert!(sim.requests("dear").is_empty());
}

/// The cheapest has room for all, so that nobody else is asked in a hurry either.
#[test]
fn what_the_cheapest_has_room_for_is_asked_of_no_other() {
    let mut stream = models(&["dear", "cheap"], Policy::Cheapest { overflows: true });
    stream.rates.reverse();
    let mut sim = Sim::new(stream);
    for _ in 0..100 {
        sim.rows(30);
        sim.run(60_000, 0, |_, _, _| Does::Answers(300));
    }
    assert!(sim.verdicts.len() == 3_000 && sim.requests("dear").is_empty(), "{} requests", sim.requests("dear").len());
}

/// A model that thinks takes more than its prices say: some requests show it.
#[test]
fn costs_are_measured_and_not_read_off_the_prices() {
    let mut sim = Sim::new(models(&["thinks", "plain"], Policy::Cheapest { overflows: false }));
    sim.run(60_000, 500, |_, model, _| if model == "thinks" { Does::Thinks(800, 2_000) } else { Does::Answers(800) });
    let (thinks, plain) = (sim.requests("thinks").len(), sim.requests("plain").len());
    println!("{thinks} requests to the one that thinks, {plain} to the other");
    assert!(thinks <= 12 && plain > 100, "{thinks} and {plain}");
    // The next job knows it.
    sim.run(60_000, 0, |_, _, _| Does::Answers(800));
    sim.state.disconnect(sim.now, sim.conn);
    (sim.conn, sim.heard) = client(&mut sim.state);
    sim.state.open(sim.now, sim.conn, models(&["thinks", "plain"], Policy::Cheapest { overflows: false })).unwrap();
    sim.run(10_000, 500, |_, _, _| Does::Answers(800));
    assert!(sim.requests("thinks").len() == thinks && sim.requests("plain").len() > plain);
}
