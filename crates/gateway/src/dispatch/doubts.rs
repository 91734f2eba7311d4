//! Troubles that may be the model's fault: no row is charged until the model has answered the row's task.

use llm_batch_core::dialect::{Finish, Reply};
use llm_batch_core::pack::Size;
use llm_batch_core::patience::{Next, Way};

use super::{Asked, State};
use crate::cache::TextKey;
use crate::key::{GroupId, LaneKey};
use crate::protocol::{Stop, StopReason, Verdict};
use crate::redact::presentable;
use crate::row::Row;

/// Characters of an answer without a valid row that are shown.
const MOST_SHOWN: usize = 200;
/// The detail of a row where the model thought and wrote no answer.
pub(super) const ONLY_THOUGHT: &str = "the model wrote its reasoning and no answer, and nothing is taken from reasoning; thinking is turned off \
    by llm_batch.alter_model(…, parameters => …) with {\"chat_template_kwargs\": {\"enable_thinking\": false}} for vLLM, \
    SGLang and llama.cpp, {\"think\": false} or {\"reasoning_effort\": \"none\"} for Ollama, {\"reasoning_effort\": \"none\"} or \
    \"minimal\" for OpenAI, {\"thinkingConfig\": {\"thinkingLevel\": \"minimal\"}} or {\"thinkingBudget\": 0} for Gemini, {\"thinking\": {\"type\": \"disabled\"}} for \
    Anthropic";

/// The evidence that an answer gives for or against a model and a task.
pub(super) enum Said {
    /// The number of its rows that are valid.
    Valid(usize),
    /// It was cut off, and the next one will be longer.
    Cut,
    /// No row is valid.
    Barren,
}

impl State {
    /// Takes an answer to a request into account. True if the task is given up.
    pub(super) fn weigh(&mut self, now: u64, lane_key: &LaneKey, group_id: GroupId, asked: Asked, said: Said) -> bool {
        let Some((lane, group)) = self.lanes.get_mut(lane_key).zip(self.groups.get_mut(group_id)) else {
            return false;
        };
        let forms = lane.learned.forms;
        let standing = lane.standings.of(now, asked.scope);
        let options = &group.stream.task.options;
        let form = asked.learned.form(options);
        let next = match said {
            Said::Valid(rows) => {
                let is_own_fault = standing.patience.is_proven(now) && standing.patience.way().0 == Way::AsEver;
                standing.patience.valid(now);
                match asked.way {
                    Way::AsEver => {}
                    way => {
                        let most = options.max_rows_per_request as usize;
                        if let Some(size) = group.size(lane_key) {
                            if way == Way::OtherForm { *size = Size::new(most) } else { size.at_most(rows) }
                        }
                    }
                }
                // Held rows may belong to other streams of the same task.
                for id in self.same(lane_key, asked.scope) {
                    self.release(id, is_own_fault);
                }
                return false;
            }
            Said::Cut => standing.patience.cut(now),
            Said::Barren => {
                let has_other = standing.has_other(forms, form, options);
                standing.patience.barren(now, asked.turn, has_other, options.max_rows_per_request)
            }
        };
        if next == Next::OtherForm {
            standing.forms.give_up(form);
        }
        next == Next::GiveUp
    }

    /// A form was refused that is tried because others had no valid row. True if it was.
    pub(super) fn form_is_refused(&mut self, now: u64, lane_key: &LaneKey, group_id: GroupId, asked: Asked) -> bool {
        let Some((lane, group)) = self.lanes.get_mut(lane_key).zip(self.groups.get_mut(group_id)) else {
            return false;
        };
        let forms = lane.learned.forms;
        let standing = lane.standings.of(now, asked.scope);
        if asked.way != Way::OtherForm {
            return false;
        }
        let options = &group.stream.task.options;
        let form = asked.learned.form(options);
        if asked.turn == standing.patience.way().1 {
            let has_other = standing.has_other(forms, form, options);
            standing.patience.next_way(now, has_other);
        }
        standing.forms.give_up(form);
        true
    }

    /// Stops all who ask this task of this model: no answer has a valid row.
    pub(super) fn give_up(&mut self, now: u64, lane_key: &LaneKey, scope: TextKey, last: &str) {
        let Some(lane) = self.lanes.get_mut(lane_key) else { return };
        lane.standings.of(now, scope).begin_anew();
        let message = format!("no answer has a valid row, whichever way the model is asked; the last answer is {last}");
        self.notice(now, lane_key, "stopped", &message);
        let stop = Stop { reason: StopReason::NoAnswers, message, retry_after_ms: None };
        self.stop_task(now, lane_key, scope, &stop, None);
    }

