-- Embedders: vectors

CREATE FUNCTION llm_batch.create_embedder(
    name text, model text, dimensions integer, input_type text DEFAULT NULL, options jsonb DEFAULT '{}'
) RETURNS void
    LANGUAGE c PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'create_embedder_wrapper';
COMMENT ON FUNCTION llm_batch.create_embedder IS 'creates an embedder: a task whose answers are vectors of so many dimensions';

CREATE FUNCTION llm_batch.alter_embedder(
    name text, model text DEFAULT NULL, dimensions integer DEFAULT NULL, input_type text DEFAULT NULL, options jsonb DEFAULT NULL
) RETURNS void
    LANGUAGE c PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'alter_embedder_wrapper';
COMMENT ON FUNCTION llm_batch.alter_embedder IS 'changes the given settings of an embedder';

CREATE FUNCTION @extschema@.llm_embed(input text, task text) RETURNS real[]
    LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED COST 100000
    AS 'MODULE_PATHNAME', 'llm_embed_wrapper';
COMMENT ON FUNCTION @extschema@.llm_embed(text, text) IS 'returns the vector that an embedder gives a text; NULL, with a warning, if the model gives none';
