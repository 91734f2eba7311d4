//! Tasks that may be asked in a chat or by decisions: which of the two, and when there is only the chat.

use llm_batch_core::dialect::{Reply, Service};
use llm_batch_core::trouble::{Report, Trouble};

use super::{Asked, State};
use crate::group::Group;
use crate::key::{GroupId, LaneKey};
use crate::lane::Lane;
use crate::learned::Learned;
use crate::protocol::Prices;
use crate::route::Member;
use crate::row::Row;
use crate::standing::Standings;

/// Prices of which none is known: a token that is written costs as much as several that are read.
const USUAL: Prices = Prices { input: 1, output: 4 };
/// Words by which a decision is refused for its choices, whatever they are.
const OF_CHOICES: [&str; 3] = ["choice", "criteria", "option"];

/// The service that a member asks next for a group, and most rows of the request while that is tried.
pub fn next(
    now: u64,
    (group, member): (&Group, &Member),
    standings: &mut Standings,
    learned: Learned,
) -> (Service, Option<usize>) {
    match costs_of_a_row((group, member), learned) {
        Some(costs) => standings.of(now, group.scope).cheaper.next(now, costs),
        None => (fallback(group), None),
    }
}

/// The service that is cheaper as far as is known.
pub fn usual(now: u64, (group, member): (&Group, &Member), lane: &mut Lane) -> Service {
    match costs_of_a_row((group, member), lane.learned) {
        Some(costs) => lane.standings.of(now, group.scope).cheaper.cheaper(now, costs),
        None => fallback(group),
    }
}

/// The service that a task asks which asks one alone.
fn fallback(group: &Group) -> Service {
    group.stream.task.service()
}

/// The costs of a row in a full request in either way, by our count; `None` if there is one way alone.
fn costs_of_a_row((group, member): (&Group, &Member), learned: Learned) -> Option<[f64; 2]> {
    let stream = member.decided.as_ref()?;
    let decisions = stream.decisions()?;
    let choices = group.decided()?.kind.choices()?.names.len();
    if choices > learned.most_choices {
        return None;
    }
    let prices = member.stream.model.prices.unwrap_or(USUAL);
    let rows = member.size.rows().max(1);
    let costs =
        |service: Service, rows: usize| group.costs(service, (rows, rows as f64 * group.line()), prices) / rows as f64;
    Some([costs(Service::Chat, rows), costs(Service::Decisions, rows.min(decisions.most_questions()))])
}

/// Learns what a request took, of a group that may be asked in two ways.
pub fn observe(
    now: u64,
    lane: &mut Lane,
    (group, member): (&Group, &Member),
    rows: &[Row],
    asked: Asked,
    reply: &Reply,
) {
    if group.decided().is_none() {
        return;
    }
    let prices = member.stream.model.prices.unwrap_or(USUAL);
    let lines = rows.iter().map(|row| row.tokens).sum::<usize>() as f64;
    let expected = group.costs(asked.service, (rows.len(), lines), prices);
    let actual = reply.usage.whole().map_or(0.0, |took| prices.cost(took.input as f64, took.output as f64));
    lane.standings.of(now, group.scope).cheaper.answered(asked.service, expected, actual);
}

impl State {
    /// A request was not answered. Returns true if that is no more than a reason to ask in a chat: decisions are not served, or
    /// not of so many choices, or not for now.
    pub(super) fn falls_to_chat(
        &mut self,
        now: u64,
        (lane_key, group): (&LaneKey, GroupId),
        asked: Asked,
        report: &Report,
    ) -> bool {
        let Some((lane, group)) = self.lanes.get_mut(lane_key).zip(self.groups.get(group)) else { return false };
        let Some(decided) = group.decided().filter(|_| asked.service == Service::Decisions) else { return false };
        let is_missing = matches!(report.trouble, Trouble::NotFound | Trouble::Misplaced);
        let is_refused = match report.trouble {
            Trouble::Overload(_) => false,
            Trouble::NotFound | Trouble::Misplaced => true,
            // A key may be allowed the one and not the other.
            Trouble::Rejected | Trouble::Auth if !lane.standings.of(now, asked.scope).is_accepted => true,
            _ => return false,
        };
        let words = report.words.to_lowercase();
        let is_of_choices = !is_missing && is_refused && OF_CHOICES.iter().any(|word| words.contains(word));
        if is_missing && lane.record(Service::Decisions).last_success.is_none() {
            lane.learned.most_choices = 0;
        } else if is_of_choices && let Some(choices) = decided.kind.choices().filter(|all| !all.are_levels) {
            let fewer = choices.names.len().saturating_sub(1);
            lane.learned.most_choices = lane.learned.most_choices.min(fewer);
        }
        let is_out = lane.standings.of(now, group.scope).cheaper.failed(now, is_refused);
        if is_out {
            self.notice(now, lane_key, "decisions", &format!("{}; continuing in a chat", report.message));
        }
        is_out
    }
}
