//! Rows that may share requests: their queues, and how the next pack is taken from them.

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

use llm_batch_core::dialect::{Format, Service, decisions};
use llm_batch_core::limiter::{self, Class, Tokens};
use llm_batch_core::pack::{self, Bounds, Size};
use llm_batch_core::patience::Way;
use llm_batch_core::prompt;
use llm_batch_core::route::{Taken, Turn, Used};
use llm_batch_core::task::Span;

use crate::asking::Asking;
use crate::cache::{Keys, TextKey};
use crate::key::LaneKey;
use crate::protocol::{Again, Item, Policy, Prices, Stream, Verdict, most_text};
use crate::purse::Purse;
use crate::queue::{Queue, Ready};
use crate::route::Member;
use crate::row::{Row, Waiter};
use crate::ruler::{Line, Ruler};
use crate::tokens;

/// Tokens of a row's line, as long as none is known.
const USUAL_LINE: f64 = 40.0;
/// Tokens that stand around a schema.
const SCHEMA_FRAME_TOKENS: usize = 12;

/// Rows of the same stream settings: they may share requests, if their isolation is the same as well.
#[derive(Debug)]
pub struct Group {
    /// The models that take its rows; never none.
    pub members: Vec<Member>,
    pub stream: Rc<Stream>,
    /// The way of asking, and that by decisions where there are two.
    asking: Asking,
    decided: Option<Asking>,
    /// The scope of its answers, however they are asked for.
    pub scope: TextKey,
    /// Memory that it takes beside its rows, about: the stream, and what was made of it.
    pub bytes: usize,
    /// Tokens of a row's line in the mean, of late; where there is one way of asking it is not known.
    line: f64,
    /// Rows that have not been asked yet.
    fresh: Queue,
    retry: VecDeque<Row>,
    /// Rows that would have been given up with these verdicts, if it were known that the model can answer the task at all.
    pub held: Vec<(Row, Verdict)>,
    /// The waiters of each row, queued or under way; the first pays.
    waiters: HashMap<TextKey, Vec<Waiter>>,
    /// Clients of which more rows are just being taken in.
    pub coming: usize,
    /// Requests under way.
    pub in_flight: usize,
    /// Its rows of late by our count, where the members are asked in the order of what they cost.
    pub counted: Taken,
    /// The members that have no room now, a bit each, where others need not wait for them.
    pub full: u32,
    /// The rest of its budget, if it has one.
    pub purse: Option<Purse>,
    /// Rows sent, divided by priority: the group with the least goes next.
    pub served: f64,
    /// The request that it would send next, if the limiter has refused it.
    pub refused: Option<Refused>,
}

/// A request that was refused by the limiter of a lane.
#[derive(Debug, Clone, Copy)]
pub struct Refused {
    pub size: limiter::Size,
    /// The rows that were queued then: with others it is not the next request.
    pub queued: usize,
    /// The terms by which it was made: the member, the service, the way, and most rows of a trial.
    pub terms: (u32, Service, Way, Option<usize>),
}

/// The next rows that a group has to send.
pub enum Next {
    Rows(Vec<Row>),
    /// Nothing before this time (ms).
    Until(u64),
    Empty,
}

/// The result of handing in a row.
#[derive(Debug, PartialEq, Eq)]
pub enum Pushed {
    Queued,
    /// The same text waits already: it is sent once.
    Joined,
    /// It is larger than a request may be.
    TooLong,
}

impl Group {
    pub fn new(stream: Rc<Stream>, keys: &Keys) -> Self {
        let asking = Asking::new(&stream, keys);
        let decided = stream.task.decided().map(|task| Asking::new(&Stream { task, ..Stream::clone(&stream) }, keys));
        Self {
            members: Member::all(&stream),
            scope: asking.scope,
            bytes: asking.bytes + decided.as_ref().map_or(0, |decided| decided.bytes),
            line: USUAL_LINE,
            asking,
            decided,
            stream,
            fresh: Queue::default(),
            retry: VecDeque::new(),
            held: Vec::new(),
            waiters: HashMap::new(),
            coming: 0,
            in_flight: 0,
            counted: Taken::default(),
            full: 0,
            purse: None,
            served: 0.0,
            refused: None,
        }
    }

