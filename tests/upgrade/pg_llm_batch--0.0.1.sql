-- pg_llm_batch 0.0.1: the install script of a version before, for pgrx-tests/tests/upgrade.rs. It is never changed: see
-- sql/README.md.
-- Everything below names its operators and functions through pg_catalog; the extension's own schema comes last.
SET LOCAL search_path TO pg_catalog, pg_temp;

DO $$
BEGIN
    IF pg_catalog.getdatabaseencoding() OPERATOR(pg_catalog.<>) 'UTF8' THEN
        RAISE EXCEPTION 'pg_llm_batch needs a database in UTF8' USING ERRCODE = 'feature_not_supported',
            DETAIL = pg_catalog.format('This database is in %s; language models are spoken to in UTF8.', pg_catalog.getdatabaseencoding()),
            HINT = 'Create the database with ENCODING ''UTF8''.';
    END IF;
END
$$;

CREATE SCHEMA llm_batch;
COMMENT ON SCHEMA llm_batch IS 'pg_llm_batch: columns filled through language models';

CREATE TABLE llm_batch.model (
    name                    text PRIMARY KEY,
    owner                   regrole NOT NULL,
    server                  name NOT NULL,
    model                   text NOT NULL,
    tokens_per_minute       integer,
    requests_per_minute     integer,
    input_tokens_per_minute integer,
    output_tokens_per_minute integer,
    input_price             numeric,
    output_price            numeric,
    max_concurrent_requests integer,
    request_timeout         interval NOT NULL,
    max_request_tokens      integer NOT NULL,
    parameters              jsonb NOT NULL
);
COMMENT ON TABLE llm_batch.model IS 'models that can be asked; kept by llm_batch.create_model(), alter_model(), drop_model()';
COMMENT ON COLUMN llm_batch.model.server IS 'foreign server of the wrapper llm_provider, by name';
COMMENT ON COLUMN llm_batch.model.model IS 'the provider''s name of the model';
COMMENT ON COLUMN llm_batch.model.tokens_per_minute IS 'limit of tokens a minute, prompts and answers together; NULL is no limit';
COMMENT ON COLUMN llm_batch.model.requests_per_minute IS 'limit of requests a minute; NULL is no limit';
COMMENT ON COLUMN llm_batch.model.input_tokens_per_minute IS 'limit of prompt tokens a minute; NULL is no limit';
COMMENT ON COLUMN llm_batch.model.output_tokens_per_minute IS 'limit of answer tokens a minute; NULL is no limit';
COMMENT ON COLUMN llm_batch.model.input_price IS 'dollars per million prompt tokens';
COMMENT ON COLUMN llm_batch.model.output_price IS 'dollars per million answer tokens';
COMMENT ON COLUMN llm_batch.model.max_concurrent_requests IS 'most requests at the same time; NULL is 16';
COMMENT ON COLUMN llm_batch.model.request_timeout IS 'how long one request may take';
COMMENT ON COLUMN llm_batch.model.max_request_tokens IS 'most tokens of one request, prompt and answer together';
COMMENT ON COLUMN llm_batch.model.parameters IS 'further parameters of each request, such as {"temperature": 0}';

CREATE TABLE llm_batch.classifier (
    name        text PRIMARY KEY,
    owner       regrole NOT NULL,
    model       text NOT NULL REFERENCES llm_batch.model (name),
    instruction text NOT NULL,
    labels      jsonb NOT NULL,
    examples    jsonb NOT NULL,
    options     jsonb NOT NULL
);
COMMENT ON TABLE llm_batch.classifier IS 'what to ask; kept by llm_batch.create_classifier(), alter_classifier(), drop_classifier()';
COMMENT ON COLUMN llm_batch.classifier.labels IS 'array of {"label", "description"}';
COMMENT ON COLUMN llm_batch.classifier.examples IS 'array of {"input", "label"}';

