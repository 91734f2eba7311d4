//! Vectors where time is simulated: how many texts a request has, and how many go in a minute.

use std::collections::{BTreeMap, VecDeque};

use llm_batch_core::dialect::{Api, Sent};
use llm_batch_core::task::Spec;
use llm_batch_core::vector;
use serde_json::json;

use super::tests::{Heard, connect};
use super::*;
use crate::protocol;

/// Texts that are with the gateway at most.
const WINDOW: u64 = 3_000;
/// Time (ms) that an answer takes.
const TAKES: u64 = 100;

/// A client that embeds texts, and what happened.
struct Sim {
    state: State,
    now: u64,
    conn: u64,
    heard: Heard,
    dimensions: usize,
    /// When (ms) each request was sent, and its texts.
    sent: Vec<(u64, usize)>,
    /// Words of a text.
    words: usize,
    verdicts: BTreeMap<u64, Verdict>,
}

impl Sim {
    fn new(dimensions: usize, change: impl FnOnce(&mut Stream)) -> Self {
        let (mut state, now, conn, heard) = connect();
        let mut stream = protocol::tests::stream();
        stream.task.spec = Spec::from_json("embed", &json!({"dimensions": dimensions})).unwrap();
        stream.task.options.max_rows_per_request = 2_048;
        stream.task.options.reuse = false;
        change(&mut stream);
        state.open(now, conn, stream).unwrap();
        Self { state, now, conn, heard, dimensions, sent: Vec::new(), words: 0, verdicts: BTreeMap::new() }
    }

    fn text(&self, n: u64) -> String {
        format!("text {n}{}", " word".repeat(self.words))
    }

    /// Tokens of a text.
    fn tokens(&self) -> usize {
        crate::tokens::count(&self.text(100))
    }

    fn vector(&self, n: u64) -> Vec<f32> {
        vec![(n as f32 + 1.0).sqrt() / 7.0; self.dimensions]
    }

    /// An answer with the vectors of these texts.
    fn answer(&self, texts: &[u64], is_base64: bool) -> Answered {
        let one = |(index, n): (usize, &u64)| {
            let vector = self.vector(*n);
            let vector = if is_base64 { json!(vector::encode(&vector)) } else { json!(vector) };
            json!({"index": index, "embedding": vector})
        };
        let data: Vec<Value> = texts.iter().enumerate().map(one).collect();
        let body = json!({"data": data, "usage": {"prompt_tokens": self.tokens() * texts.len()}}).to_string();
        let ids: Vec<u16> = (0..texts.len() as u16).collect();
        let sent = Sent { service: Service::Embeddings, ids: &ids, ..Sent::default() };
        let mut answered = Answered::broke_off(String::new(), false);
        answered.result = trouble::outcome(Api::Openai, sent, 200, body.as_bytes(), None);
        (answered.has_begun, answered.bytes) = (true, body.len());
        answered
    }

    /// Asks for so many texts more; `answer` is asked with the number of the request and its texts.
    fn ask(&mut self, count: u64, mut answer: impl FnMut(&Self, usize, &[u64]) -> Answered) {
        let begin = self.verdicts.len() as u64;
        let mut next = begin;
        let mut under_way: VecDeque<(u64, u64, Vec<u64>)> = VecDeque::new();
        while (self.verdicts.len() as u64) < begin + count {
            let room = (begin + count).min(self.verdicts.len() as u64 + WINDOW);
            let item = |n| (Item { n, text: self.text(n), isolation: None, again: None }, None);
            let items = (next..room).map(item).collect();
            self.state.items(self.now, self.conn, items).unwrap();
            next = next.max(room);
            let (launches, wake) = self.state.pump(self.now);
            for launch in launches {
                self.state.sent(self.now, launch.id);
                let number = |text: &Value| text.as_str().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
                let texts: Vec<u64> = launch.body["input"].as_array().unwrap().iter().map(number).collect();
                self.sent.push((self.now, texts.len()));
                under_way.push_back((self.now + TAKES, launch.id, texts));
            }
            let ends = under_way.front().map(|(at, ..)| *at);
            self.now = wake.into_iter().chain(ends).min().unwrap().max(self.now + 1);
            while let Some((_, id, texts)) = under_way.pop_front_if(|(at, ..)| *at <= self.now) {
                let answered = answer(self, self.sent.len(), &texts);
                self.state.finish(self.now, id, Some(answered));
            }
            while let Some(message) = self.heard.next() {
                let FromGateway::Outcomes { outcomes, .. } = message else { panic!("{message:?}") };
                self.verdicts.extend(outcomes.into_iter().map(|o| (o.n, o.verdict)));
            }
        }
        for (n, verdict) in &self.verdicts {
            let wanted = llm_batch_core::task::Answer(vec![Some(vector::encode(&self.vector(*n)))]);
            assert_eq!(*verdict, Verdict::Answer(wanted), "text {n}");
        }
    }

