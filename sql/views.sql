CREATE VIEW llm_batch.progress WITH (security_barrier = true) AS
SELECT p.job_id, p.owner, p.relation, p.target, p.task, p.model, p.status, p.reason,
       p.rows_total, p.rows_done, p.rows_skipped, p.rows_failed, p.rows_superseded, p.rows_reused, p.rows_left,
       CASE WHEN p.rows_total OPERATOR(pg_catalog.>) 0
            THEN pg_catalog.round((100.0 OPERATOR(pg_catalog.*) (p.rows_total OPERATOR(pg_catalog.-) p.rows_left)) OPERATOR(pg_catalog./) p.rows_total, 1)
            WHEN p.rows_total OPERATOR(pg_catalog.=) 0 THEN 100.0 END AS percent,
       pg_catalog.round(p.rows_per_second::pg_catalog.numeric, 1) AS rows_per_second,
       pg_catalog.round(p.tokens_per_minute::pg_catalog.numeric) AS tokens_per_minute,
       p.input_tokens, p.cached_input_tokens, p.output_tokens, p.requests,
       pg_catalog.trim_scale(p.cost) AS cost, pg_catalog.trim_scale(p.cost_unconfirmed) AS cost_unconfirmed,
       p.max_cost, p.max_tokens, p.deadline,
       CASE WHEN p.handled OPERATOR(pg_catalog.>) 0
            THEN pg_catalog.trim_scale(pg_catalog.round((p.cost OPERATOR(pg_catalog.*) p.rows_total) OPERATOR(pg_catalog./) p.handled, 6)) END AS projected_cost,
       CASE WHEN p.status OPERATOR(pg_catalog.=) 'running' AND p.rows_per_second OPERATOR(pg_catalog.>) 0
            THEN pg_catalog.make_interval(secs => pg_catalog.ceil(p.rows_left OPERATOR(pg_catalog./) p.rows_per_second)) END AS eta,
       p.last_error, p.started_at, p.updated_at
  FROM (
    SELECT j.id AS job_id, COALESCE(r.rolname, j.owner_name) AS owner,
           COALESCE(t.oid::pg_catalog.regclass::pg_catalog.text, j.relation_name) AS relation,
           pg_catalog.array_to_string(j.targets, ', ') AS target, j.task, k.model,
           CASE WHEN j.wanted OPERATOR(pg_catalog.=) 'cancelled' THEN 'cancelled'
                WHEN s.epoch OPERATOR(pg_catalog.=) j.epoch AND s.status IN ('done', 'failed') THEN s.status
                WHEN j.wanted OPERATOR(pg_catalog.=) 'paused' THEN 'paused'
                WHEN j.home OPERATOR(pg_catalog.<>) llm_batch.home() THEN 'paused'
                WHEN s.epoch OPERATOR(pg_catalog.=) j.epoch AND s.status OPERATOR(pg_catalog.<>) 'running' THEN s.status
                WHEN w.reason IS NOT NULL THEN 'paused'
                ELSE 'running' END AS status,
           CASE WHEN j.wanted OPERATOR(pg_catalog.=) 'cancelled' THEN NULL
                WHEN s.epoch OPERATOR(pg_catalog.=) j.epoch AND s.status IN ('done', 'failed') THEN NULL
                WHEN j.wanted OPERATOR(pg_catalog.=) 'paused' THEN 'user'
                WHEN j.home OPERATOR(pg_catalog.<>) llm_batch.home() THEN CASE WHEN t.oid IS NULL THEN 'table' ELSE 'restored' END
                WHEN s.epoch OPERATOR(pg_catalog.=) j.epoch AND s.status OPERATOR(pg_catalog.<>) 'running' THEN s.reason
                ELSE COALESCE(w.reason, CASE WHEN s.epoch OPERATOR(pg_catalog.=) j.epoch THEN s.reason END) END AS reason,
           CASE WHEN s.rows_total IS NOT NULL THEN GREATEST(s.rows_total, h.handled) END AS rows_total,
           s.rows_done, s.rows_skipped, s.rows_failed, s.rows_superseded, s.rows_reused,
           CASE WHEN s.rows_total IS NOT NULL THEN GREATEST(s.rows_total OPERATOR(pg_catalog.-) h.handled, 0) END AS rows_left, h.handled,
           s.rows_per_second, s.tokens_per_minute, s.input_tokens, s.cached_input_tokens, s.output_tokens, s.requests,
           s.cost, s.cost_unconfirmed, j.max_cost, j.max_tokens,
           (j.options OPERATOR(pg_catalog.->>) 'deadline')::pg_catalog.timestamptz AS deadline, s.last_error, s.started_at, s.updated_at
      FROM llm_batch.job j
      JOIN llm_batch.job_state s ON s.job_id OPERATOR(pg_catalog.=) j.id
      CROSS JOIN LATERAL (SELECT s.rows_done OPERATOR(pg_catalog.+) s.rows_skipped OPERATOR(pg_catalog.+) s.rows_failed OPERATOR(pg_catalog.+) s.rows_superseded) h (handled)
      -- OFFSET: found once, not once for each use.
      -- An object at home needs no function, which would be planned each time, by llm_batch.wait() once a second.
      CROSS JOIN LATERAL (SELECT j.home OPERATOR(pg_catalog.=) llm_batch.home() OFFSET 0) a (is_at_home)
      CROSS JOIN LATERAL (SELECT CASE WHEN a.is_at_home THEN j.owner ELSE llm_batch.owner_now(j.owner, j.owner_name, j.home) END,
                                 CASE WHEN a.is_at_home THEN j.relation ELSE llm_batch.relation_now(j.relation, j.relation_name, j.home) END OFFSET 0) o (owner, relation)
      LEFT JOIN pg_catalog.pg_roles r ON r.oid OPERATOR(pg_catalog.=) o.owner
      LEFT JOIN pg_catalog.pg_class t ON t.oid OPERATOR(pg_catalog.=) o.relation
      -- Asked once, as the answer may be another one in the next moment.
      CROSS JOIN LATERAL (SELECT CASE WHEN j.wanted OPERATOR(pg_catalog.=) 'running' AND (s.epoch OPERATOR(pg_catalog.<>) j.epoch OR s.status OPERATOR(pg_catalog.=) 'running')
                                      THEN llm_batch.waits_for(j.id) END) w (reason)
      LEFT JOIN llm_batch.task k ON k.name OPERATOR(pg_catalog.=) j.task
     WHERE pg_catalog.pg_has_role(o.owner, 'USAGE') OR pg_catalog.pg_has_role(t.relowner, 'USAGE')
        OR pg_catalog.pg_has_role('pg_monitor', 'USAGE')
  ) p;
