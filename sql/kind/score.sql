-- Scorers: numbers within a range

CREATE FUNCTION llm_batch.create_scorer(
    name text, instruction text, low numeric DEFAULT 0, high numeric DEFAULT 1, model text DEFAULT NULL,
    examples jsonb DEFAULT NULL, options jsonb DEFAULT '{}'
) RETURNS void
    LANGUAGE c PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'create_scorer_wrapper';
COMMENT ON FUNCTION llm_batch.create_scorer IS 'creates a scorer: the instruction says what the number from low to high tells of each text';

CREATE FUNCTION llm_batch.alter_scorer(
    name text, instruction text DEFAULT NULL, low numeric DEFAULT NULL, high numeric DEFAULT NULL, model text DEFAULT NULL,
    examples jsonb DEFAULT NULL, options jsonb DEFAULT NULL
) RETURNS void
    LANGUAGE c PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'alter_scorer_wrapper';
COMMENT ON FUNCTION llm_batch.alter_scorer IS 'changes the given settings of a scorer';

CREATE FUNCTION @extschema@.llm_score(input text, question text, options jsonb DEFAULT '{}') RETURNS real
    LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED COST 100000
    AS 'MODULE_PATHNAME', 'llm_score_wrapper';
COMMENT ON FUNCTION @extschema@.llm_score(text, text, jsonb) IS 'returns a score of a text from 0 to 1; every row that reaches the call is asked about, also under ORDER BY and LIMIT';