    /// The way in which a service is asked.
    pub fn asking(&self, service: Service) -> &Asking {
        self.decided.as_ref().filter(|_| service == Service::Decisions).unwrap_or(&self.asking)
    }

    /// The way of asking by decisions, if there is another one.
    pub fn decided(&self) -> Option<&Asking> {
        self.decided.as_ref()
    }

    /// Returns true if it asks what has this scope.
    pub fn asks(&self, scope: TextKey) -> bool {
        self.asking.scope == scope || self.decided.as_ref().is_some_and(|decided| decided.scope == scope)
    }

    /// Tokens of a row's question that its line is not counted with: it may be asked without one.
    fn extra(&self, service: Service) -> usize {
        self.decided.as_ref().filter(|_| service == Service::Decisions).map_or(0, |decided| decided.question_tokens)
    }

    /// The answer of a row.
    fn answer(&self, row: &Row, service: Service) -> Span {
        let is_decided = self.decided.is_some() && service == Service::Decisions;
        if is_decided { Span { mean: 0.0, planned: 0 } } else { row.answer }
    }

    /// Costs of so many rows in one request, by our count, with so many tokens in their lines.
    pub fn costs(&self, service: Service, (rows, lines): (usize, f64), prices: Prices) -> f64 {
        let asking = self.asking(service);
        let input = asking.prefix_tokens as f64 + lines + (rows * self.extra(service)) as f64;
        let answer = asking.kind.tokens(lines as usize / rows.max(1)).mean;
        let output = asking.answer_frame as f64 + rows as f64 * answer;
        prices.cost(input, output)
    }

    /// Tokens of a row's line in the mean, of late.
    pub fn line(&self) -> f64 {
        self.line
    }

    pub fn class(&self) -> Class {
        if self.stream.interactive { Class::Interactive } else { Class::Bulk }
    }

    /// The member of a lane, and its bit.
    pub fn member(&self, lane: &LaneKey) -> Option<(u32, &Member)> {
        let at = self.members.iter().position(|member| member.lane == *lane)?;
        Some((1 << at, self.members.get(at)?))
    }

    /// The number of rows that go into a request of a lane.
    pub fn size(&mut self, lane: &LaneKey) -> Option<&mut Size> {
        self.members.iter_mut().find(|member| member.lane == *lane).map(|member| &mut member.size)
    }

    /// The place of a lane's model among those of the stream.
    pub fn place(&self, lane: &LaneKey) -> usize {
        self.member(lane).map_or(0, |(_, member)| member.place)
    }

    /// The lane of its first model.
    pub fn first_lane(&self) -> Option<&LaneKey> {
        self.members.first().map(|member| &member.lane)
    }

    /// Most tokens of a request that holds a row alone, by what is set for its models.
    pub fn most_of_a_row(&self) -> u64 {
        self.members.iter().map(|member| member.stream.model.max_request_tokens).min().unwrap_or_default()
    }

    /// A lane has no more room: the lanes behind it, if that is new and they need not wait for it.
    pub fn fills(&mut self, lane: &LaneKey) -> Vec<LaneKey> {
        let Policy::Cheapest { overflows: true } = self.stream.policy else { return Vec::new() };
        let own = self.member(lane).map_or(0, |(own, _)| own);
        let is_new = self.full & own == 0;
        self.full |= own;
        let behind = self.members.iter().filter(|member| is_new && member.before & own != 0);
        behind.map(|member| member.lane.clone()).collect()
    }

    /// Rows that are to be asked again need not wait: another member is asked.
    pub fn hurry(&mut self) {
        self.retry.iter_mut().for_each(|row| (row.not_before, row.trouble) = (0, 0));
    }

