CREATE FUNCTION llm_batch.provider_validator(options text[], catalog oid) RETURNS void
    LANGUAGE c STRICT SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'provider_validator_wrapper';
COMMENT ON FUNCTION llm_batch.provider_validator(text[], oid) IS 'checks the options of servers and user mappings of the wrapper llm_provider';

CREATE FOREIGN DATA WRAPPER llm_provider NO HANDLER VALIDATOR llm_batch.provider_validator;
COMMENT ON FOREIGN DATA WRAPPER llm_provider IS 'providers of language models: a server is an endpoint, a user mapping holds its key';

-- Models

CREATE FUNCTION llm_batch.create_model(
    name text, server name, model text,
    tokens_per_minute integer DEFAULT NULL, requests_per_minute integer DEFAULT NULL,
    input_tokens_per_minute integer DEFAULT NULL, output_tokens_per_minute integer DEFAULT NULL,
    inputs_per_minute integer DEFAULT NULL,
    input_price numeric DEFAULT NULL, output_price numeric DEFAULT NULL, cached_input_price numeric DEFAULT NULL,
    max_concurrent_requests integer DEFAULT NULL, request_timeout interval DEFAULT NULL,
    max_request_tokens integer DEFAULT NULL, parameters jsonb DEFAULT NULL
) RETURNS void
    LANGUAGE c PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'create_model_wrapper';
COMMENT ON FUNCTION llm_batch.create_model IS 'creates a model on a server, with its limits and its prices in dollars per million tokens';

CREATE FUNCTION llm_batch.alter_model(
    name text, server name DEFAULT NULL, model text DEFAULT NULL,
    tokens_per_minute integer DEFAULT NULL, requests_per_minute integer DEFAULT NULL,
    input_tokens_per_minute integer DEFAULT NULL, output_tokens_per_minute integer DEFAULT NULL,
    inputs_per_minute integer DEFAULT NULL,
    input_price numeric DEFAULT NULL, output_price numeric DEFAULT NULL, cached_input_price numeric DEFAULT NULL,
    max_concurrent_requests integer DEFAULT NULL, request_timeout interval DEFAULT NULL,
    max_request_tokens integer DEFAULT NULL, parameters jsonb DEFAULT NULL,
    reset text[] DEFAULT '{}'
) RETURNS void
    LANGUAGE c PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'alter_model_wrapper';
COMMENT ON FUNCTION llm_batch.alter_model IS 'changes the given settings of a model; "reset" names settings to restore to their defaults';

CREATE FUNCTION llm_batch.drop_model(name text) RETURNS void
    LANGUAGE c PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'drop_model_wrapper';
COMMENT ON FUNCTION llm_batch.drop_model IS 'drops a model that no task or route uses';

CREATE FUNCTION llm_batch.create_route(name text, models text[], policy text DEFAULT 'failover') RETURNS void
    LANGUAGE c PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'create_route_wrapper';
COMMENT ON FUNCTION llm_batch.create_route IS 'creates a route, whose name stands wherever a model''s may: failover asks the first model that answers, spread whichever has room in its limits, cheapest the one whose rows cost least';

CREATE FUNCTION llm_batch.alter_route(name text, models text[] DEFAULT NULL, policy text DEFAULT NULL) RETURNS void
    LANGUAGE c PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'alter_route_wrapper';
COMMENT ON FUNCTION llm_batch.alter_route IS 'changes the models or the policy of a route; NULL keeps them';

CREATE FUNCTION llm_batch.drop_route(name text) RETURNS void
    LANGUAGE c PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'drop_route_wrapper';
COMMENT ON FUNCTION llm_batch.drop_route IS 'drops a route that no task uses';

-- Tasks

-- What makes and asks tasks of one kind is in the folder kind.

CREATE FUNCTION llm_batch.drop_task(name text) RETURNS void
    LANGUAGE c PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'drop_task_wrapper';
COMMENT ON FUNCTION llm_batch.drop_task IS 'drops a task that no unfinished job uses; llm_batch.task_history keeps its last version';

-- Owners

CREATE FUNCTION llm_batch.set_owner(kind text, name text, new_owner regrole) RETURNS void
    LANGUAGE c STRICT PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'set_owner_wrapper';
