//! Memory for texts that wait, and as much for what is asked of them. Nobody's share of it is another's.

use std::collections::HashMap;
use std::mem;
use std::rc::Rc;

use super::State;
use crate::purse::Purse;

/// Bytes of texts by the role that asks, and by the account that is asked.
#[derive(Default)]
pub struct Shares {
    roles: HashMap<u32, usize>,
    accounts: HashMap<Rc<str>, usize>,
}

impl State {
    /// Nothing is read from this client for now: memory is full, or its role has three quarters of it, or the account that
    /// it asks a half. Who has no stream only looks, or says what it will ask. An answer about a budget is read: rows wait for
    /// it.
    pub fn must_wait(&mut self, conn: u64) -> bool {
        let is_held_back = self.lacks_room(conn);
        if let Some(c) = self.conns.get_mut(&conn) {
            c.is_held_back = is_held_back;
        }
        is_held_back
    }

    fn lacks_room(&mut self, conn: u64) -> bool {
        let Some((id, stream)) = self.conns.get(&conn).and_then(|c| c.stream.as_ref()) else { return false };
        let Some(group) = self.groups.get(*id) else { return false };
        if group.purse.as_ref().is_some_and(Purse::has_asked) {
            return false;
        }
        let (memory, role, account) =
            (self.settings.memory, stream.role, group.first_lane().map(|l| Rc::clone(&l.account)));
        if self.bytes < memory / 2 || self.bytes >= memory {
            return self.bytes >= memory;
        }
        let shares = self.shares();
        let of_account = account.and_then(|account| shares.accounts.get(&account)).copied();
        of_account.unwrap_or(0) >= memory / 2 || shares.roles.get(&role).copied().unwrap_or(0) >= memory / 4 * 3
    }

    /// Returns the bytes that tasks may have, and whether those are a role's, if they have as many.
    pub(super) fn too_large_tasks(&self, role: u32) -> Option<(usize, bool)> {
        let (memory, of_a_role) = (self.settings.memory, self.settings.memory / 4 * 3);
        let (mut all, mut of_role) = (0, 0);
        for (_, group) in self.groups.iter() {
            all += group.bytes;
            of_role += if group.stream.role == role { group.bytes } else { 0 };
        }
        (of_role > of_a_role).then_some((of_a_role, true)).or((all > memory).then_some((memory, false)))
    }

    fn shares(&mut self) -> &Shares {
        let (conns, groups) = (&self.conns, &self.groups);
        self.shares.get_or_insert_with(|| {
            let mut shares = Shares::default();
            for c in conns.values() {
                let (bytes, Some((id, stream))) = (c.outstanding_bytes + c.coming_bytes, &c.stream) else { continue };
                if let Some(lane) = groups.get(*id).and_then(|g| g.first_lane()).filter(|_| bytes > 0) {
                    *shares.roles.entry(stream.role).or_default() += bytes;
                    *shares.accounts.entry(Rc::clone(&lane.account)).or_default() += bytes;
                }
            }
            shares
        })
    }

    /// A message of so many bytes has begun to come from a client; none is coming if there are none.
    pub fn comes(&mut self, conn: u64, bytes: usize) {
        let Some(c) = self.conns.get_mut(&conn) else { return };
        let before = mem::replace(&mut c.coming_bytes, bytes);
        self.bytes = (self.bytes + bytes).saturating_sub(before);
        self.shares = None;
    }
}