-- What a job is to do, and what its owner wants of it. Its worker writes only to job_state, so that an open
-- transaction with a pause() in it blocks no worker.
CREATE TABLE llm_batch.job (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    owner         regrole NOT NULL,
    relation      regclass NOT NULL,
    root          regclass NOT NULL,
    relation_name text NOT NULL,
    target        name NOT NULL,
    target_attnum smallint NOT NULL,
    target_type   regtype NOT NULL,
    target_typmod integer NOT NULL,
    key_names     name[] NOT NULL,
    key_attnums   smallint[] NOT NULL,
    input         text NOT NULL,
    filter        text,
    task          text NOT NULL,
    options       jsonb NOT NULL,
    search_path   text NOT NULL,
    cluster       bigint NOT NULL,
    wanted        text NOT NULL DEFAULT 'running' CHECK (wanted IN ('running', 'paused', 'cancelled')),
    -- Raised by resume() and retry_failed(): what job_state says of an earlier epoch no longer holds.
    epoch         integer NOT NULL DEFAULT 1,
    -- The epoch from which on failures recorded before are to be forgotten.
    retry_epoch   integer NOT NULL DEFAULT 0,
    created_at    timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE llm_batch.job IS 'jobs of llm_batch.backfill(); see llm_batch.progress';

CREATE TABLE llm_batch.job_state (
    job_id            bigint PRIMARY KEY REFERENCES llm_batch.job (id) ON DELETE CASCADE,
    status            text NOT NULL DEFAULT 'running' CHECK (status IN ('running', 'paused', 'done', 'failed', 'cancelled')),
    reason            text,
    epoch             integer NOT NULL DEFAULT 1,
    retried_epoch     integer NOT NULL DEFAULT 0,
    resume_at         timestamptz,
    rows_total        bigint,
    rows_done         bigint NOT NULL DEFAULT 0,
    rows_skipped      bigint NOT NULL DEFAULT 0,
    rows_failed       bigint NOT NULL DEFAULT 0,
    rows_superseded   bigint NOT NULL DEFAULT 0,
    input_tokens      bigint NOT NULL DEFAULT 0,
    output_tokens     bigint NOT NULL DEFAULT 0,
    requests          bigint NOT NULL DEFAULT 0,
    cost              numeric NOT NULL DEFAULT 0,
    cost_unconfirmed  numeric NOT NULL DEFAULT 0,
    rows_per_second   double precision,
    tokens_per_minute double precision,
    last_error        text,
    started_at        timestamptz,
    updated_at        timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50);
COMMENT ON TABLE llm_batch.job_state IS 'counters and state of jobs, written by their workers; see llm_batch.progress';

CREATE TABLE llm_batch.row_failure (
    job_id   bigint NOT NULL REFERENCES llm_batch.job (id) ON DELETE CASCADE,
    key      jsonb NOT NULL,
    state    text NOT NULL CHECK (state IN ('skipped', 'failed')),
    class    text NOT NULL,
    attempts integer NOT NULL,
    detail   text,
    at       timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (job_id, key)
);
COMMENT ON TABLE llm_batch.row_failure IS 'rows that a job could not fill; see llm_batch.failure';

-- A dump keeps what users made; jobs wake up paused in another cluster, since job.cluster tells it apart.
SELECT pg_catalog.pg_extension_config_dump('llm_batch.model', '');
SELECT pg_catalog.pg_extension_config_dump('llm_batch.classifier', '');
SELECT pg_catalog.pg_extension_config_dump('llm_batch.job', '');
SELECT pg_catalog.pg_extension_config_dump('llm_batch.job_id_seq', '');
SELECT pg_catalog.pg_extension_config_dump('llm_batch.job_state', '');
SELECT pg_catalog.pg_extension_config_dump('llm_batch.row_failure', '');
CREATE FUNCTION llm_batch.provider_validator(options text[], catalog oid) RETURNS void
    LANGUAGE c STRICT SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'provider_validator_wrapper';
COMMENT ON FUNCTION llm_batch.provider_validator(text[], oid) IS 'checks the options of servers and user mappings of the wrapper llm_provider';

CREATE FOREIGN DATA WRAPPER llm_provider NO HANDLER VALIDATOR llm_batch.provider_validator;
COMMENT ON FOREIGN DATA WRAPPER llm_provider IS 'providers of language models: a server is an endpoint, a user mapping its key';

-- Models

CREATE FUNCTION llm_batch.create_model(
    name text, server name, model text,
    tokens_per_minute integer DEFAULT NULL, requests_per_minute integer DEFAULT NULL,
    input_tokens_per_minute integer DEFAULT NULL, output_tokens_per_minute integer DEFAULT NULL,
    input_price numeric DEFAULT NULL, output_price numeric DEFAULT NULL,
    max_concurrent_requests integer DEFAULT NULL, request_timeout interval DEFAULT NULL,
    max_request_tokens integer DEFAULT NULL, parameters jsonb DEFAULT NULL
) RETURNS void
    LANGUAGE c PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'create_model_wrapper';
COMMENT ON FUNCTION llm_batch.create_model IS 'makes a model of a server known, with its limits and its price in dollars per million tokens';

CREATE FUNCTION llm_batch.alter_model(
    name text, server name DEFAULT NULL, model text DEFAULT NULL,
    tokens_per_minute integer DEFAULT NULL, requests_per_minute integer DEFAULT NULL,
    input_tokens_per_minute integer DEFAULT NULL, output_tokens_per_minute integer DEFAULT NULL,
    input_price numeric DEFAULT NULL, output_price numeric DEFAULT NULL,
    max_concurrent_requests integer DEFAULT NULL, request_timeout interval DEFAULT NULL,
    max_request_tokens integer DEFAULT NULL, parameters jsonb DEFAULT NULL,
    reset text[] DEFAULT '{}'
) RETURNS void
    LANGUAGE c PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'alter_model_wrapper';
COMMENT ON FUNCTION llm_batch.alter_model IS 'changes what is given of a model; "reset" names settings to set back to their default';

CREATE FUNCTION llm_batch.drop_model(name text) RETURNS void
    LANGUAGE c PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'drop_model_wrapper';
COMMENT ON FUNCTION llm_batch.drop_model IS 'forgets a model that no classifier uses';

-- Classifiers

CREATE FUNCTION llm_batch.create_classifier(
    name text, labels jsonb, model text DEFAULT NULL, instruction text DEFAULT '',
    examples jsonb DEFAULT NULL, options jsonb DEFAULT '{}'
) RETURNS void
    LANGUAGE c PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'create_classifier_wrapper';
COMMENT ON FUNCTION llm_batch.create_classifier IS 'makes a classifier: labels with their descriptions, an instruction, a model';

CREATE FUNCTION llm_batch.alter_classifier(
    name text, labels jsonb DEFAULT NULL, model text DEFAULT NULL, instruction text DEFAULT NULL,
    examples jsonb DEFAULT NULL, options jsonb DEFAULT NULL
) RETURNS void
    LANGUAGE c PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'alter_classifier_wrapper';
COMMENT ON FUNCTION llm_batch.alter_classifier IS 'changes what is given of a classifier';

CREATE FUNCTION llm_batch.drop_classifier(name text) RETURNS void
    LANGUAGE c PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'drop_classifier_wrapper';
COMMENT ON FUNCTION llm_batch.drop_classifier IS 'forgets a classifier that no unfinished job uses';

-- The verbs. These two go where CREATE EXTENSION puts them.

CREATE FUNCTION @extschema@.llm_classify(input text, task text) RETURNS text
    LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED COST 100000 SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'llm_classify_wrapper';
COMMENT ON FUNCTION @extschema@.llm_classify(text, text) IS 'the label that a classifier gives a text; NULL, with a warning, if the model gives none';

CREATE FUNCTION @extschema@.llm_classify(input text, labels text[], options jsonb DEFAULT '{}') RETURNS text
    LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED COST 100000 SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'llm_classify_labels_wrapper';
COMMENT ON FUNCTION @extschema@.llm_classify(text, text[], jsonb) IS 'which of the labels fits a text, by the model llm_batch.default_model';

-- No search_path: these run the caller's query.
CREATE FUNCTION @extschema@.llm_classify_batch(query text, task text, options jsonb DEFAULT '{}')
    RETURNS TABLE (id text, label text, status text, detail text)
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE COST 1000000 ROWS 1000
    AS 'MODULE_PATHNAME', 'llm_classify_batch_wrapper';
COMMENT ON FUNCTION @extschema@.llm_classify_batch(text, text, jsonb) IS 'labels for the rows of a query with two columns, id and input; status is ok, skipped or failed';

CREATE FUNCTION @extschema@.llm_classify_batch(query text, labels text[], options jsonb DEFAULT '{}')
    RETURNS TABLE (id text, label text, status text, detail text)
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE COST 1000000 ROWS 1000
    AS 'MODULE_PATHNAME', 'llm_classify_batch_labels_wrapper';
COMMENT ON FUNCTION @extschema@.llm_classify_batch(text, text[], jsonb) IS 'the same with labels in place of a classifier, by the model llm_batch.default_model';

-- Jobs

-- No search_path: input and filter are read under the caller's.
CREATE FUNCTION llm_batch.backfill(
    relation regclass, input text, target name, task text, filter text DEFAULT NULL, options jsonb DEFAULT '{}'
) RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'backfill_wrapper';
COMMENT ON FUNCTION llm_batch.backfill IS 'starts a job, at commit, that fills a column where it is NULL; returns the job''s id';

CREATE FUNCTION llm_batch.pause(job_id bigint) RETURNS boolean
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'pause_wrapper';
COMMENT ON FUNCTION llm_batch.pause IS 'pauses a job: what was sent is still awaited and written; false if it was paused already';

CREATE FUNCTION llm_batch.resume(job_id bigint) RETURNS boolean
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'resume_wrapper';
COMMENT ON FUNCTION llm_batch.resume IS 'lets a paused job go on; false if it was running already';

CREATE FUNCTION llm_batch.cancel(job_id bigint) RETURNS boolean
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'cancel_wrapper';
COMMENT ON FUNCTION llm_batch.cancel IS 'ends a job for good; what is in the table stays; false if it had ended already';

CREATE FUNCTION llm_batch.retry_failed(job_id bigint) RETURNS boolean
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'retry_failed_wrapper';
COMMENT ON FUNCTION llm_batch.retry_failed IS 'lets a job ask again for the rows that it listed as skipped or failed';

-- What only the server's memory knows. Not for users.
CREATE FUNCTION llm_batch.waits_for_slot(job_id bigint) RETURNS boolean
    LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'waits_for_slot_wrapper';
COMMENT ON FUNCTION llm_batch.waits_for_slot IS 'whether a job could not be started for want of a background worker; for llm_batch.progress';

CREATE FUNCTION llm_batch.gateway_activity() RETURNS jsonb
    LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'gateway_activity_wrapper';
COMMENT ON FUNCTION llm_batch.gateway_activity IS 'the gateway''s state; for llm_batch.activity';

CREATE FUNCTION llm_batch.refuse_transaction_block(what text) RETURNS void
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'refuse_transaction_block_wrapper';
COMMENT ON FUNCTION llm_batch.refuse_transaction_block(text) IS 'raises inside a transaction block; for llm_batch.wait()';
CREATE VIEW llm_batch.progress WITH (security_barrier = true) AS
SELECT p.job_id, p.owner, p.relation, p.target, p.task, p.model, p.status, p.reason,
       p.rows_total, p.rows_done, p.rows_skipped, p.rows_failed, p.rows_superseded, p.rows_left,
       CASE WHEN p.rows_total OPERATOR(pg_catalog.>) 0
            THEN pg_catalog.round((100.0 OPERATOR(pg_catalog.*) (p.rows_total OPERATOR(pg_catalog.-) p.rows_left)) OPERATOR(pg_catalog./) p.rows_total, 1)
            WHEN p.rows_total OPERATOR(pg_catalog.=) 0 THEN 100.0 END AS percent,
       pg_catalog.round(p.rows_per_second::pg_catalog.numeric, 1) AS rows_per_second,
       pg_catalog.round(p.tokens_per_minute::pg_catalog.numeric) AS tokens_per_minute, p.input_tokens, p.output_tokens, p.requests,
       pg_catalog.trim_scale(p.cost) AS cost, pg_catalog.trim_scale(p.cost_unconfirmed) AS cost_unconfirmed,
       CASE WHEN p.handled OPERATOR(pg_catalog.>) 0
            THEN pg_catalog.trim_scale(pg_catalog.round((p.cost OPERATOR(pg_catalog.*) p.rows_total) OPERATOR(pg_catalog./) p.handled, 6)) END AS projected_cost,
       CASE WHEN p.status OPERATOR(pg_catalog.=) 'running' AND p.rows_per_second OPERATOR(pg_catalog.>) 0
            THEN pg_catalog.make_interval(secs => pg_catalog.ceil(p.rows_left OPERATOR(pg_catalog./) p.rows_per_second)) END AS eta,
       p.last_error, p.started_at, p.updated_at
  FROM (
    SELECT j.id AS job_id, j.owner, j.relation_name AS relation, j.target, j.task, c.model,
           CASE WHEN j.wanted OPERATOR(pg_catalog.=) 'cancelled' THEN 'cancelled'
                WHEN s.epoch OPERATOR(pg_catalog.=) j.epoch AND s.status IN ('done', 'failed') THEN s.status
                WHEN j.wanted OPERATOR(pg_catalog.=) 'paused' THEN 'paused'
                WHEN s.epoch OPERATOR(pg_catalog.=) j.epoch AND s.status OPERATOR(pg_catalog.<>) 'running' THEN s.status
                WHEN llm_batch.waits_for_slot(j.id) THEN 'paused'
                ELSE 'running' END AS status,
           CASE WHEN j.wanted OPERATOR(pg_catalog.=) 'cancelled' THEN NULL
                WHEN s.epoch OPERATOR(pg_catalog.=) j.epoch AND s.status IN ('done', 'failed') THEN NULL
                WHEN j.wanted OPERATOR(pg_catalog.=) 'paused' THEN 'user'
                WHEN s.epoch OPERATOR(pg_catalog.=) j.epoch AND s.status OPERATOR(pg_catalog.<>) 'running' THEN s.reason
                WHEN llm_batch.waits_for_slot(j.id) THEN 'no_worker_slot' END AS reason,
           CASE WHEN s.rows_total IS NOT NULL THEN GREATEST(s.rows_total, h.handled) END AS rows_total,
           s.rows_done, s.rows_skipped, s.rows_failed, s.rows_superseded,
           CASE WHEN s.rows_total IS NOT NULL THEN GREATEST(s.rows_total OPERATOR(pg_catalog.-) h.handled, 0) END AS rows_left, h.handled,
           s.rows_per_second, s.tokens_per_minute, s.input_tokens, s.output_tokens, s.requests,
           s.cost, s.cost_unconfirmed, s.last_error, s.started_at, s.updated_at
      FROM llm_batch.job j
      JOIN llm_batch.job_state s ON s.job_id OPERATOR(pg_catalog.=) j.id
      CROSS JOIN LATERAL (SELECT s.rows_done OPERATOR(pg_catalog.+) s.rows_skipped OPERATOR(pg_catalog.+) s.rows_failed OPERATOR(pg_catalog.+) s.rows_superseded) h (handled)
      LEFT JOIN llm_batch.classifier c ON c.name OPERATOR(pg_catalog.=) j.task
     WHERE pg_catalog.pg_has_role(j.owner, 'USAGE') OR pg_catalog.pg_has_role('pg_monitor', 'USAGE')
  ) p;
COMMENT ON VIEW llm_batch.progress IS 'jobs: one''s own, or all for pg_monitor';
COMMENT ON COLUMN llm_batch.progress.status IS 'running, paused, done, failed, cancelled';
COMMENT ON COLUMN llm_batch.progress.reason IS 'why it is paused: user, budget, auth, spend, owner, restored wait for resume(); provider_down, quota, no_worker_slot go on by themselves';
COMMENT ON COLUMN llm_batch.progress.rows_total IS 'rows that were NULL at the start, and those that came since; NULL until they are counted';
COMMENT ON COLUMN llm_batch.progress.rows_superseded IS 'rows that others filled, changed or deleted meanwhile';
COMMENT ON COLUMN llm_batch.progress.cost IS 'dollars, by the model''s prices and the tokens the provider reported';
COMMENT ON COLUMN llm_batch.progress.cost_unconfirmed IS 'dollars that requests may have cost whose answers were lost in a crash';
COMMENT ON COLUMN llm_batch.progress.projected_cost IS 'dollars, if the rest costs as much a row as what is done';

CREATE VIEW llm_batch.failure WITH (security_barrier = true) AS
SELECT f.job_id, f.key, f.state, f.class, f.attempts, f.detail, f.at
  FROM llm_batch.row_failure f
  JOIN llm_batch.job j ON j.id OPERATOR(pg_catalog.=) f.job_id
 WHERE pg_catalog.pg_has_role(j.owner, 'USAGE') OR pg_catalog.pg_has_role('pg_monitor', 'USAGE');
COMMENT ON VIEW llm_batch.failure IS 'rows that jobs could not fill; rows whose input is NULL or empty are counted as skipped, not listed';
COMMENT ON COLUMN llm_batch.failure.key IS 'the row''s key: column names and values';
COMMENT ON COLUMN llm_batch.failure.state IS 'skipped: the model would not answer; failed: it went wrong';

CREATE VIEW llm_batch.activity WITH (security_barrier = true) AS
SELECT a.account, a.model, a.queued, a.in_flight_requests, a.in_flight_rows, a.tokens_in_window, a.tokens_limit,
       a.requests_in_window, a.requests_limit, a.used,
       pg_catalog.clock_timestamp() OPERATOR(pg_catalog.+) pg_catalog.make_interval(secs => a.waiting_ms OPERATOR(pg_catalog./) 1000::pg_catalog.float8) AS waiting_until,
       pg_catalog.round(a.rows_total::pg_catalog.numeric OPERATOR(pg_catalog./) NULLIF(a.requests_total, 0), 1) AS rows_per_request,
       a.requests_total, a.rows_total, a.throttled AS throttled_429, a.errors, a.last_error
  FROM pg_catalog.jsonb_to_recordset(llm_batch.gateway_activity()) AS a (
       account text, model text, queued bigint, in_flight_requests bigint, in_flight_rows bigint,
       tokens_in_window bigint, tokens_limit bigint, requests_in_window bigint, requests_limit bigint,
       used double precision, waiting_ms bigint, requests_total bigint, rows_total bigint, throttled bigint, errors bigint,
       last_error text);
COMMENT ON VIEW llm_batch.activity IS 'the limiter and the queue of each account and model, live: those one has streams of, or all for pg_monitor';
COMMENT ON COLUMN llm_batch.activity.used IS 'part of the tighter limit that is used up at present, 0 to 1';

-- Each look is a transaction of its own, so it sees what the worker has committed and holds no old snapshot.
CREATE PROCEDURE llm_batch.wait(job_id bigint, timeout interval DEFAULT NULL)
    LANGUAGE plpgsql AS $$
DECLARE
    deadline CONSTANT pg_catalog.timestamptz := pg_catalog.clock_timestamp() OPERATOR(pg_catalog.+) timeout;
    job      record;
    pauses   pg_catalog.float8 := 0.05;
BEGIN
    PERFORM llm_batch.refuse_transaction_block('llm_batch.wait()');
    LOOP
        COMMIT;
        SELECT p.status, p.reason, p.last_error, p.rows_left INTO job
          FROM llm_batch.progress p WHERE p.job_id OPERATOR(pg_catalog.=) wait.job_id;
        IF NOT FOUND THEN
            RAISE EXCEPTION 'job % does not exist', wait.job_id USING ERRCODE = 'undefined_object',
                HINT = 'The view llm_batch.progress lists your jobs.';
        ELSIF job.status OPERATOR(pg_catalog.=) 'done' THEN
            RETURN;
        ELSIF job.status OPERATOR(pg_catalog.<>) 'running' AND COALESCE(job.reason, '') NOT IN ('provider_down', 'quota', 'no_worker_slot') THEN
            RAISE EXCEPTION 'job % is %', wait.job_id,
                pg_catalog.concat(job.status, (' (' OPERATOR(pg_catalog.||) job.reason) OPERATOR(pg_catalog.||) ')')
                USING ERRCODE = 'object_not_in_prerequisite_state',
                DETAIL = COALESCE(job.last_error, pg_catalog.concat(job.rows_left, ' rows are left.')),
                HINT = CASE job.status WHEN 'paused' THEN pg_catalog.concat('Mend the cause, then call llm_batch.resume(', wait.job_id, ').')
                                       ELSE 'A new llm_batch.backfill() goes on with the rows that are still NULL.' END;
        ELSIF pg_catalog.clock_timestamp() OPERATOR(pg_catalog.>) deadline THEN
            RAISE EXCEPTION 'job % is not done after %', wait.job_id, wait.timeout USING ERRCODE = 'query_canceled',
                DETAIL = pg_catalog.concat(job.rows_left, ' rows are left.');
        END IF;
        PERFORM pg_catalog.pg_sleep(pauses);
        pauses := LEAST(pauses OPERATOR(pg_catalog.*) 1.5::pg_catalog.float8, 0.5::pg_catalog.float8);
    END LOOP;
END
$$;
COMMENT ON PROCEDURE llm_batch.wait IS 'returns when a job is done; raises if it fails, is cancelled or paused; not inside a transaction block';

-- Functions of the schema are for everyone: each checks what its caller may do. Tables are written by none but the
-- extension's own code.
GRANT USAGE ON SCHEMA llm_batch TO PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA llm_batch FROM PUBLIC;
REVOKE ALL ON ALL SEQUENCES IN SCHEMA llm_batch FROM PUBLIC;
GRANT SELECT ON llm_batch.model, llm_batch.classifier, llm_batch.progress, llm_batch.failure, llm_batch.activity TO PUBLIC;

SET LOCAL search_path TO @extschema@, pg_temp;