    /// Stops all who ask this task of this model for a while, unless a request that was sent before did so: of its requests
    /// none is answered.
    pub(super) fn hold(
        &mut self,
        now: u64,
        lane_key: &LaneKey,
        asked: Asked,
        reason: StopReason,
        message: String,
        role: Option<u32>,
    ) {
        let Some(lane) = self.lanes.get_mut(lane_key) else { return };
        let Some(wait) = lane.standings.of(now, asked.scope).hold(now, asked.sent) else { return };
        self.notice(now, lane_key, "stopped", &message);
        let stop = Stop { reason, message, retry_after_ms: Some(wait) };
        self.stop_task(now, lane_key, asked.scope, &stop, role);
    }

    pub(super) fn stop_task(&mut self, now: u64, lane_key: &LaneKey, scope: TextKey, stop: &Stop, role: Option<u32>) {
        for group in self.same(lane_key, scope) {
            let own = self.groups.get(group).map(|group| group.scope).filter(|own| *own != scope);
            match (own, self.lanes.get_mut(lane_key)) {
                // One that has another way of asking goes on in that.
                (Some(own), Some(lane)) => {
                    lane.standings.of(now, own).cheaper.failed(now, true);
                }
                _ => self.strike(now, lane_key, group, stop, role),
            }
        }
    }

    /// The groups of a lane that ask the same task.
    fn same(&self, lane: &LaneKey, scope: TextKey) -> Vec<GroupId> {
        let groups = self.lanes.get(lane).into_iter().flat_map(|lane| self.groups.of(lane));
        groups.filter(|(_, group)| group.asks(scope)).map(|(id, _)| id).collect()
    }

    /// A row is done with. Without a label it is held as long as it may not be its fault.
    pub(super) fn conclude(&mut self, now: u64, lane_key: &LaneKey, group_id: GroupId, row: Row, verdict: Verdict) {
        let Some(row) = self.fails_over(now, lane_key, group_id, row, &verdict) else { return };
        let Some((lane, group)) = self.lanes.get_mut(lane_key).zip(self.groups.get(group_id)) else { return };
        let place = group.place(lane_key);
        let standing = lane.standings.of(now, group.asking(row.service).scope);
        let is_rejected = matches!(&verdict, Verdict::Fail { class, .. } if class == "rejected");
        let in_doubt = if is_rejected { !standing.is_accepted } else { standing.patience.is_in_doubt(now) };
        if !in_doubt || matches!(verdict, Verdict::Answer(_)) {
            self.done(group_id, place, row, verdict);
            return;
        }
        let rows = self.wanted(group_id, vec![row]);
        if let Some(group) = self.groups.get_mut(group_id) {
            group.held.extend(rows.into_iter().map(|row| (row, verdict.clone())));
        }
    }

    /// Lets go of what is held. Unless it is the rows' own fault, those that were not refused are asked again.
    pub(super) fn release(&mut self, group_id: GroupId, is_own_fault: bool) {
        let Some(group) = self.groups.get_mut(group_id) else { return };
        if !is_own_fault {
            group.forgive();
        }
        for (row, verdict) in std::mem::take(&mut group.held) {
            let is_refused =
                matches!(&verdict, Verdict::Fail { class, .. } | Verdict::Skip { class, .. } if is_refusal(class));
            if is_own_fault || is_refused {
                self.done(group_id, 0, row, verdict);
            } else {
                self.again(group_id, row);
            }
        }
    }

    /// If nothing else is left of a group that could tell whose fault it is, what is held is done with.
    pub(super) fn release_last(&mut self, group_id: GroupId) {
        let Some(group) = self.groups.get_mut(group_id) else { return };
        if !group.held.is_empty() && group.queued() == 0 && group.in_flight == 0 {
            self.release(group_id, true);
        }
    }
}

/// Returns true if a verdict of this class is about a single row, whatever happens to others.
fn is_refusal(class: &str) -> bool {
    matches!(class, "rejected" | "refused")
}

/// The words of an answer without a valid row, on a line and without keys.
pub(super) fn shown(reply: &Reply, key: &str, thought: u64, is_thought: bool) -> String {
    let text = presentable(&reply.text, key);
    let cut = text.char_indices().nth(MOST_SHOWN).map_or(text.len(), |(end, _)| end);
    let dots = if cut < text.len() { "…" } else { "" };
    match (text.get(..cut).unwrap_or_default(), reply.finish) {
        ("", Finish::Length) => format!("empty: all of its {thought} tokens went into thinking"),
        ("", Finish::Refused) => "a refusal".to_owned(),
        ("", Finish::Complete) if is_thought => format!("empty: {ONLY_THOUGHT}"),
        ("", Finish::Complete) => "empty".to_owned(),
        (text, _) => format!("\"{text}{dots}\""),
    }
}