COMMENT ON VIEW llm_batch.progress IS 'jobs that the current user owns or whose tables it owns; all jobs for pg_monitor';
COMMENT ON COLUMN llm_batch.progress.owner IS 'role with whose rights the job runs';
COMMENT ON COLUMN llm_batch.progress.relation IS 'current name of the table';
COMMENT ON COLUMN llm_batch.progress.target IS 'the columns that the job fills';
COMMENT ON COLUMN llm_batch.progress.status IS 'running, paused, done, failed or cancelled';
COMMENT ON COLUMN llm_batch.progress.reason IS 'why the job is paused. Until resume(): user, budget, auth, spend, no_answers, owner, label, restored, table. Until the cause is gone: provider_down, quota, read_only, write_error, no_worker_slot, disabled, no_connections. While running: locked, if it waits for a lock on the table';
COMMENT ON COLUMN llm_batch.progress.rows_total IS 'rows that were NULL at the start, and rows added since; NULL until they are counted';
COMMENT ON COLUMN llm_batch.progress.rows_superseded IS 'rows that were filled, changed or deleted by others while the job ran';
COMMENT ON COLUMN llm_batch.progress.rows_reused IS 'rows in rows_done that got the answer of another row with the same text';
COMMENT ON COLUMN llm_batch.progress.cached_input_tokens IS 'tokens in input_tokens that the provider had cached';
COMMENT ON COLUMN llm_batch.progress.requests IS 'requests that were sent; one that carries rows of several jobs is counted for one of them, its tokens for each by its rows';
COMMENT ON COLUMN llm_batch.progress.cost IS 'dollars, by the model''s prices and the tokens that the provider reported';
COMMENT ON COLUMN llm_batch.progress.cost_unconfirmed IS 'maximum cost in dollars of requests whose usage is unknown because they broke off';
COMMENT ON COLUMN llm_batch.progress.max_cost IS 'budget in dollars; cost and cost_unconfirmed count against it';
COMMENT ON COLUMN llm_batch.progress.max_tokens IS 'budget in tokens';
COMMENT ON COLUMN llm_batch.progress.deadline IS 'when the job is to be done, by its option deadline';
COMMENT ON COLUMN llm_batch.progress.projected_cost IS 'expected total cost in dollars, if the remaining rows cost as much as the rows so far';

