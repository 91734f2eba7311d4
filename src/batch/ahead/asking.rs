//! The streams of a batch scan's calls: texts out, answers in, and what changes between two FETCHes.

use std::rc::Rc;
use std::time::Duration;

use pgrx::prelude::*;

use super::{Ahead, Fate};
use crate::ask::Asker;
use crate::batch::answers::Answer;
use crate::batch::site::Site;
use crate::process::current_user;
use crate::{settings, statement};

impl Ahead {
    /// Between two FETCHes much may change: streams are opened anew that are another role's or statement's, or of which
    /// anything is not as it was.
    pub(super) unsafe fn look_at_changes(&mut self) {
        let role_and_budget = (current_user(), settings::statement_max_cost());
        let mut is_same = role_and_budget == (self.role, self.max_cost);
        (self.role, self.max_cost) = role_and_budget;
        let is_new_statement = std::mem::replace(&mut self.began, statement::began()) != self.began;
        let default_model = settings::default_model();
        if self.default_model != default_model {
            is_same = false;
            self.default_model = default_model;
            self.keep_to_former_model();
        }
        // SAFETY: as of next(). Changes by others are not heard by themselves within a transaction.
        unsafe {
            if is_new_statement {
                pg_sys::AcceptInvalidationMessages();
            }
            for i in 0..self.sites.len() {
                let Some(site) = self.sites.get_mut(i).filter(|s| s.asker.is_some() || !s.waiting.is_empty()) else {
                    continue;
                };
                if is_same && (!is_new_statement || site.is_current()) {
                    site.asker.as_mut().map(Asker::move_on);
                    continue;
                }
                let waiting = std::mem::take(&mut site.waiting);
                site.close();
                for (row, text) in waiting.into_values() {
                    self.ask(i, row, text);
                }
            }
        }
    }

    /// Each text goes to one model: what was sent to the one that was the default is answered by it.
    fn keep_to_former_model(&mut self) {
        let Self { sites, rows, first, .. } = self;
        for (i, site) in sites.iter_mut().enumerate() {
            if site.asked.as_ref().is_some_and(|asked| asked.default_model.borrow().is_some()) {
                let recalled = site.recall(&mut |number, answer| {
                    if let Some(fate) = rows.get_mut((number - *first) as usize).and_then(|row| row.fates.get_mut(i)) {
                        *fate = Fate::Answered(Rc::new(answer));
                    }
                });
                if let Err(e) = recalled {
                    site.failed.get_or_insert(e);
                }
            }
        }
        for fate in rows.iter().flat_map(|row| &row.fates) {
            if let Fate::Answered(answer) = fate
                && answer.asked.default_model.borrow().is_some()
            {
                answer.asked.default_model.replace(Some(self.default_model.clone()));
            }
        }
    }

    pub(super) fn set(&mut self, number: u64, site: usize, fate: Fate) {
        let row = self.rows.get_mut((number - self.first) as usize);
        if let Some(f) = row.and_then(|row| row.fates.get_mut(site)) {
            *f = fate;
        }
    }

    /// Queues a row's text of a call.
    pub(super) unsafe fn ask(&mut self, site: usize, number: u64, text: String) {
        let Some(s) = self.sites.get_mut(site) else { return };
        // SAFETY: as of next().
        let fate = match unsafe { s.open(self.ps) } {
            Ok(Some(asker)) => {
                let n = asker.put((text.clone(), None));
                let bytes = text.len();
                s.waiting.insert(n, (number, text));
                if let Some(row) = self.rows.get_mut((number - self.first) as usize) {
                    row.bytes += bytes;
                    self.bytes += bytes;
                }
                Fate::Pending
            }
            Ok(None) => Fate::NotAsked,
            Err(e) => {
                s.failed.get_or_insert(e);
                Fate::Pending
            }
        };
        self.set(number, site, fate);
    }

    /// Hands over what is queued, where it is at least so much.
    pub(super) fn flush(&mut self, least: usize) {
        for site in &mut self.sites {
            if let Some(asker) = &mut site.asker
                && asker.unsent() >= least
                && let Err(e) = asker.flush()
            {
                site.failed.get_or_insert(e);
            }
        }
    }

    /// Takes what has come.
    pub(super) fn poll(&mut self) {
        for site in 0..self.sites.len() {
            while self.receive(site, Duration::ZERO) {}
        }
    }

    /// Waits for answers of a call. Returns true if anything came.
    pub(super) fn receive(&mut self, site: usize, timeout: Duration) -> bool {
        let Self { sites, rows, first, .. } = self;
        let Some(Site { asker: Some(asker), asked: Some(asked), waiting, failed, .. }) = sites.get_mut(site) else {
            return false;
        };
        if failed.is_some() || asker.pending() == 0 {
            return false;
        }
        let received = asker.receive(timeout, &mut |o| {
            let Some((number, input)) = waiting.remove(&o.n) else { return };
            let answer = Answer { asked: Rc::clone(asked), input, verdict: o.verdict };
            if let Some(fate) = rows.get_mut((number - *first) as usize).and_then(|row| row.fates.get_mut(site)) {
                *fate = Fate::Answered(Rc::new(answer));
            }
        });
        let Err(e) = received else { return received.unwrap_or_default() };
        // Perhaps the budget lacks no more than what idle streams are allowed to spend.
        if asker.is_exhausted() && self.release_idle(site) {
            return true;
        }
        if let Some(site) = self.sites.get_mut(site) {
            site.failed.get_or_insert(e);
        }
        false
    }

    /// Closes the streams of other calls that wait for nothing, and asks for more of the budget once again. Returns
    /// true if there is more.
    fn release_idle(&mut self, site: usize) -> bool {
        let others = self.sites.iter_mut().enumerate().filter(|(i, s)| *i != site && s.waiting.is_empty());
        others.for_each(|(_, s)| s.close());
        let asker = self.sites.get_mut(site).and_then(|s| s.asker.as_mut());
        asker.is_some_and(|asker| asker.grant().is_ok())
    }
}