COMMENT ON FUNCTION llm_batch.set_owner(text, text, regrole) IS 'changes the owner of a model, a route or a task; kind is model, route or task';

CREATE FUNCTION llm_batch.set_owner(job_id bigint, new_owner regrole) RETURNS void
    LANGUAGE c STRICT PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'set_job_owner_wrapper';
COMMENT ON FUNCTION llm_batch.set_owner(bigint, regrole) IS 'changes the owner of a job; the job runs with the owner''s rights';

-- Functions that ask. They are in the schema that CREATE EXTENSION is given.

-- No search_path for what is called row by row: to set it takes longer than to find an answer that is there. What looks
-- anything up does so under one of its own.
CREATE FUNCTION @extschema@.llm_run(input text, task text) RETURNS text
    LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED COST 100000
    AS 'MODULE_PATHNAME', 'llm_run_wrapper';
COMMENT ON FUNCTION @extschema@.llm_run(text, text) IS 'returns the answer of a task of any kind to a text; JSON for extractors; NULL, with a warning, if the model gives no answer';

CREATE FUNCTION @extschema@.llm_split(input text, max_tokens integer, overlap integer DEFAULT 0)
    RETURNS TABLE (n integer, piece text)
    LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE COST 10000 ROWS 20
    AS 'MODULE_PATHNAME', 'llm_split_wrapper';
COMMENT ON FUNCTION @extschema@.llm_split(text, integer, integer) IS 'returns a text in pieces of at most max_tokens tokens, cut at the ends of paragraphs, sentences or words; each begins with the last overlap tokens of the one before';

-- No search_path: these run the caller's query.
CREATE FUNCTION @extschema@.llm_classify_batch(query text, task text, options jsonb DEFAULT '{}')
    RETURNS TABLE (id text, label text, status text, detail text)
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE COST 1000000 ROWS 1000
    AS 'MODULE_PATHNAME', 'llm_classify_batch_wrapper';
COMMENT ON FUNCTION @extschema@.llm_classify_batch(text, text, jsonb) IS 'returns labels for the rows of a query with columns id and input, and optionally a third: rows with different values of it never share a request; status is ok, skipped or failed';

CREATE FUNCTION @extschema@.llm_classify_batch(query text, labels text[], options jsonb DEFAULT '{}')
    RETURNS TABLE (id text, label text, status text, detail text)
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE COST 1000000 ROWS 1000
    AS 'MODULE_PATHNAME', 'llm_classify_batch_labels_wrapper';
COMMENT ON FUNCTION @extschema@.llm_classify_batch(text, text[], jsonb) IS 'returns labels for the rows of a query, with labels instead of a classifier; the model is the option "model" or llm_batch.default_model';

CREATE FUNCTION @extschema@.llm_classify_array(ids anyarray, inputs text[], task text, options jsonb DEFAULT '{}')
    RETURNS TABLE (id anyelement, label text, status text, detail text)
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE COST 1000000 ROWS 1000 SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'llm_classify_array_wrapper';
COMMENT ON FUNCTION @extschema@.llm_classify_array(anyarray, text[], text, jsonb) IS 'returns labels for an array of inputs, each with its id, in the same order; status is ok, skipped or failed';

-- No search_path, as above.
CREATE FUNCTION @extschema@.llm_run_batch(query text, task text, options jsonb DEFAULT '{}')
    RETURNS TABLE (id text, value text, status text, detail text, confidence real)
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE COST 1000000 ROWS 1000
    AS 'MODULE_PATHNAME', 'llm_run_batch_wrapper';
COMMENT ON FUNCTION @extschema@.llm_run_batch(text, text, jsonb) IS 'returns the answers of a task of any kind to the rows of a query, as llm_classify_batch(), and the probability of each where the provider gives one';

CREATE FUNCTION @extschema@.llm_run_array(ids anyarray, inputs text[], task text, options jsonb DEFAULT '{}')
    RETURNS TABLE (id anyelement, value text, status text, detail text, confidence real)
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE COST 1000000 ROWS 1000 SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'llm_run_array_wrapper';
COMMENT ON FUNCTION @extschema@.llm_run_array(anyarray, text[], text, jsonb) IS 'returns the answers of a task of any kind to an array of inputs, as llm_classify_array(), and the probability of each where the provider gives one';

-- Jobs

