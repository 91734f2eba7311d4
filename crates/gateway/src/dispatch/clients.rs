//! Clients: they connect, open streams and leave, and those that are idle give their places to others.

use std::collections::BTreeMap;
use std::rc::Rc;

use llm_batch_core::limiter::Tokens;
use tokio::sync::Notify;

use super::State;
use crate::frames::Frames;
use crate::key::{GroupId, LaneKey};
use crate::lane::Lane;
use crate::places::Places;
use crate::protocol::{FromGateway, Full, Outcome, Spent, Stream};
use crate::route::Member;
use crate::row::Waiter;

/// A session that has asked nothing for so long (ms), and waits for nothing, gives its place to another one.
pub(super) const IDLE: u64 = 1_000;

/// A client.
pub(super) struct Conn {
    pub(super) frames: Frames,
    /// When (ms) it last opened a stream or sent rows.
    pub(super) came: u64,
    pub(super) stream: Option<(GroupId, Rc<Stream>)>,
    /// Messages with rows that are being taken in.
    pub(super) coming: usize,
    pub(super) outstanding: usize,
    pub(super) outstanding_bytes: usize,
    /// Bytes of a message of which a part has come.
    pub(super) coming_bytes: usize,
    /// It has something to say that is not read for want of memory.
    pub(super) is_held_back: bool,
    /// Reports to it, by the place of the model in its stream.
    pub(super) reports: BTreeMap<usize, Report>,
    /// It was told to stop: nothing more is sent for it until it opens a stream again.
    pub(super) stopped: bool,
    /// Woken when it leaves.
    pub(super) left: Rc<Notify>,
}

/// Outcomes and spending that a client is to be told of a model.
#[derive(Default)]
pub(super) struct Report {
    pub(super) outcomes: Vec<Outcome>,
    pub(super) spent: Spent,
}

impl Conn {
    /// The report on the model at this place.
    pub(super) fn report(&mut self, model: usize) -> &mut Report {
        self.reports.entry(model).or_default()
    }

    /// The stream of a session.
    fn session(&self) -> Option<&Stream> {
        self.stream.as_ref().map(|(_, stream)| &**stream).filter(|stream| stream.interactive)
    }

    /// Nothing is lost with it: it has got all answers, and what it may spend need not be taken for spent.
    fn is_idle(&self) -> bool {
        let has_budget = self.stream.as_ref().is_some_and(|(_, stream)| stream.budget.is_some());
        let is_silent = self.coming == 0 && self.coming_bytes == 0 && !self.is_held_back;
        self.outstanding == 0 && is_silent && self.frames.is_empty() && !has_budget
    }

    /// It has been idle for long enough.
    pub(super) fn gives_way(&self, now: u64) -> bool {
        self.is_idle() && self.came + IDLE <= now
    }
}

impl State {
    pub fn connect(&mut self, frames: Frames) -> u64 {
        let id = self.id();
        self.conns.insert(
            id,
            Conn {
                frames,
                came: 0,
                stream: None,
                coming: 0,
                outstanding: 0,
                outstanding_bytes: 0,
                coming_bytes: 0,
                is_held_back: false,
                reports: BTreeMap::new(),
                stopped: false,
                left: Rc::new(Notify::new()),
            },
        );
        id
    }

    /// Closes a connection, once what was said to it is written.
    pub(super) fn hang_up(&mut self, now: u64, conn: u64) {
        if let Some(c) = self.conns.get(&conn) {
            c.frames.hang_up();
        }
        self.disconnect(now, conn);
    }

    pub fn is_connected(&self, conn: u64) -> bool {
        self.conns.contains_key(&conn)
    }

    pub fn disconnect(&mut self, now: u64, conn: u64) {
        self.comes(conn, 0);
        self.shares = None;
        self.withdraw(conn);
        let stream = self.conns.remove(&conn).and_then(|c| {
            c.left.notify_one();
            c.stream
        });
        let Some((group, _)) = stream else { return };
        let (gone, _) = self.leave(conn, group);
        self.bytes = gone.iter().fold(self.bytes, |bytes, waiter| bytes.saturating_sub(waiter.bytes));
        self.tidy(now, group);
    }

    /// A client waits for nothing any more: all of its rows come back.
    pub fn abandon(&mut self, conn: u64) {
        self.withdraw(conn);
        let Some(group) = self.group_of(conn) else { return };
        let (gone, worst) = self.leave(conn, group);
        for (model, worst) in worst {
            if let Some(c) = self.conns.get_mut(&conn) {
                let spent = &mut c.report(model).spent;
                spent.unconfirmed_input_tokens += worst.input;
                spent.unconfirmed_output_tokens += worst.output;
            }
        }
        self.give_back(gone);
        self.flush();
    }