CREATE VIEW llm_batch.progress_by_model WITH (security_barrier = true) AS
SELECT m.job_id, m.model, m.rows_answered, m.requests, m.input_tokens, m.cached_input_tokens, m.output_tokens,
       pg_catalog.trim_scale(m.cost) AS cost, pg_catalog.trim_scale(m.cost_unconfirmed) AS cost_unconfirmed
  FROM llm_batch.job_model m
  JOIN llm_batch.job j ON j.id OPERATOR(pg_catalog.=) m.job_id
 WHERE pg_catalog.pg_has_role('pg_monitor', 'USAGE')
    OR pg_catalog.pg_has_role(llm_batch.owner_now(j.owner, j.owner_name, j.home), 'USAGE')
    OR pg_catalog.pg_has_role((SELECT t.relowner FROM pg_catalog.pg_class t
                                WHERE t.oid OPERATOR(pg_catalog.=) llm_batch.relation_now(j.relation, j.relation_name, j.home)), 'USAGE');
COMMENT ON VIEW llm_batch.progress_by_model IS 'rows, tokens and cost of a job by model; shown to those who see the job in llm_batch.progress';
COMMENT ON COLUMN llm_batch.progress_by_model.rows_answered IS 'answers that came, reused ones included; not all of them may have been written';
COMMENT ON COLUMN llm_batch.progress_by_model.cost_unconfirmed IS 'maximum cost in dollars of requests whose usage is unknown because they broke off';

CREATE VIEW llm_batch.failure WITH (security_barrier = true) AS
SELECT f.job_id, f.key, f.state, f.class, f.attempts, f.detail, f.at
  FROM llm_batch.row_failure f
  JOIN llm_batch.job j ON j.id OPERATOR(pg_catalog.=) f.job_id
 WHERE pg_catalog.pg_has_role('pg_monitor', 'USAGE')
    OR pg_catalog.pg_has_role(llm_batch.owner_now(j.owner, j.owner_name, j.home), 'USAGE')
    OR pg_catalog.pg_has_role((SELECT t.relowner FROM pg_catalog.pg_class t
                                WHERE t.oid OPERATOR(pg_catalog.=) llm_batch.relation_now(j.relation, j.relation_name, j.home)), 'USAGE');
COMMENT ON VIEW llm_batch.failure IS 'rows that jobs could not fill; rows whose input is NULL, empty or white space are counted as skipped and not listed';
COMMENT ON COLUMN llm_batch.failure.key IS 'key of the row: column names and values';
COMMENT ON COLUMN llm_batch.failure.state IS 'skipped: the model did not answer, or the text is too long; failed: something went wrong';