    fn sizes(&self, from: usize) -> Vec<usize> {
        self.sent.iter().skip(from).map(|(_, texts)| *texts).collect()
    }
}

/// No minute has more texts than the limit allows, wherever it begins, and the limit is used.
#[test]
fn a_limit_of_texts_is_used_and_passed_in_no_minute() {
    for limit in [900, 2_000, 9_000] {
        let mut sim = Sim::new(8, |s| {
            s.model.inputs_per_minute = Some(limit);
            s.model.max_concurrent_requests = Some(16);
        });
        sim.ask(3 * limit, |sim, _, texts| sim.answer(texts, true));
        for (begin, _) in &sim.sent {
            let within = sim.sent.iter().filter(|(at, _)| (*begin..begin + 60_000).contains(at));
            let texts: usize = within.map(|(_, texts)| texts).sum();
            assert!(texts as u64 <= limit, "{limit}: {texts} from {begin} on: {:?}", sim.sent);
        }
        let (Some((first, _)), Some((last, _))) = (sim.sent.first(), sim.sent.last()) else { panic!() };
        // The first minute's texts may go at once.
        assert!(last - first < 3 * 60_000, "{limit}: {} ms", last - first);
        assert_eq!(sim.sizes(0).iter().sum::<usize>() as u64, 3 * limit);
    }
}

/// A request has the texts whose vectors an answer holds: more of them where they come in base64.
#[test]
fn a_request_has_as_many_texts_as_the_encoding_allows() {
    // As long as nobody knows how they will be written.
    let small = 327;
    let mut sim = Sim::new(384, |_| {});
    sim.ask(2_000, |sim, _, texts| sim.answer(texts, false));
    let sizes = sim.sizes(0);
    assert!(sizes[0] <= small && sizes.iter().all(|size| *size < 3 * small), "{sizes:?}");
    let mut sim = Sim::new(384, |_| {});
    sim.ask(6_000, |sim, _, texts| sim.answer(texts, true));
    let sizes = sim.sizes(0);
    assert!(sizes[0] <= small && sizes.iter().any(|size| *size > 1_000), "{sizes:?}");
    // A failure may be that of an answer that is too large. The next requests are small again, until one is answered.
    let (before, mut failures) = (sim.sent.len(), 0);
    sim.ask(4_000, |sim, _, texts| {
        // Those that are under way at the same time.
        failures += 1;
        if failures <= 2 {
            return Answered::broke_off("the provider's answer is larger than 4194304 bytes".to_owned(), true);
        }
        sim.answer(texts, true)
    });
    let sizes = sim.sizes(before);
    let after = sizes.iter().skip_while(|size| **size > small).collect::<Vec<_>>();
    assert!(!after.is_empty() && after.iter().any(|size| **size > 1_000), "{sizes:?}");
}

/// A limit of tokens is used, with requests of a small part of it.
#[test]
fn a_limit_of_tokens_is_used() {
    let limit = 1_000_000;
    let mut sim = Sim::new(8, |s| {
        s.model.tokens_per_minute = Some(limit);
        s.model.max_concurrent_requests = Some(16);
        s.task.options.max_rows_per_request = 500;
    });
    sim.words = 37;
    let of_text = sim.tokens() as u64;
    sim.ask(2 * limit / of_text, |sim, _, texts| sim.answer(texts, true));
    let begin = sim.sent[0].0 + 10_000;
    let end = sim.sent.last().unwrap().0;
    let within = sim.sent.iter().filter(|(at, _)| (begin..end).contains(at));
    let used = within.map(|(_, texts)| *texts as u64 * of_text).sum::<u64>() as f64;
    let used = used / (limit * (end - begin)) as f64 * 60_000.0;
    println!("{used:.3} of the limit, {} requests", sim.sent.len());
    assert!((0.97..=1.01).contains(&used), "{used}: {:?}", sim.sizes(0));
}