    /// The ruler of its texts.
    pub fn ruler(&self) -> Ruler {
        let most_tokens = self.most_of_a_row();
        // In either way it fits.
        let decided = self.decided.as_ref().map_or(0, |decided| decided.frame() + decided.question_tokens);
        let frame = self.asking.frame().max(decided);
        Ruler {
            kind: Arc::clone(&self.asking.kind),
            service: self.stream.task.service(),
            question_tokens: self.asking.question_tokens,
            most_bytes: most_text(most_tokens),
            most: (most_tokens as usize).saturating_sub(frame),
            too_long: self.stream.task.options.too_long,
        }
    }

    /// Queues a row, cut if it has to be and may be. Rows with the same key are sent once. `line`: its line, if it was made
    /// before.
    pub fn push(
        &mut self,
        now: u64,
        conn: u64,
        (item, line): (Item, Option<Line>),
        compartment: TextKey,
        key: TextKey,
    ) -> Pushed {
        let waiter = Waiter { conn, n: item.n, bytes: item.text.len() };
        if let Some(waiters) = self.waiters.get_mut(&key) {
            waiters.push(waiter);
            return Pushed::Joined;
        }
        let Line { quoted, tokens, answer } = line.unwrap_or_else(|| self.ruler().line(&item.text));
        if quoted.is_empty() {
            return Pushed::TooLong;
        }
        self.waiters.insert(key, vec![waiter]);
        let most_rows = self.stream.task.options.max_rows_per_request as usize;
        if let Policy::Cheapest { .. } = self.stream.policy {
            let (input, output) =
                ((tokens + self.asking.prefix_tokens / most_rows.max(1)) as u64, answer.planned as u64);
            let used = Used { all: Tokens { input, output }, ..Used::default() };
            self.counted.observe(now, (input + output) as f64, used);
        }
        let mut row = Row::new(key, compartment, conn, quoted, (tokens, answer), most_rows);
        match item.again {
            None => self.fresh.push(now, row),
            Some(Again { attempts, hint }) => {
                let most_attempts = self.stream.task.options.max_attempts;
                row.most_rows = pack::rows_after(attempts, most_attempts, most_rows);
                (row.attempts, row.wanted) = (attempts, Some(hint));
                self.push_again(row);
            }
        }
        Pushed::Queued
    }

    pub fn push_again(&mut self, mut row: Row) {
        if row.wanted.is_some() {
            row.tokens =
                tokens::count(&prompt::row(417, &row.quoted, row.wanted.as_deref())) + self.asking.question_tokens;
        }
        self.retry.push_back(row);
    }

    /// Queues a row again, before the others.
    pub fn push_next(&mut self, row: Row) {
        self.retry.push_front(row);
    }

    /// The attempts of its rows were not their fault.
    pub fn forgive(&mut self) {
        let most = self.stream.task.options.max_rows_per_request as usize;
        let held = self.held.iter_mut().map(|(row, _)| row);
        self.retry.iter_mut().chain(held).for_each(|row| row.forgive(most));
    }

    pub fn queued(&self) -> usize {
        self.fresh.len() + self.retry.len()
    }

    /// The waiters of a row, the one that pays first.
    pub fn waiters(&self, row: &Row) -> &[Waiter] {
        self.waiters.get(&row.key).map_or(&[], Vec::as_slice)
    }

    /// The client that pays for each of these rows.
    pub fn payers(&self, rows: &[Row]) -> Vec<u64> {
        rows.iter().filter_map(|row| self.waiters(row).first()).map(|w| w.conn).collect()
    }

    /// A row is done with: who waited for it.
    pub fn take_waiters(&mut self, row: &Row) -> Vec<Waiter> {
        self.waiters.remove(&row.key).unwrap_or_default()
    }

    /// Removes the waiters of a row that `leaves` names.
    pub fn let_go(&mut self, key: TextKey, leaves: &dyn Fn(u64) -> bool) -> Vec<Waiter> {
        let Some(waiters) = self.waiters.get_mut(&key) else { return Vec::new() };
        let (gone, stay): (Vec<Waiter>, Vec<Waiter>) = waiters.iter().partition(|w| leaves(w.conn));
        *waiters = stay;
        gone
    }

