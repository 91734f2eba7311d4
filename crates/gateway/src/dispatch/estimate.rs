//! Estimates of rows before they are sent.

use std::rc::Rc;

use llm_batch_core::patience::Way;
use llm_batch_core::route::Turn;

use super::send::{Draft, rows_of};
use super::{State, cheaper};
use crate::group::{Group, Next};
use crate::learned::Measured;
use crate::protocol::{Estimate, Item};
use crate::ruler::Line;

impl State {
    /// Estimates the requests and tokens of rows, by the measurements of the client's model.
    pub fn estimate(&mut self, now: u64, conn: u64, items: Vec<(Item, Option<Line>)>) -> Estimate {
        let mut sum = Estimate::default();
        let Some((group_id, stream)) = self.conns.get(&conn).and_then(|c| c.stream.clone()) else {
            return sum;
        };
        let Some(known) = self.groups.get(group_id) else { return sum };
        let Some(member) = known.members.first() else { return sum };
        let Some(lane) = self.lanes.get_mut(&member.lane) else { return sum };
        let service = cheaper::usual(now, (known, member), lane);
        let asked = Rc::clone(member.stream(service));
        let (learned, measured) = (lane.learned, lane.record(service).measured);
        let mut group = Group::new(stream, &self.keys);
        let largest = lane.limiter.largest_request().unwrap_or(u64::MAX).min(member.stream.most_tokens());
        let measured =
            Measured { sizes: lane.standings.sizes(group.asking(service).scope).unwrap_or(measured.sizes), ..measured };
        group.size(&member.lane).into_iter().for_each(|size| *size = member.size);
        let reuse = group.stream.task.options.reuse;
        for (i, (item, line)) in items.into_iter().enumerate() {
            let compartment = group.compartment(&self.keys, &item);
            let key = if reuse { self.keys.of(compartment, &item.text) } else { i as u128 };
            group.push(0, conn, (item, line), compartment, key);
        }
        let most = (rows_of(learned, measured, largest) as usize, measured.number(learned, &asked));
        while let Next::Rows(rows) =
            group.next(u64::MAX / 2, most, (service, Way::AsEver, None), &member.lane, Turn::ALONE)
        {
            let draft = Draft::new(&self.numbers, (learned, measured), (&group, &asked), &rows, largest);
            sum.rows += rows.len() as u64;
            sum.requests += 1;
            sum.input_tokens += measured.prompt.apply(draft.estimate.input);
            sum.output_tokens += measured.usual_answer(group.mean_answer(&rows, service));
            sum.example.get_or_insert_with(|| draft.body(learned, (&group, &asked), &rows).to_string());
        }
        sum
    }
}
