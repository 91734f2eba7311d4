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
    cached_input_price      numeric,
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
COMMENT ON COLUMN llm_batch.model.cached_input_price IS 'dollars per million prompt tokens that the provider had cached; NULL is as input_price';
COMMENT ON COLUMN llm_batch.model.max_concurrent_requests IS 'most requests at the same time; NULL is as many as prove useful';
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
    max_cost      numeric,
    max_tokens    bigint,
    task          text NOT NULL,
    options       jsonb NOT NULL,
    search_path   text NOT NULL,
    -- Where it was made, or resumed: llm_batch.home(). A dump brings it to where it is not at home.
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
    -- What requests may have taken whose answers were lost.
    cost_unconfirmed  numeric NOT NULL DEFAULT 0,
    tokens_unconfirmed bigint NOT NULL DEFAULT 0,
    -- What of a job's budget the gateway may spend, and has not reported: always within the budget.
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

-- A dump keeps what users made; jobs wake up paused where it is restored, since job.home tells it apart. Jobs whose table
-- or owner is gone are left out: their numbers would mean something else there.
SELECT pg_catalog.pg_extension_config_dump('llm_batch.model', '');
SELECT pg_catalog.pg_extension_config_dump('llm_batch.classifier', '');
SELECT pg_catalog.pg_extension_config_dump('llm_batch.job',
    'WHERE EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid OPERATOR(pg_catalog.=) relation)
       AND EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.oid OPERATOR(pg_catalog.=) owner)');
SELECT pg_catalog.pg_extension_config_dump('llm_batch.job_id_seq', '');
SELECT pg_catalog.pg_extension_config_dump('llm_batch.job_state',
    'WHERE job_id IN (SELECT j.id FROM llm_batch.job j JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) j.relation
                        JOIN pg_catalog.pg_roles r ON r.oid OPERATOR(pg_catalog.=) j.owner)');
SELECT pg_catalog.pg_extension_config_dump('llm_batch.row_failure',
    'WHERE job_id IN (SELECT j.id FROM llm_batch.job j JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) j.relation
                        JOIN pg_catalog.pg_roles r ON r.oid OPERATOR(pg_catalog.=) j.owner)');