    /// Takes clients out of the queues and of what is held, with the rows that nobody else waits for. Rows under way are not
    /// touched.
    pub fn withdraw(&mut self, leaves: &dyn Fn(u64) -> bool) -> Vec<Waiter> {
        let fresh = self.fresh.drain().into_iter().map(|row| (row, true));
        let retry = std::mem::take(&mut self.retry).into_iter().map(|row| (row, false));
        let mut gone = Vec::new();
        for (row, verdict) in std::mem::take(&mut self.held) {
            gone.append(&mut self.let_go(row.key, leaves));
            if self.waiters(&row).is_empty() {
                self.waiters.remove(&row.key);
            } else {
                self.held.push((row, verdict));
            }
        }
        for (mut row, is_fresh) in fresh.chain(retry) {
            gone.append(&mut self.let_go(row.key, leaves));
            match self.waiters(&row).first() {
                Some(first) if is_fresh => {
                    row.conn = first.conn;
                    self.fresh.add(row, false);
                }
                Some(_) => self.retry.push_back(row),
                None => drop(self.waiters.remove(&row.key)),
            }
        }
        gone
    }

    /// The key of a row's compartment: rows of another isolation get another one, and rows without any a third.
    pub fn compartment(&self, keys: &Keys, item: &Item) -> TextKey {
        item.isolation.as_ref().map_or(self.scope, |isolation| keys.of(self.scope, isolation))
    }

    /// The next rows to send in one request of at most `tokens` (prompt and answer), by our count of tokens, and of at most so
    /// many rows, asked of this service and in this way. `number`: bytes of each number of a vector in an answer. Never none: a
    /// row that does not fit even alone is the caller's to notice.
    pub fn next(
        &mut self,
        now: u64,
        (tokens, number): (usize, Option<f64>),
        (service, way, trial): (Service, Way, Option<usize>),
        lane: &LaneKey,
        turn_of: Turn,
    ) -> Next {
        let Some((_, member)) = self.member(lane) else { return Next::Empty };
        let most = way.rows(member.size.rows()).min(trial.unwrap_or(usize::MAX));
        let (frame, extra) = (self.asking(service).frame(), self.extra(service));
        let most_texts = member.stream.embeddings().map(|(embed, e)| embed.most_rows(number).min(e.most_texts()));
        let choices = self.asking(service).kind.choices().zip(member.stream(service).decisions());
        let most_questions = choices.map(|(choices, d)| decisions::most_rows(choices).min(d.most_questions()));
        let most_inputs = member.stream.limits().most_inputs().map(|n| n as usize);
        let most = [most_texts, most_questions, most_inputs].into_iter().flatten().fold(most, usize::min);
        let takes_fresh = turn_of.takes(0);
        // A row that was not asked before is the best test of whether a model answers at all.
        let fresh_first = takes_fresh && way != Way::AsEver && self.fresh.len() > 0;
        let retry_at = self.retry.iter().filter(|r| turn_of.takes(r.failed)).map(|r| r.not_before).min();
        let retry_ready = retry_at.is_some_and(|at| at <= now);
        let mut turn = None;
        if !retry_ready || fresh_first {
            let ready = Ready {
                now,
                is_idle: self.in_flight == 0 && self.coming == 0,
                is_coming: self.coming > 0,
                rows: most,
                // Lines alone are counted there.
                tokens: (tokens.saturating_sub(frame) as f64 * self.line / (self.line + extra as f64)) as usize,
            };
            match if takes_fresh { self.fresh.ready(ready) } else { Err(None) } {
                Ok(compartment) => turn = Some(compartment),
                Err(_) if retry_ready => {}
                Err(fresh_at) => return retry_at.into_iter().chain(fresh_at).min().map_or(Next::Empty, Next::Until),
            }
        }
        // Rows that were asked before go first; each bounds the size of the request it is in.
        let mut rows: Vec<Row> = Vec::new();
        let mut cap = most;
        let mut i = 0;
        let no_retry = fresh_first && turn.is_some();
        while let Some(row) = self.retry.get(i).filter(|_| !no_retry) {
            if row.not_before > now
                || !turn_of.takes(row.failed)
                || turn.is_some_and(|compartment| compartment != row.compartment)
            {
                i += 1;
                continue;
            }
            if rows.len() + 1 > cap.min(row.most_rows) {
                break;
            }
            turn = Some(row.compartment);
            cap = cap.min(row.most_rows);
            rows.extend(self.retry.remove(i));
        }
        if let Some(compartment) = turn.filter(|_| takes_fresh) {
            rows.append(&mut self.fresh.take(compartment, cap.saturating_sub(rows.len())));
        }
        let n = self.fit(&rows, tokens, service).max(1);
        self.put_back(rows.split_off(n));
        Next::Rows(rows)
    }