    /// Lets go of a client's rows that are under way. Requests that nobody else waits for are given up: what each of these may
    /// take at the worst, and by which model.
    pub(super) fn leave(&mut self, conn: u64, group_id: GroupId) -> (Vec<Waiter>, Vec<(usize, Tokens)>) {
        let (mut gone, mut worst) = (Vec::new(), Vec::new());
        let Some(group) = self.groups.get_mut(group_id) else { return (gone, worst) };
        for request in self.in_flight.values_mut().filter(|r| r.group == group_id) {
            let (before, mut is_wanted) = (gone.len(), false);
            for row in &request.rows {
                gone.append(&mut group.let_go(row.key, &|c| c == conn));
                is_wanted |= !group.waiters(row).is_empty();
            }
            if !is_wanted {
                request.abandoned.notify_one();
            }
            if !is_wanted && gone.len() > before {
                // Clients that ask for its rows from now on have no part in it.
                request.is_accounted = true;
                worst.push((group.place(&request.lane), request.asked.worst));
            }
        }
        (gone, worst)
    }

    pub fn open(&mut self, now: u64, conn: u64, mut stream: Stream) -> Result<(), String> {
        let Some(c) = self.conns.get_mut(&conn) else { return Ok(()) };
        if c.outstanding > 0 {
            return Err("a stream was opened while rows of another one wait".to_owned());
        }
        if stream.interactive
            && let Some(full) = self.full(now, conn, stream.role)
        {
            self.say(conn, &FromGateway::Full(full));
            self.hang_up(now, conn);
            return Ok(());
        }
        let Some(c) = self.conns.get_mut(&conn) else { return Ok(()) };
        c.came = now;
        c.stopped = false;
        stream.task.options = stream.task.options.in_effect();
        let stream = Rc::new(stream);
        self.next_id += 1;
        let lane = self.lanes.get(&LaneKey::of(&stream));
        let (group_id, group) = self.groups.open(lane, GroupId(self.next_id), conn, &stream, &self.keys);
        let kept = &self.kept;
        for Member { lane: key, stream, .. } in &group.members {
            let new = || {
                let mut lane = Lane::new(stream.limits(), kept.lane(key), kept.known_since(), now);
                lane.learned.forms = stream.endpoint.api.dialect().forms();
                lane
            };
            let lane = self.lanes.entry(key.clone()).or_insert_with(new);
            if !lane.groups.contains(&group_id) {
                lane.groups.push(group_id);
            }
        }
        // Clients that ask the same keep it once.
        let before = c.stream.replace((group_id, Rc::clone(&group.stream)));
        self.shares = None;
        // A client that asks again after all models have stopped may have mended the cause.
        if self.out(now, group_id).is_some()
            && let Some(group) = self.groups.get_mut(group_id)
        {
            group.members.iter_mut().for_each(|member| member.stopped = None);
        }
        self.tidy(now, group_id);
        if let Some((old, _)) = before {
            self.tidy(now, old);
        }
        Ok(())
    }

    /// No client has a place any more.
    pub fn is_crowded(&self) -> Option<Full> {
        let most = self.places.sessions + self.places.others;
        (self.conns.len() >= most).then_some(Full::Gateway(most))
    }

    /// Why there is no place for the stream of a session. Those that are idle give way.
    fn full(&mut self, now: u64, conn: u64, role: u32) -> Option<Full> {
        while let Some((most, is_role)) = self.too_large_tasks(role) {
            let is_other = |stream: &Stream| !is_role || stream.role == role;
            let sessions = self.conns.iter().filter(|(id, c)| **id != conn && c.session().is_some_and(is_other));
            let Some(idlest) =
                sessions.filter(|(_, c)| c.gives_way(now)).min_by_key(|(_, c)| c.came).map(|(id, _)| *id)
            else {
                return Some(Full::Memory(most));
            };
            self.hang_up(now, idlest);
        }
        let Places { of_a_role, sessions, .. } = self.places;
        for (full, most) in [(Full::Role(of_a_role), of_a_role), (Full::Gateway(sessions), sessions)] {
            let counts = |stream: &Stream| full == Full::Gateway(sessions) || stream.role == role;
            let others = self.conns.iter().filter(|(id, c)| **id != conn && c.session().is_some_and(counts));
            let (mut count, mut idlest) = (0, None);
            for (id, c) in others {
                count += 1;
                if c.gives_way(now) && idlest.is_none_or(|(came, _)| c.came < came) {
                    idlest = Some((c.came, *id));
                }
            }
            if count < most {
                continue;
            }
            let Some((_, idlest)) = idlest else { return Some(full) };
            // It opens its stream anew when it has something to ask.
            self.hang_up(now, idlest);
        }
        None
    }
}
