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

-- Roles, servers, tables and types are kept by number and by name. The number holds where a row is at home
-- (llm_batch.home()): a name may be given away there. The name holds where a dump has brought it to: a number means
-- something else there. No column has a type such as regclass: it would be loaded only where all of them exist.

CREATE TABLE llm_batch.model (
    name                    text PRIMARY KEY,
    owner                   oid NOT NULL,
    owner_name              name NOT NULL,
    server                  oid NOT NULL,
    server_name             name NOT NULL,
    home                    text NOT NULL,
    model                   text NOT NULL,
    tokens_per_minute       integer,
    requests_per_minute     integer,
    input_tokens_per_minute integer,
    output_tokens_per_minute integer,
    inputs_per_minute       integer,
    input_price             numeric,
    output_price            numeric,
    cached_input_price      numeric,
    price_as_of             date,
    max_concurrent_requests integer,
    request_timeout         interval NOT NULL,
    max_request_tokens      integer NOT NULL,
    parameters              jsonb NOT NULL
);
COMMENT ON TABLE llm_batch.model IS 'language models; managed by llm_batch.create_model(), alter_model() and drop_model()';
COMMENT ON COLUMN llm_batch.model.owner IS 'OID of the role that owns the model; valid where "home" is this database';
COMMENT ON COLUMN llm_batch.model.owner_name IS 'last known name of the owner; identifies it in another database, as after a restore';
COMMENT ON COLUMN llm_batch.model.server IS 'OID of the foreign server; valid where "home" is this database';
COMMENT ON COLUMN llm_batch.model.server_name IS 'last known name of the foreign server; identifies it in another database, as after a restore';
COMMENT ON COLUMN llm_batch.model.home IS 'cluster, database and extension in which the OIDs of owner and server are valid';
COMMENT ON COLUMN llm_batch.model.model IS 'the provider''s name of the model';
COMMENT ON COLUMN llm_batch.model.tokens_per_minute IS 'limit of tokens per minute, prompts and answers together; NULL means no limit';
COMMENT ON COLUMN llm_batch.model.requests_per_minute IS 'limit of requests per minute; NULL means no limit';
COMMENT ON COLUMN llm_batch.model.input_tokens_per_minute IS 'limit of prompt tokens per minute; NULL means no limit';
COMMENT ON COLUMN llm_batch.model.output_tokens_per_minute IS 'limit of answer tokens per minute; NULL means no limit';
COMMENT ON COLUMN llm_batch.model.inputs_per_minute IS 'limit of texts per minute, however many of them a request has; NULL means that of the provider where it is known, else no limit';
COMMENT ON COLUMN llm_batch.model.input_price IS 'dollars per million prompt tokens';
COMMENT ON COLUMN llm_batch.model.output_price IS 'dollars per million answer tokens';
COMMENT ON COLUMN llm_batch.model.cached_input_price IS 'dollars per million prompt tokens that the provider had cached; NULL means input_price';
COMMENT ON COLUMN llm_batch.model.price_as_of IS 'date of the prices if they were taken from llm_batch.list_price; NULL if they were given, or none is known';
COMMENT ON COLUMN llm_batch.model.max_concurrent_requests IS 'maximum number of concurrent requests; NULL means that the gateway finds out by trying';
COMMENT ON COLUMN llm_batch.model.request_timeout IS 'maximum duration of a request';
COMMENT ON COLUMN llm_batch.model.max_request_tokens IS 'maximum number of tokens of a request, prompt and answer together';
COMMENT ON COLUMN llm_batch.model.parameters IS 'additional parameters of each request, such as {"temperature": 0}';

CREATE TABLE llm_batch.route (
    name        text PRIMARY KEY,
    owner       oid NOT NULL,
    owner_name  name NOT NULL,
    home        text NOT NULL,
    models      text[] NOT NULL,
    policy      text NOT NULL CHECK (policy IN ('failover', 'spread', 'cheapest'))
);
COMMENT ON TABLE llm_batch.route IS 'several models under one name; managed by llm_batch.create_route(), alter_route() and drop_route()';
COMMENT ON COLUMN llm_batch.route.models IS 'the models, in the order in which failover asks them';
COMMENT ON COLUMN llm_batch.route.policy IS 'failover: the first model that is not down and has not stopped; spread: whichever has room in its limits; cheapest: the one whose rows cost least, and dearer ones while it has no room if somebody waits or the job has a deadline';