-- No search_path: input and filter are read under the caller's.
CREATE FUNCTION llm_batch.backfill(
    relation regclass, input text, target name, task text, filter text DEFAULT NULL,
    max_cost numeric DEFAULT NULL, max_tokens bigint DEFAULT NULL, options jsonb DEFAULT '{}'
) RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'backfill_wrapper';
COMMENT ON FUNCTION llm_batch.backfill(regclass, text, name, text, text, numeric, bigint, jsonb) IS 'creates a job that fills a column where it is NULL, and returns its id; the job starts at commit';

-- A literal without a type names a column, by the rules for overloaded functions.

CREATE FUNCTION llm_batch.backfill(
    relation regclass, input text, targets jsonb, task text, filter text DEFAULT NULL,
    max_cost numeric DEFAULT NULL, max_tokens bigint DEFAULT NULL, options jsonb DEFAULT '{}'
) RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'backfill_targets_wrapper';
COMMENT ON FUNCTION llm_batch.backfill(regclass, text, jsonb, text, text, numeric, bigint, jsonb) IS 'the same for several columns at once: "targets" is an object of columns and the fields that fill them';

CREATE FUNCTION llm_batch.estimate(
    relation regclass, input text, target name, task text, filter text DEFAULT NULL, options jsonb DEFAULT '{}',
    sample_rows integer DEFAULT 1000
) RETURNS TABLE (
    rows bigint, requests bigint, input_tokens bigint, output_tokens bigint, cost numeric, duration interval,
    sample_rows bigint, example_request jsonb
)
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 1
    AS 'MODULE_PATHNAME', 'estimate_wrapper';
COMMENT ON FUNCTION llm_batch.estimate(regclass, text, name, text, text, jsonb, integer) IS 'estimates requests, tokens, cost and duration of llm_batch.backfill() from a sample of the rows; sends nothing';

CREATE FUNCTION llm_batch.estimate(
    relation regclass, input text, targets jsonb, task text, filter text DEFAULT NULL, options jsonb DEFAULT '{}',
    sample_rows integer DEFAULT 1000
) RETURNS TABLE (
    rows bigint, requests bigint, input_tokens bigint, output_tokens bigint, cost numeric, duration interval,
    sample_rows bigint, example_request jsonb
)
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 1
    AS 'MODULE_PATHNAME', 'estimate_targets_wrapper';
COMMENT ON FUNCTION llm_batch.estimate(regclass, text, jsonb, text, text, jsonb, integer) IS 'the same for several columns at once';

CREATE FUNCTION llm_batch.alter_job(
    job_id bigint, max_cost numeric DEFAULT NULL, max_tokens bigint DEFAULT NULL, deadline text DEFAULT NULL
) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'alter_job_wrapper';
COMMENT ON FUNCTION llm_batch.alter_job IS 'changes the budget of a job, in dollars and in tokens, and its deadline; NULL keeps a value, the deadline infinity removes it';

CREATE FUNCTION llm_batch.pause(job_id bigint) RETURNS boolean
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'pause_wrapper';
COMMENT ON FUNCTION llm_batch.pause IS 'pauses a job; answers to requests under way are still written; false if it was paused already';

CREATE FUNCTION llm_batch.resume(job_id bigint) RETURNS boolean
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'resume_wrapper';
COMMENT ON FUNCTION llm_batch.resume IS 'resumes a paused job; false if it was running already';

CREATE FUNCTION llm_batch.cancel(job_id bigint) RETURNS boolean
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'cancel_wrapper';
COMMENT ON FUNCTION llm_batch.cancel IS 'cancels a job; values already written stay; false if it had ended already';

CREATE FUNCTION llm_batch.retry_failed(job_id bigint) RETURNS boolean
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'retry_failed_wrapper';
COMMENT ON FUNCTION llm_batch.retry_failed IS 'makes a job ask again for the rows that it listed as skipped or failed; false if there are none';

CREATE FUNCTION llm_batch.forget(job_id bigint) RETURNS void
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'forget_wrapper';
COMMENT ON FUNCTION llm_batch.forget IS 'removes a job that has ended from llm_batch.progress, with its failures';

-- Called row by row: it looks nothing up.
CREATE FUNCTION llm_batch.vector_numbers(vector text) RETURNS real[]
    LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'vector_numbers_wrapper';
