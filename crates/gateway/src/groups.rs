//! All groups. A group belongs to no lane: lanes name the groups whose rows they take.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::rc::Rc;

use crate::cache::Keys;
use crate::group::Group;
use crate::key::GroupId;
use crate::lane::Lane;
use crate::protocol::Stream;
use crate::purse::Purse;

/// Groups by their numbers.
#[derive(Debug, Default)]
pub struct Groups(BTreeMap<GroupId, Group>);

impl Groups {
    pub fn get(&self, id: GroupId) -> Option<&Group> {
        self.0.get(&id)
    }

    pub fn get_mut(&mut self, id: GroupId) -> Option<&mut Group> {
        self.0.get_mut(&id)
    }

    /// Nothing is known yet of which members have room.
    pub fn forget_room(&mut self) {
        self.0.values_mut().for_each(|group| group.full = 0);
    }

    pub fn iter(&self) -> impl Iterator<Item = (GroupId, &Group)> {
        self.0.iter().map(|(id, group)| (*id, group))
    }

    /// The groups of a lane.
    pub fn of<'a>(&'a self, lane: &'a Lane) -> impl Iterator<Item = (GroupId, &'a Group)> {
        lane.groups.iter().filter_map(|id| Some((*id, self.get(*id)?)))
    }

    /// Puts the groups of a lane into the order in which they are served: sessions first, then by how much they were served.
    pub fn order(&self, lane: &mut Lane) {
        // The bits of numbers that are not negative have the same order as the numbers.
        let rank = |g: &Group| (Reverse(g.stream.interactive), g.served.to_bits());
        lane.groups.sort_by_cached_key(|id| self.get(*id).map(rank));
    }

    /// Opens a stream of a client: its group is the one of the lane whose stream is the same, else a new one with the number
    /// `new`. One purse pays for a request, so a stream with a budget shares its group with no other client.
    pub fn open(
        &mut self,
        lane: Option<&Lane>,
        new: GroupId,
        conn: u64,
        stream: &Rc<Stream>,
        keys: &Keys,
    ) -> (GroupId, &mut Group) {
        let is_it = |g: &Group| g.stream == *stream && g.purse.as_ref().is_none_or(|purse| purse.conn == conn);
        let same = lane.and_then(|lane| self.of(lane).find(|(_, g)| is_it(g)).map(|(id, _)| id));
        let id = same.unwrap_or(new);
        let group = self.0.entry(id).or_insert_with(|| Group::new(Rc::clone(stream), keys));
        group.purse = stream.budget.map(|prices| Purse::new(conn, prices));
        (id, group)
    }

    pub fn remove(&mut self, id: GroupId) {
        self.0.remove(&id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::tests::stream;
    use crate::protocol::{Prices, Secret};
    use llm_batch_core::limiter::Limits;

    fn lane() -> Lane {
        Lane::new(Limits::default(), None, 0, 0)
    }

    #[test]
    fn lanes_and_groups_print_no_key() {
        let (mut lane, mut groups, mut stream) = (lane(), Groups::default(), stream());
        stream.endpoint.api_key = Some(Secret("sk-do-not-print".into()));
        let key = crate::key::LaneKey::of(&stream);
        let (id, _) = groups.open(None, GroupId(7), 1, &Rc::new(stream), &Keys::default());
        lane.groups.push(id);
        let printed = format!("{key:?} {id:?} {lane:?} {lane:#?} {groups:?} {groups:#?}");
        assert!(printed.contains("GroupId(7)") && !printed.contains("sk-do-not-print"), "{printed}");
    }

    #[test]
    fn the_same_streams_have_one_group_and_those_with_budgets_one_each() {
        let (mut lane, mut groups, keys) = (lane(), Groups::default(), Keys::default());
        let mut open = |id, conn, stream: &Stream| {
            let (opened, _) = groups.open(Some(&lane), GroupId(id), conn, &Rc::new(stream.clone()), &keys);
            if !lane.groups.contains(&opened) {
                lane.groups.push(opened);
            }
            opened.0
        };
        let plain = stream();
        assert_eq!((open(1, 1, &plain), open(2, 2, &plain)), (1, 1));
        let other = Stream { role: plain.role + 1, ..plain.clone() };
        assert_eq!((open(3, 1, &other), open(4, 2, &plain)), (3, 1));
        let bounded = Stream { budget: Some(Prices::default()), ..plain };
        assert_eq!((open(5, 1, &bounded), open(6, 2, &bounded), open(7, 1, &bounded)), (5, 6, 5));
    }
}