CREATE TABLE llm_batch.task (
    name        text PRIMARY KEY,
    owner       oid NOT NULL,
    owner_name  name NOT NULL,
    home        text NOT NULL,
    kind        text NOT NULL,
    model       text NOT NULL,
    spec        jsonb NOT NULL,
    options     jsonb NOT NULL,
    search_path text NOT NULL,
    version     integer NOT NULL DEFAULT 1
);
COMMENT ON TABLE llm_batch.task IS 'tasks; managed by llm_batch.create_classifier() and the like, alter_classifier() and the like, and drop_task()';
COMMENT ON COLUMN llm_batch.task.kind IS 'the kind of its answers, such as classify';
COMMENT ON COLUMN llm_batch.task.model IS 'the model or route that is asked';
COMMENT ON COLUMN llm_batch.task.spec IS 'specification by kind: instruction, labels, fields, range, dimensions, examples';
COMMENT ON COLUMN llm_batch.task.options IS 'options of requests; jobs and functions can override them';
COMMENT ON COLUMN llm_batch.task.search_path IS 'search_path under which the expressions of the options are read: that of their author';
COMMENT ON COLUMN llm_batch.task.version IS 'raised by each change of the task; llm_batch.task_history keeps the versions before';

CREATE TABLE llm_batch.task_history (
    name        text NOT NULL,
    version     integer NOT NULL,
    owner       oid NOT NULL,
    owner_name  name NOT NULL,
    home        text NOT NULL,
    kind        text NOT NULL,
    model       text NOT NULL,
    spec        jsonb NOT NULL,
    options     jsonb NOT NULL,
    search_path text NOT NULL,
    replaced_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (name, version)
);
COMMENT ON TABLE llm_batch.task_history IS 'versions of tasks before the last, and of tasks that were dropped';
COMMENT ON COLUMN llm_batch.task_history.owner_name IS 'name of the owner when the version was replaced';
COMMENT ON COLUMN llm_batch.task_history.replaced_at IS 'when the next version was made, or the task was dropped';

-- The jobs, as their owners want them. A job's worker writes only to job_state, so that an open
-- transaction with a pause() in it blocks no worker.
CREATE TABLE llm_batch.job (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    owner         oid NOT NULL,
    owner_name    name NOT NULL,
    relation      oid NOT NULL,
    -- Schema and name, quoted.
    relation_name text NOT NULL,
    -- The columns to fill, and the field of each: NULL is the whole answer.
    targets       name[] NOT NULL,
    target_attnums smallint[] NOT NULL,
    target_types  oid[] NOT NULL,
    target_type_names text[] NOT NULL,
    target_typmods integer[] NOT NULL,
    fields        text[] NOT NULL,
    key_names     name[] NOT NULL,
    key_attnums   smallint[] NOT NULL,
    input         text NOT NULL,
    filter        text,
    max_cost      numeric,
    max_tokens    bigint,
    task          text NOT NULL,
    options       jsonb NOT NULL,
    search_path   text NOT NULL,
    -- llm_batch.home() where it was made or resumed. A dump brings it to another place.
    home          text NOT NULL,
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
    rows_reused       bigint NOT NULL DEFAULT 0,
    input_tokens      bigint NOT NULL DEFAULT 0,
    cached_input_tokens bigint NOT NULL DEFAULT 0,
    output_tokens     bigint NOT NULL DEFAULT 0,
    requests          bigint NOT NULL DEFAULT 0,
    cost              numeric NOT NULL DEFAULT 0,
    -- Most that requests may have taken whose answers were lost.
    cost_unconfirmed  numeric NOT NULL DEFAULT 0,
    tokens_unconfirmed bigint NOT NULL DEFAULT 0,
    -- The part of a job's budget that the gateway may spend and has not reported: always within the budget.
    cost_reserved     numeric NOT NULL DEFAULT 0,
    tokens_reserved   bigint NOT NULL DEFAULT 0,
    rows_per_second   double precision,
    tokens_per_minute double precision,
    last_error        text,
    -- Runs begun, less one for each time that rows were done since: how often in a row a worker or the gateway died.
    starts            integer NOT NULL DEFAULT 0,
    started_at        timestamptz,
    updated_at        timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50);
COMMENT ON TABLE llm_batch.job_state IS 'state and counters of jobs, written by their workers; see llm_batch.progress';

CREATE TABLE llm_batch.job_model (
    job_id              bigint NOT NULL REFERENCES llm_batch.job (id) ON DELETE CASCADE,
    model               text NOT NULL,
    rows_answered       bigint NOT NULL,
    requests            bigint NOT NULL,
    input_tokens        bigint NOT NULL,
    cached_input_tokens bigint NOT NULL,
    output_tokens       bigint NOT NULL,
    cost                numeric NOT NULL,
    cost_unconfirmed    numeric NOT NULL,
    PRIMARY KEY (job_id, model)
) WITH (fillfactor = 50);
COMMENT ON TABLE llm_batch.job_model IS 'counters of jobs by model; see llm_batch.progress_by_model';

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

