-- Generators: texts, summaries, translations

CREATE FUNCTION llm_batch.create_generator(
    name text, instruction text, model text DEFAULT NULL,
    examples jsonb DEFAULT NULL, options jsonb DEFAULT '{}'
) RETURNS void
    LANGUAGE c PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'create_generator_wrapper';
COMMENT ON FUNCTION llm_batch.create_generator IS 'creates a generator: the instruction says what to write about each text; options may hold max_words, max_output_tokens and language';

CREATE FUNCTION llm_batch.alter_generator(
    name text, instruction text DEFAULT NULL, model text DEFAULT NULL,
    examples jsonb DEFAULT NULL, options jsonb DEFAULT NULL
) RETURNS void
    LANGUAGE c PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'alter_generator_wrapper';
COMMENT ON FUNCTION llm_batch.alter_generator IS 'changes the given settings of a generator';

CREATE FUNCTION @extschema@.llm_generate(input text, instruction text, options jsonb DEFAULT '{}') RETURNS text
    LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED COST 100000
    AS 'MODULE_PATHNAME', 'llm_generate_wrapper';
COMMENT ON FUNCTION @extschema@.llm_generate(text, text, jsonb) IS 'returns the text that a model writes about an input by an instruction';

CREATE FUNCTION @extschema@.llm_summarize(input text, options jsonb DEFAULT '{}') RETURNS text
    LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED COST 100000
    AS 'MODULE_PATHNAME', 'llm_summarize_wrapper';
COMMENT ON FUNCTION @extschema@.llm_summarize(text, jsonb) IS 'returns a summary of a text, of at most 40 words unless the options say otherwise';

CREATE FUNCTION @extschema@.llm_translate(input text, language text, options jsonb DEFAULT '{}') RETURNS text
    LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED COST 100000
    AS 'MODULE_PATHNAME', 'llm_translate_wrapper';
COMMENT ON FUNCTION @extschema@.llm_translate(text, text, jsonb) IS 'returns a translation of a text';