    /// The number of these rows that fit into a request of so many tokens, by our count.
    pub fn fit(&self, rows: &[Row], tokens: usize, service: Service) -> usize {
        let bounds = Bounds { rows: rows.len(), tokens, fixed: self.asking(service).frame() };
        let extra = self.extra(service);
        pack::fit(bounds, rows.iter().map(|row| row.tokens + extra + self.answer(row, service).planned))
    }

    /// Puts rows back to where they came from, in order.
    pub fn put_back(&mut self, rows: Vec<Row>) {
        let most = self.stream.task.options.max_rows_per_request as usize;
        for row in rows.into_iter().rev() {
            if row.attempts + row.trouble + row.failed > 0 || row.most_rows < most {
                self.retry.push_front(row);
            } else {
                self.fresh.add(row, true);
            }
        }
    }

    /// Tokens of a request with these rows, by our count.
    pub fn tokens(&self, rows: &[Row], format: Option<&Format>, service: Service) -> Tokens {
        let schema = match format {
            Some(Format::Schema { schema, .. }) => tokens::count(&schema.to_string()) + SCHEMA_FRAME_TOKENS,
            _ => 0,
        };
        let (asking, extra) = (self.asking(service), self.extra(service));
        let prompt = asking.prefix_tokens + schema + rows.iter().map(|r| r.tokens + extra).sum::<usize>();
        let answer = rows.iter().map(|r| self.answer(r, service).planned).sum::<usize>();
        Tokens { input: prompt as u64, output: (answer + asking.answer_frame) as u64 }
    }

    /// Tokens of the answer to these rows in the mean.
    pub fn mean_answer(&self, rows: &[Row], service: Service) -> f64 {
        rows.iter().map(|r| self.answer(r, service).mean).sum::<f64>() + self.asking(service).answer_frame as f64
    }

    /// The texts of rows as they are.
    pub fn texts(&self, rows: &[Row]) -> Vec<String> {
        rows.iter().map(|row| serde_json::from_str(&row.quoted).unwrap_or_default()).collect()
    }

    /// The two messages of a request: fixed prefix and rows under these ids.
    pub fn messages(&self, rows: &[Row], ids: &[u16], service: Service) -> (&str, String) {
        let lines: Vec<String> =
            ids.iter().zip(rows).map(|(id, row)| prompt::row(*id, &row.quoted, row.wanted.as_deref())).collect();
        (&self.asking(service).system, lines.concat())
    }

    /// The size of the request that it would send next by these terms, as far as that is known.
    pub fn next_size(&self, terms: (u32, Service, Way, Option<usize>)) -> Option<limiter::Size> {
        self.refused.filter(|refused| refused.terms == terms && refused.queued == self.queued()).map(|r| r.size)
    }

