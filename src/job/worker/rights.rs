//! Rights that change while rows wait in the gateway: what their owner may see no longer is taken back before it is sent.

use std::collections::BTreeMap;
use std::rc::Rc;

use pgrx::pg_sys;

use super::Worker;
use crate::error::{Error, Result};
use crate::job::page::Page;
use crate::job::plan::Plan;
use crate::job::{settle, table, update};
use crate::{changes, expression, sql, txn};

/// The rights by which a job sees rows, as a number that changes with them. It is cheap, so that the many changes which
/// say nothing about rights (VACUUM, ANALYZE) cost nothing else.
pub struct Rights {
    relations: Vec<pg_sys::Oid>,
    fingerprint: i64,
}

impl Rights {
    /// The relations that a job's claims read, and the rights to them now. Changes of these are heard from then on.
    pub(super) fn of(plan: &Plan) -> Result<Self> {
        sql::set_local("search_path", &plan.search_path)?;
        let relations = expression::read_by(&plan.claim_first, &[pg_sys::INT8OID])?;
        changes::watch(&relations);
        Ok(Self { fingerprint: fingerprint(&relations)?, relations })
    }

    fn are_as_they_were(&self) -> Result<bool> {
        Ok(fingerprint(&self.relations)? == self.fingerprint)
    }
}

/// A hash of the tables' owners, grants and policies with the functions that those call, of the views' queries, of the
/// memberships of roles, and of who goes past policies.
fn fingerprint(relations: &[pg_sys::Oid]) -> Result<i64> {
    let found = sql::one::<i64>(
        "SELECT pg_catalog.hashtextextended(pg_catalog.concat_ws('#',
           (SELECT pg_catalog.string_agg(pg_catalog.concat_ws('|', c.oid, c.relowner, c.relrowsecurity,
                     c.relforcerowsecurity, c.relacl::pg_catalog.text, c.reloptions::pg_catalog.text,
              (SELECT pg_catalog.string_agg(pg_catalog.concat_ws('=', a.attnum, a.attacl::pg_catalog.text), ',' ORDER BY a.attnum)
                 FROM pg_catalog.pg_attribute a WHERE a.attrelid OPERATOR(pg_catalog.=) c.oid AND a.attacl IS NOT NULL),
              (SELECT pg_catalog.string_agg(pg_catalog.concat_ws(',', p.polname, p.polcmd, p.polpermissive,
                        p.polroles::pg_catalog.text, p.polqual::pg_catalog.text), ';' ORDER BY p.oid)
                 FROM pg_catalog.pg_policy p WHERE p.polrelid OPERATOR(pg_catalog.=) c.oid),
              (SELECT pg_catalog.string_agg(f::pg_catalog.text, ';' ORDER BY f.oid)
                 FROM pg_catalog.pg_policy p
                 JOIN pg_catalog.pg_depend d ON d.objid OPERATOR(pg_catalog.=) p.oid
                      AND d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_policy'::pg_catalog.regclass::pg_catalog.oid
                      AND d.refclassid OPERATOR(pg_catalog.=) 'pg_catalog.pg_proc'::pg_catalog.regclass::pg_catalog.oid
                 JOIN pg_catalog.pg_proc f ON f.oid OPERATOR(pg_catalog.=) d.refobjid
                WHERE p.polrelid OPERATOR(pg_catalog.=) c.oid),
              (SELECT pg_catalog.string_agg(r.ev_action::pg_catalog.text, ';' ORDER BY r.oid)
                 FROM pg_catalog.pg_rewrite r WHERE r.ev_class OPERATOR(pg_catalog.=) c.oid)), '#' ORDER BY c.oid)
              FROM pg_catalog.pg_class c WHERE c.oid OPERATOR(pg_catalog.=) ANY ($1)),
           (SELECT pg_catalog.string_agg(m::pg_catalog.text, ';' ORDER BY m.roleid, m.member) FROM pg_catalog.pg_auth_members m),
           (SELECT pg_catalog.string_agg(pg_catalog.concat_ws('|', r.oid, r.rolsuper, r.rolinherit, r.rolbypassrls), ';' ORDER BY r.oid)
              FROM pg_catalog.pg_roles r WHERE r.rolsuper OR r.rolbypassrls OR NOT r.rolinherit)) COLLATE pg_catalog.\"C\", 0)",
        &[relations.to_vec().into()],
    )?;
    found.ok_or_else(|| Error::state("the catalogs say nothing of a job's tables"))
}

impl Worker {
    /// Looks at what is open again, if what its owner may see was changed.
    pub(super) fn look_at_rights(&mut self) -> Result<()> {
        let Some(known) = self.rights.as_ref().filter(|_| self.stopping.is_none() && !self.put_off) else {
            return Ok(());
        };
        let (job, open) = (&self.job, self.open_rows());
        let looked = txn::run(|| {
            if known.are_as_they_were()? {
                return Ok(None);
            }
            table::lock(job, pg_sys::AccessShareLock)?;
            let (_, table, plan) = Self::ready(job)?;
            let rights = Rights::of(&plan)?;
            settle::by_key()?;
            for (page, positions) in open.values() {
                if !update::is_as_sent(&plan, page, positions)? {
                    return Ok(Some((table, plan, rights, false)));
                }
            }
            Ok(Some((table, plan, rights, true)))
        });
        match looked {
            Ok(None) => Ok(()),
            Ok(Some((table, plan, rights, is_all_there))) => {
                (self.table, self.plan, self.rights) = (table, plan, Some(rights));
                if !is_all_there {
                    self.take_back();
                }
                Ok(())
            }
            Err(e) => {
                // Rows that can't be checked are not sent. The rights that hold then are noted with the next page.
                self.take_back();
                self.rights = None;
                Err(e)
            }
        }
    }

    /// The rows that were claimed and have no outcome, by page.
    fn open_rows(&self) -> BTreeMap<*const Page, (Rc<Page>, Vec<i32>)> {
        let mut pages = BTreeMap::new();
        let places = self.outstanding.values().chain(&self.waiting).map(|row| &row.place);
        for (page, position) in places {
            let (_, positions) = pages.entry(Rc::as_ptr(page)).or_insert_with(|| (Rc::clone(page), Vec::new()));
            positions.push(*position);
        }
        pages
    }

    /// Takes back the rows that have not been sent. A further pass claims them again, if it finds them.
    fn take_back(&mut self) {
        let asked = self.reopen.clone().unwrap_or_else(|| self.asked.clone());
        self.change(asked);
    }
}
