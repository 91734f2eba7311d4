//! A finder's further work in our tables: current names are noted, old jobs forgotten.

use super::status;
use crate::error::Result;
use crate::{settings, sql, txn, version};

/// Notes names and forgets old jobs, unless another version of the extension is installed.
pub fn tidy_up() -> Result<()> {
    if version::installed()?.is_none_or(|v| v != version::LIBRARY) {
        return Ok(());
    }
    txn::as_extension_owner(|| note_names().and_then(|()| forget_old()))
}

/// Forgets the jobs that ended longer ago than they are to be kept, some at a time.
fn forget_old() -> Result<()> {
    let Some(minutes) = settings::keep_finished_jobs() else { return Ok(()) };
    let old = sql::rows_mut(
        "SELECT j.id FROM llm_batch.job j JOIN llm_batch.job_state s ON s.job_id = j.id
          WHERE s.updated_at < now() - make_interval(mins => $1)
            AND (j.wanted = 'cancelled' OR (s.epoch = j.epoch AND s.status IN ('done', 'failed')))
          ORDER BY j.id LIMIT 1000 FOR UPDATE SKIP LOCKED",
        &[minutes.into()],
        |r| r.get::<i64>(1),
    )?;
    old.into_iter().try_for_each(|id| status::forget(id, ", as llm_batch.keep_finished_jobs says"))
}

/// Enters what roles, servers and tables are called today, and makes models and tasks that a dump has brought at home
/// here once all of theirs is found: from then on they follow owner and server when these are renamed. A job is at home with
/// `resume()`. A copy of the files, such as a template's, has these names. Rows that others hold locked wait.
fn note_names() -> Result<()> {
    // A dropped object keeps no name to be found by, as in a dump.
    sql::run(
        "UPDATE llm_batch.model m SET server = 0
           FROM (SELECT x.name FROM llm_batch.model x
                  WHERE x.home = llm_batch.home() AND x.server <> 0
                    AND NOT EXISTS (SELECT FROM pg_foreign_server s WHERE s.oid = x.server)
                    FOR UPDATE OF x SKIP LOCKED) n
          WHERE m.name = n.name",
        &[],
    )?;
    sql::run(
        "UPDATE llm_batch.job j
            SET owner_name = n.owner_name, relation = n.relation, relation_name = n.relation_name, target_type_names = n.type_names
           FROM (SELECT x.id, v.* FROM llm_batch.job x
                   LEFT JOIN pg_roles r ON r.oid = x.owner
                   LEFT JOIN (pg_class t JOIN pg_namespace s ON s.oid = t.relnamespace) ON t.oid = x.relation
                  CROSS JOIN LATERAL (SELECT coalesce(r.rolname, x.owner_name), coalesce(t.oid, 0),
                        CASE WHEN t.oid IS NULL THEN x.relation_name ELSE concat(quote_ident(s.nspname), '.', quote_ident(t.relname)) END,
                        (SELECT array_agg(format_type(u.t, NULL) ORDER BY u.n)
                           FROM unnest(x.target_types) WITH ORDINALITY u (t, n))) v (owner_name, relation, relation_name, type_names)
                  WHERE x.home = llm_batch.home()
                    AND (x.owner_name, x.relation, x.relation_name, x.target_type_names)
                        <> (v.owner_name, v.relation, v.relation_name, v.type_names)
                    FOR UPDATE OF x SKIP LOCKED) n
          WHERE j.id = n.id",
        &[],
    )?;
    sql::run(
        "UPDATE llm_batch.model m
            SET owner = n.owner, owner_name = n.rolname, server = n.server, server_name = n.srvname, home = llm_batch.home()
           FROM (SELECT x.name, r.oid AS owner, r.rolname, s.oid AS server, s.srvname FROM llm_batch.model x
                   JOIN pg_roles r ON r.oid = llm_batch.owner_now(x.owner, x.owner_name, x.home)
                   JOIN pg_foreign_server s ON s.oid = llm_batch.server_now(x.server, x.server_name, x.home)
                  WHERE x.home <> llm_batch.home() OR x.owner_name <> r.rolname OR x.server_name <> s.srvname
                    FOR UPDATE OF x SKIP LOCKED) n
          WHERE m.name = n.name",
        &[],
    )?;
    for table in ["task", "route"] {
        sql::run(
            &format!(
                "UPDATE llm_batch.{table} c SET owner = n.owner, owner_name = n.rolname, home = llm_batch.home()
                   FROM (SELECT x.name, r.oid AS owner, r.rolname FROM llm_batch.{table} x
                           JOIN pg_roles r ON r.oid = llm_batch.owner_now(x.owner, x.owner_name, x.home)
                          WHERE x.home <> llm_batch.home() OR x.owner_name <> r.rolname
                            FOR UPDATE OF x SKIP LOCKED) n
                  WHERE c.name = n.name"
            ),
            &[],
        )?;
    }
    Ok(())
}