CREATE VIEW llm_batch.activity WITH (security_barrier = true) AS
SELECT a.account, a.model, a.queued, a.in_flight_requests, a.in_flight_rows, a.requests_allowed, a.rows_allowed,
       a.tokens_in_window, a.tokens_limit, a.requests_in_window, a.requests_limit, a.used, a.share, a.reported_left,
       a.breaker,
       pg_catalog.clock_timestamp() OPERATOR(pg_catalog.+) pg_catalog.make_interval(secs => a.waiting_ms OPERATOR(pg_catalog./) 1000::pg_catalog.float8) AS waiting_until,
       pg_catalog.make_interval(secs => a.latency_ms OPERATOR(pg_catalog./) 1000::pg_catalog.float8) AS latency,
       a.thinking_tokens,
       pg_catalog.round(a.token_ratio, 3) AS token_ratio, pg_catalog.round(a.answer_ratio, 3) AS answer_ratio,
       pg_catalog.round(a.rows_total::pg_catalog.numeric OPERATOR(pg_catalog./) NULLIF(a.requests_total, 0), 1) AS rows_per_request,
       a.requests_total, a.rows_total, a.rows_reused, a.throttled AS throttled_429, a.errors, a.last_error, a.asked_by
  FROM pg_catalog.jsonb_to_recordset(llm_batch.gateway_activity()) AS a (
       account text, model text, queued bigint, in_flight_requests bigint, in_flight_rows bigint,
       requests_allowed bigint, rows_allowed bigint, tokens_in_window bigint, tokens_limit bigint,
       requests_in_window bigint, requests_limit bigint, used double precision, share double precision,
       reported_left bigint, token_ratio numeric, answer_ratio numeric, thinking_tokens bigint, latency_ms bigint, rows_reused bigint,
       waiting_ms bigint, requests_total bigint, rows_total bigint, throttled bigint, errors bigint, last_error text, breaker text, asked_by text);
COMMENT ON VIEW llm_batch.activity IS 'current limiter and queue of each account and model that the current user is asking; all for pg_monitor';
COMMENT ON COLUMN llm_batch.activity.requests_allowed IS 'maximum number of concurrent requests, as found out by trying';
COMMENT ON COLUMN llm_batch.activity.rows_allowed IS 'current maximum number of rows in a request; less than the task allows after incomplete or slow answers';
COMMENT ON COLUMN llm_batch.activity.used IS 'fraction of the tightest limit that is currently used, 0 to 1';
COMMENT ON COLUMN llm_batch.activity.share IS 'fraction of the limit that this server uses as its own, 0 to 1; less than 1 after refusals that nothing else explains';
COMMENT ON COLUMN llm_batch.activity.reported_left IS 'tokens left in the provider''s window, as it reported, less what was sent since';
COMMENT ON COLUMN llm_batch.activity.breaker IS 'closed: requests are sent; open: none are sent, because the provider does not answer; half_open: a probe is under way';
COMMENT ON COLUMN llm_batch.activity.waiting_until IS 'no request is sent before this time: the provider asked to wait, or its next probe is due then';
COMMENT ON COLUMN llm_batch.activity.latency IS 'recent time from a request to its answer';
COMMENT ON COLUMN llm_batch.activity.thinking_tokens IS 'recent tokens per request that the model spends on thinking';
COMMENT ON COLUMN llm_batch.activity.token_ratio IS 'prompt tokens as the provider counts them, divided by those counted here';
COMMENT ON COLUMN llm_batch.activity.answer_ratio IS 'answer tokens divided by those expected';
COMMENT ON COLUMN llm_batch.activity.rows_reused IS 'rows that got the answer of another row with the same text, since the gateway started';
COMMENT ON COLUMN llm_batch.activity.asked_by IS 'what the last request asked: chats, decisions or embeddings';

-- Each look is a transaction of its own, so it sees what the worker has committed and holds no old snapshot.
CREATE PROCEDURE llm_batch.wait(job_id bigint, timeout interval DEFAULT NULL)
    LANGUAGE plpgsql AS $$
