//! Routes: which of a stream's models takes its rows, and which one is left if some have stopped.

use std::collections::BTreeMap;

use llm_batch_core::route::{self, Model, Rates, Turn};

use super::State;
use super::circuits::{self, Circuits, EndpointKey};
use crate::group::Group;
use crate::key::{GroupId, LaneKey};
use crate::protocol::{Policy, Stop, StopReason, Verdict};
use crate::route::{Member, Stopped};
use crate::row::Row;

/// Time (ms) for which a model that refuses its key, or is out of credit or quota, is left alone, unless the provider
/// says.
const STOPPED_FOR: u64 = 300_000;
/// Until when (ms) one is left alone that cannot answer the task.
const FOREVER: u64 = u64::MAX;

/// The members of a group that can take rows: a bit each.
fn open(circuits: &BTreeMap<EndpointKey, Circuits>, group: &Group, now: u64) -> u32 {
    let is_open = |member: &Member| {
        !member.is_stopped(now) && (circuits.is_empty() || circuits::is_closed(circuits, &member.lane, &member.stream))
    };
    group.members.iter().rev().fold(0, |open, member| open << 1 | u32::from(is_open(member)))
}

/// The turn of a lane to take rows of a group, if it can.
pub fn turn(circuits: &BTreeMap<EndpointKey, Circuits>, group: &Group, lane: &LaneKey, now: u64) -> Option<Turn> {
    let (own, member) = group.member(lane)?;
    let open = open(circuits, group, now);
    (open & own != 0).then_some(Turn { own, open, before: member.before & !group.full })
}

/// When (ms) a member that has stopped is to be tried again for the rows that wait.
pub fn tried_again(group: &Group, lane: &LaneKey, now: u64) -> Option<u64> {
    let (_, member) = group.member(lane).filter(|_| group.queued() > 0)?;
    member.stopped.as_ref().map(|stopped| stopped.until).filter(|at| *at > now && *at != FOREVER)
}

/// When (ms) a member that has stopped is tried again.
fn again_at(now: u64, stop: &Stop) -> u64 {
    match stop.reason {
        StopReason::NoAnswers | StopReason::Rejected => FOREVER,
        _ => now.saturating_add(stop.retry_after_ms.unwrap_or(STOPPED_FOR)),
    }
}

impl State {
    /// Puts the members of a group in the order of what its rows cost, if that decides which is asked.
    pub(super) fn rank(&mut self, now: u64, id: GroupId) {
        let Some(group) = self.groups.get_mut(id) else { return };
        let Policy::Cheapest { .. } = group.stream.policy else { return };
        let priced = |member: &Member| {
            let rates = group.stream.rates.get(member.place).copied().unwrap_or(Rates::UNKNOWN);
            (member.lane.model.clone(), rates)
        };
        let model = |(i, member): (usize, &Member)| {
            let (own, taken) = (priced(member), self.lanes.get(&member.lane));
            let taken = taken.and_then(|lane| lane.standings.taken(group.scope)?.recent(now));
            let kind = group.members.iter().position(|other| priced(other) == own).unwrap_or(i);
            Model { taken, rates: own.1, kind }
        };
        let models: Vec<Model> = group.members.iter().enumerate().map(model).collect();
        let cheaper = route::cheaper(group.counted, &models);
        group.members.iter_mut().zip(cheaper).for_each(|(member, cheaper)| member.before = cheaper);
    }

    /// Returns true if a member of a group other than this lane's can take rows.
    pub(super) fn has_other(&self, now: u64, lane: &LaneKey, group: GroupId) -> bool {
        let group = self.groups.get(group).filter(|group| group.members.len() > 1);
        group.is_some_and(|group| {
            let own = group.member(lane).map_or(0, |(own, _)| own);
            open(&self.circuits, group, now) & !own != 0
        })
    }

    /// Why no member of a group takes rows, if none does: what is over soonest, and before what ends a job. And whose request
    /// it was.
    pub(super) fn out(&self, now: u64, id: GroupId) -> Option<(Stop, Option<u32>)> {
        let group = self.groups.get(id)?;
        let mut soonest: Option<((bool, u64), Stop, Option<u32>)> = None;
        for member in &group.members {
            let stopped = member.stopped.as_ref().filter(|stopped| now < stopped.until);
            let (wait, stop, role) = match stopped {
                Some(Stopped { until, stop, role }) => {
                    let wait = until.saturating_sub(now);
                    (wait, Stop { retry_after_ms: stop.retry_after_ms.map(|_| wait), ..stop.clone() }, *role)
                }
                None => {
                    let (stop, role) = self.down(now, member)?;
                    (stop.retry_after_ms.unwrap_or(FOREVER), stop, Some(role))
                }
            };
            let order = (matches!(stop.reason, StopReason::NotFound | StopReason::Rejected), wait);
            if soonest.as_ref().is_none_or(|(other, ..)| order < *other) {
                soonest = Some((order, stop, role));
            }
        }
        soonest.map(|(_, stop, role)| (stop, role))
    }

    /// A model stops for a group: others take its rows. If none is left, the streams stop.
    pub(super) fn strike(&mut self, now: u64, lane: &LaneKey, id: GroupId, stop: &Stop, role: Option<u32>) {
        let Some(group) = self.groups.get_mut(id) else { return };
        if group.members.len() > 1
            && let Some(member) = group.members.iter_mut().find(|member| member.lane == *lane)
        {
            member.stopped = Some(Stopped { until: again_at(now, stop), stop: stop.clone(), role });
        }
        self.lost(now, id, stop, role);
        if self.has_other(now, lane, id) {
            // Rows that were in doubt with one model are asked of another.
            if let Some(group) = self.groups.get_mut(id) {
                group.hurry();
            }
            self.release(id, false);
        }
    }

    /// A member of a group takes no rows for now. If none is left that does, the streams stop.
    pub(super) fn lost(&mut self, now: u64, id: GroupId, stop: &Stop, role: Option<u32>) {
        let Some(group) = self.groups.get(id) else { return };
        if group.members.len() == 1 {
            return self.stop(id, stop, role);
        }
        if let Some((stop, role)) = self.out(now, id) {
            self.stop(id, &stop, role);
        }
    }

    /// A row that a member could not answer goes to the next, if there is one; else it comes back.
    pub(super) fn fails_over(
        &mut self,
        now: u64,
        lane: &LaneKey,
        id: GroupId,
        mut row: Row,
        verdict: &Verdict,
    ) -> Option<Row> {
        let group = self.groups.get(id)?;
        let own = group.member(lane).map_or(0, |(own, _)| own);
        let is_last = open(&self.circuits, group, now) & !(row.failed | own) == 0;
        if matches!(verdict, Verdict::Answer(_)) || group.members.len() == 1 || is_last {
            return Some(row);
        }
        row.fails_over(own, group.stream.task.options.max_rows_per_request as usize);
        self.again(id, row);
        None
    }
}