COMMENT ON FUNCTION llm_batch.vector_numbers IS 'returns the numbers of a vector whose bytes are given in base64; used by jobs to write vectors';

-- Reads shared memory. Used by views.
CREATE FUNCTION llm_batch.waits_for(job_id bigint) RETURNS text
    LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'waits_for_wrapper';
COMMENT ON FUNCTION llm_batch.waits_for IS 'returns why a job cannot start: no_worker_slot, disabled or no_connections; used by llm_batch.progress';

CREATE FUNCTION llm_batch.goes_on(reason text) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp
    RETURN COALESCE(reason, '') IN ('provider_down', 'quota', 'read_only', 'write_error', 'no_worker_slot', 'disabled', 'no_connections');
COMMENT ON FUNCTION llm_batch.goes_on IS 'returns whether a job that is paused for a reason goes on by itself; used by llm_batch.progress';

CREATE FUNCTION llm_batch.home() RETURNS text
    LANGUAGE c STABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'home_wrapper';
COMMENT ON FUNCTION llm_batch.home() IS 'returns an identifier of this cluster, database and extension; OIDs are valid only there';

-- The objects that a number and a name stand for: see tables.sql. NULL if there is none.

CREATE FUNCTION llm_batch.owner_now(number oid, called name, home text) RETURNS oid
    LANGUAGE sql STABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp
    RETURN (SELECT r.oid FROM pg_catalog.pg_roles r
             WHERE r.oid OPERATOR(pg_catalog.=) CASE WHEN owner_now.home OPERATOR(pg_catalog.=) llm_batch.home() THEN owner_now.number
                   ELSE (SELECT x.oid FROM pg_catalog.pg_roles x WHERE x.rolname OPERATOR(pg_catalog.=) owner_now.called) END);
COMMENT ON FUNCTION llm_batch.owner_now IS 'returns the role that owns a row: by OID if "home" is this database, else by name';

CREATE FUNCTION llm_batch.server_now(number oid, called name, home text) RETURNS oid
    LANGUAGE sql STABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp
    RETURN (SELECT s.oid FROM pg_catalog.pg_foreign_server s
             WHERE s.oid OPERATOR(pg_catalog.=) CASE WHEN server_now.home OPERATOR(pg_catalog.=) llm_batch.home() THEN server_now.number
                   WHEN server_now.number OPERATOR(pg_catalog.<>) 0::pg_catalog.oid
                   THEN (SELECT x.oid FROM pg_catalog.pg_foreign_server x WHERE x.srvname OPERATOR(pg_catalog.=) server_now.called) END);
COMMENT ON FUNCTION llm_batch.server_now IS 'returns the foreign server of a model: by OID if "home" is this database, else by name';

CREATE FUNCTION llm_batch.relation_now(number oid, called text, home text) RETURNS oid
    LANGUAGE sql STABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp
    RETURN (SELECT c.oid FROM pg_catalog.pg_class c
             WHERE c.oid OPERATOR(pg_catalog.=) CASE WHEN relation_now.home OPERATOR(pg_catalog.=) llm_batch.home() THEN relation_now.number
                   WHEN relation_now.number OPERATOR(pg_catalog.<>) 0::pg_catalog.oid
                   THEN (SELECT x.oid FROM pg_catalog.pg_class x JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) x.relnamespace
                          WHERE n.nspname OPERATOR(pg_catalog.=) (pg_catalog.parse_ident(relation_now.called))[1]::pg_catalog.name
                            AND x.relname OPERATOR(pg_catalog.=) (pg_catalog.parse_ident(relation_now.called))[2]::pg_catalog.name) END);
COMMENT ON FUNCTION llm_batch.relation_now IS 'returns the table of a job: by OID if "home" is this database, else by name';

CREATE FUNCTION llm_batch.gateway_activity() RETURNS jsonb
    LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'gateway_activity_wrapper';
COMMENT ON FUNCTION llm_batch.gateway_activity IS 'returns the state of the gateway; used by llm_batch.activity';

CREATE FUNCTION llm_batch.refuse_transaction_block(what text) RETURNS void
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'refuse_transaction_block_wrapper';
COMMENT ON FUNCTION llm_batch.refuse_transaction_block(text) IS 'raises an error inside a transaction block; used by llm_batch.wait()';