DECLARE
    deadline CONSTANT pg_catalog.timestamptz := pg_catalog.clock_timestamp() OPERATOR(pg_catalog.+) timeout;
    job      pg_catalog.record;
    pauses   pg_catalog.float8 := 0.05;
    said     pg_catalog.text := '';
BEGIN
    PERFORM llm_batch.refuse_transaction_block('llm_batch.wait()');
    LOOP
        COMMIT;
        SELECT p.status, p.reason, p.last_error, p.rows_left, p.relation INTO job
          FROM llm_batch.progress p WHERE p.job_id OPERATOR(pg_catalog.=) wait.job_id;
        IF NOT FOUND THEN
            RAISE EXCEPTION 'job % does not exist', wait.job_id USING ERRCODE = 'undefined_object',
                HINT = 'The view llm_batch.progress lists your jobs.';
        ELSIF job.status OPERATOR(pg_catalog.=) 'done' THEN
            RETURN;
        ELSIF job.status OPERATOR(pg_catalog.<>) 'running' AND NOT llm_batch.goes_on(job.reason) THEN
            RAISE EXCEPTION 'job % is %', wait.job_id,
                pg_catalog.concat(job.status, (' (' OPERATOR(pg_catalog.||) job.reason) OPERATOR(pg_catalog.||) ')')
                USING ERRCODE = 'object_not_in_prerequisite_state',
                DETAIL = COALESCE(job.last_error, pg_catalog.concat(job.rows_left, ' rows are left.')),
                HINT = CASE WHEN job.reason OPERATOR(pg_catalog.=) 'budget'
                            THEN pg_catalog.concat('Raise it with llm_batch.alter_job(', wait.job_id, ', …), then call llm_batch.resume(', wait.job_id, ').')
                            WHEN job.status OPERATOR(pg_catalog.=) 'paused'
                            THEN pg_catalog.concat('Fix the cause, then call llm_batch.resume(', wait.job_id, ').')
                            WHEN EXISTS (SELECT FROM pg_catalog.pg_class t
                                          WHERE t.oid::pg_catalog.regclass::pg_catalog.text OPERATOR(pg_catalog.=) job.relation)
                            THEN 'Call llm_batch.backfill() again for the rows that are still NULL.'
                            ELSE pg_catalog.concat('The table does not exist any more. llm_batch.forget(', wait.job_id, ') removes the job.') END;
        ELSIF pg_catalog.clock_timestamp() OPERATOR(pg_catalog.>) deadline THEN
            RAISE EXCEPTION 'job % is not done after %', wait.job_id, wait.timeout USING ERRCODE = 'query_canceled',
                DETAIL = pg_catalog.concat(job.rows_left, ' rows are left.');
        ELSIF job.status OPERATOR(pg_catalog.=) 'paused' AND job.reason OPERATOR(pg_catalog.<>) said THEN
            said := job.reason;
            RAISE NOTICE 'job % is paused (%) and will go on by itself', wait.job_id, job.reason;
        END IF;
        PERFORM pg_catalog.pg_sleep(pauses);
        pauses := LEAST(pauses OPERATOR(pg_catalog.*) 1.5::pg_catalog.float8, 1.0::pg_catalog.float8);
    END LOOP;
END
$$;
COMMENT ON PROCEDURE llm_batch.wait IS 'waits until a job is done; raises an error if it fails, is cancelled or is paused; not allowed inside a transaction block';

-- Functions of the schema are for everyone: each checks what its caller may do. Tables are written by none but the
-- extension's own code.
GRANT USAGE ON SCHEMA llm_batch TO PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA llm_batch FROM PUBLIC;
REVOKE ALL ON ALL SEQUENCES IN SCHEMA llm_batch FROM PUBLIC;
GRANT SELECT ON llm_batch.model, llm_batch.list_price, llm_batch.route, llm_batch.task, llm_batch.task_history, llm_batch.progress, llm_batch.progress_by_model, llm_batch.failure, llm_batch.activity TO PUBLIC;

SET LOCAL search_path TO @extschema@, pg_temp;