    /// Rows go out.
    pub fn count_served(&mut self, now: u64, rows: &[Row]) {
        self.in_flight += 1;
        self.refused = None;
        if self.decided.is_some() {
            let mean = rows.iter().map(|row| row.tokens).sum::<usize>() as f64 / rows.len().max(1) as f64;
            self.line = (self.line + mean) / 2.0;
        }
        self.served += rows.len() as f64 / f64::from(self.stream.task.options.priority.max(1));
        if let Some(row) = rows.first() {
            self.fresh.sent(now, row.compartment);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::tests::stream;

    fn group() -> Group {
        Group::new(Rc::new(stream()), &Keys::default())
    }

    fn item(n: u64) -> Item {
        Item { n, text: format!("text {n}"), isolation: None, again: None }
    }

    fn next(g: &mut Group, now: u64, tokens: usize) -> Next {
        let lane = g.members[0].lane.clone();
        g.next(now, (tokens, None), (Service::Chat, Way::AsEver, None), &lane, Turn::ALONE)
    }

    fn rows(next: Next) -> Vec<Row> {
        match next {
            Next::Rows(rows) => rows,
            Next::Until(at) => panic!("until {at}"),
            Next::Empty => panic!("empty"),
        }
    }

    #[test]
    fn clients_of_a_group_take_turns() {
        let mut g = group();
        for n in 0..100 {
            g.push(0, 1, (item(n), None), 0, n.into());
        }
        g.push(0, 2, (item(1_000), None), 0, 1_000);
        let first = rows(next(&mut g, 0, 100_000));
        assert_eq!(first.len(), 50);
        assert!(first.iter().take(2).any(|r| r.key == 1_000));
    }

    #[test]
    fn the_same_text_is_sent_once_and_goes_on_for_who_stays() {
        let mut g = group();
        assert_eq!(g.push(0, 1, (item(7), None), 0, 7), Pushed::Queued);
        assert_eq!(g.push(0, 2, (item(7), None), 0, 7), Pushed::Joined);
        assert_eq!(g.queued(), 1);
        let gone = g.withdraw(&|conn| conn == 1);
        assert_eq!((gone.len(), g.queued()), (1, 1));
        assert_eq!(g.withdraw(&|conn| conn == 2).len(), 1);
        assert_eq!((g.queued(), g.waiters.len()), (0, 0));
    }

    #[test]
    fn rows_of_another_isolation_are_in_another_compartment_and_have_another_answer() {
        let (keys, g) = (Keys::default(), group());
        let of =
            |isolation: Option<&str>| g.compartment(&keys, &Item { isolation: isolation.map(Into::into), ..item(1) });
        assert_eq!(of(None), g.scope);
        assert_eq!(of(Some("a")), of(Some("a")));
        assert_ne!(of(Some("a")), of(Some("b")));
        assert_ne!(of(Some("")), of(None));
    }

    #[test]
    fn rows_that_are_asked_again_are_not_joined_by_others_either() {
        let mut g = group();
        for n in 0..40 {
            g.push(0, 1, (item(n), None), u128::from(n % 4), n.into());
        }
        let mut all: Vec<Row> = (0..4).flat_map(|_| rows(next(&mut g, 0, 100_000))).collect();
        all.sort_by_key(|row| row.key);
        for mut row in all {
            row.most_rows = if row.key < 20 { 5 } else { 50 };
            row.attempts = 1;
            g.push_again(row);
        }
        g.push(0, 1, (item(40), None), 0, 40);
        let mut seen = 0;
        while g.queued() > 0 {
            let pack = rows(next(&mut g, 1_000, 100_000));
            assert!(pack.iter().all(|row| row.compartment == pack[0].compartment));
            assert!(pack.len() <= pack.iter().map(|row| row.most_rows).min().unwrap());
            seen += pack.len();
            g.count_served(1_000, &pack);
        }
        assert_eq!(seen, 41);
    }

    #[test]
    fn rows_wait_for_company_only_while_others_are_under_way_and_keep_coming() {
        let mut g = group();
        g.push(100, 1, (item(1), None), 0, 1);
        let first = rows(next(&mut g, 100, 100_000));
        assert_eq!(first.len(), 1);
        g.count_served(100, &first);
        g.push(100, 1, (item(2), None), 0, 2);
        assert!(matches!(next(&mut g, 105, 100_000), Next::Until(120)));
        for at in [115, 130, 145, 160, 175] {
            g.push(at, 1, (item(at), None), 0, at.into());
        }
        assert!(matches!(next(&mut g, 179, 100_000), Next::Until(180)));
        assert_eq!(rows(next(&mut g, 180, 100_000)).len(), 6);
    }
}