CREATE TABLE llm_batch.row_null (
    -- Without a foreign key, which would cost as much as the rest of a row: who deletes the job deletes these.
    job_id   bigint NOT NULL,
    -- A hash of the row's key as text, seeded with the hash of its input.
    key_hash bigint NOT NULL,
    PRIMARY KEY (job_id, key_hash)
);
COMMENT ON TABLE llm_batch.row_null IS 'rows for which a job has had NULL as an answer: it does not ask for them again';

-- A dump keeps what users made; jobs wake up paused where it is restored, since job.home tells it apart. Names are those of
-- the moment of the dump: pg_dump puts the condition behind "SELECT … FROM ONLY table", and jsonb_populate_record() gives
-- the columns in their order. What is gone, 0 stands for: its name may be another's where the dump is restored. A dropped
-- role keeps its name, which nobody but an administrator gives away.
SELECT pg_catalog.pg_extension_config_dump('llm_batch.model', $$WHERE false UNION ALL
    SELECT (pg_catalog.jsonb_populate_record(m, pg_catalog.jsonb_build_object(
               'owner_name', COALESCE(r.rolname, m.owner_name), 'server',
               CASE WHEN s.oid IS NULL AND m.home OPERATOR(pg_catalog.=) llm_batch.home() THEN 0::pg_catalog.oid ELSE m.server END,
               'server_name', COALESCE(s.srvname, m.server_name)))).*
      FROM llm_batch.model m
      LEFT JOIN pg_catalog.pg_roles r ON r.oid OPERATOR(pg_catalog.=) llm_batch.owner_now(m.owner, m.owner_name, m.home)
      LEFT JOIN pg_catalog.pg_foreign_server s ON s.oid OPERATOR(pg_catalog.=) llm_batch.server_now(m.server, m.server_name, m.home)$$);
SELECT pg_catalog.pg_extension_config_dump('llm_batch.task', $$WHERE false UNION ALL
    SELECT (pg_catalog.jsonb_populate_record(t, pg_catalog.jsonb_build_object('owner_name', COALESCE(r.rolname, t.owner_name)))).*
      FROM llm_batch.task t
      LEFT JOIN pg_catalog.pg_roles r ON r.oid OPERATOR(pg_catalog.=) llm_batch.owner_now(t.owner, t.owner_name, t.home)$$);
SELECT pg_catalog.pg_extension_config_dump('llm_batch.route', $$WHERE false UNION ALL
    SELECT (pg_catalog.jsonb_populate_record(o, pg_catalog.jsonb_build_object('owner_name', COALESCE(r.rolname, o.owner_name)))).*
      FROM llm_batch.route o
      LEFT JOIN pg_catalog.pg_roles r ON r.oid OPERATOR(pg_catalog.=) llm_batch.owner_now(o.owner, o.owner_name, o.home)$$);
SELECT pg_catalog.pg_extension_config_dump('llm_batch.task_history', '');
SELECT pg_catalog.pg_extension_config_dump('llm_batch.job', $$WHERE false UNION ALL
    SELECT (pg_catalog.jsonb_populate_record(j, pg_catalog.jsonb_build_object(
               'owner_name', COALESCE(r.rolname, j.owner_name), 'relation',
               CASE WHEN t.oid IS NULL AND j.home OPERATOR(pg_catalog.=) llm_batch.home() THEN 0::pg_catalog.oid ELSE j.relation END,
               'relation_name', CASE WHEN t.oid IS NULL THEN j.relation_name
                   ELSE pg_catalog.concat(pg_catalog.quote_ident(n.nspname), '.', pg_catalog.quote_ident(t.relname)) END,
               'target_type_names', CASE WHEN j.home OPERATOR(pg_catalog.=) llm_batch.home()
                                         THEN (SELECT pg_catalog.array_agg(pg_catalog.format_type(u.t, NULL) ORDER BY u.n)
                                                 FROM pg_catalog.unnest(j.target_types) WITH ORDINALITY u (t, n))
                                         ELSE j.target_type_names END))).*
      FROM llm_batch.job j
      LEFT JOIN pg_catalog.pg_roles r ON r.oid OPERATOR(pg_catalog.=) llm_batch.owner_now(j.owner, j.owner_name, j.home)
      LEFT JOIN (pg_catalog.pg_class t JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) t.relnamespace)
             ON t.oid OPERATOR(pg_catalog.=) llm_batch.relation_now(j.relation, j.relation_name, j.home)$$);
SELECT pg_catalog.pg_extension_config_dump('llm_batch.job_id_seq', '');
SELECT pg_catalog.pg_extension_config_dump('llm_batch.job_state', '');
SELECT pg_catalog.pg_extension_config_dump('llm_batch.job_model', '');
SELECT pg_catalog.pg_extension_config_dump('llm_batch.row_failure', '');
SELECT pg_catalog.pg_extension_config_dump('llm_batch.row_null', '');
