-- Extractors: typed values by name

-- Fields in each form that has one. A literal without a type is text, by the rules for overloaded functions. json is stored as
-- its text, so that it goes where text goes.

CREATE FUNCTION llm_batch.create_extractor(
    name text, fields text, model text DEFAULT NULL, instruction text DEFAULT '',
    examples jsonb DEFAULT NULL, options jsonb DEFAULT '{}'
) RETURNS void
    LANGUAGE c PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'create_extractor_wrapper';
COMMENT ON FUNCTION llm_batch.create_extractor(text, text, text, text, jsonb, jsonb) IS 'creates an extractor: fields (JSON) with their types, in the order in which the model sees them; an instruction, a model';

CREATE FUNCTION llm_batch.create_extractor(
    name text, fields json, model text DEFAULT NULL, instruction text DEFAULT '',
    examples jsonb DEFAULT NULL, options jsonb DEFAULT '{}'
) RETURNS void
    LANGUAGE c PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'create_extractor_wrapper';
COMMENT ON FUNCTION llm_batch.create_extractor(text, json, text, text, jsonb, jsonb) IS 'the same with fields of the type json';

CREATE FUNCTION llm_batch.create_extractor(
    name text, fields jsonb, model text DEFAULT NULL, instruction text DEFAULT '',
    examples jsonb DEFAULT NULL, options jsonb DEFAULT '{}'
) RETURNS void
    LANGUAGE sql PARALLEL UNSAFE
    RETURN llm_batch.create_extractor(name, fields::pg_catalog.text, model, instruction, examples, options);
COMMENT ON FUNCTION llm_batch.create_extractor(text, jsonb, text, text, jsonb, jsonb) IS 'the same with fields of the type jsonb, which sorts the keys of an object by length: an array keeps its order';

-- One form without fields, so that it is clear which one is called.

CREATE FUNCTION llm_batch.alter_extractor(
    name text, fields text DEFAULT NULL, model text DEFAULT NULL, instruction text DEFAULT NULL,
    examples jsonb DEFAULT NULL, options jsonb DEFAULT NULL
) RETURNS void
    LANGUAGE c PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'alter_extractor_wrapper';
COMMENT ON FUNCTION llm_batch.alter_extractor(text, text, text, text, jsonb, jsonb) IS 'changes the given settings of an extractor; fields are JSON';

CREATE FUNCTION llm_batch.alter_extractor(
    name text, fields json, model text DEFAULT NULL, instruction text DEFAULT NULL,
    examples jsonb DEFAULT NULL, options jsonb DEFAULT NULL
) RETURNS void
    LANGUAGE c PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'alter_extractor_wrapper';
COMMENT ON FUNCTION llm_batch.alter_extractor(text, json, text, text, jsonb, jsonb) IS 'the same with fields of the type json';

CREATE FUNCTION llm_batch.alter_extractor(
    name text, fields jsonb, model text DEFAULT NULL, instruction text DEFAULT NULL,
    examples jsonb DEFAULT NULL, options jsonb DEFAULT NULL
) RETURNS void
    LANGUAGE sql PARALLEL UNSAFE
    RETURN llm_batch.alter_extractor(name, fields::pg_catalog.text, model, instruction, examples, options);
COMMENT ON FUNCTION llm_batch.alter_extractor(text, jsonb, text, text, jsonb, jsonb) IS 'the same with fields of the type jsonb, which sorts the keys of an object by length: an array keeps its order';

CREATE FUNCTION @extschema@.llm_extract(input text, task text) RETURNS jsonb
    LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED COST 100000
    AS 'MODULE_PATHNAME', 'llm_extract_wrapper';
COMMENT ON FUNCTION @extschema@.llm_extract(text, text) IS 'returns the values that an extractor finds in a text, by the names of its fields';

CREATE FUNCTION @extschema@.llm_extract(input text, fields text[], options jsonb DEFAULT '{}') RETURNS jsonb
    LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED COST 100000
    AS 'MODULE_PATHNAME', 'llm_extract_fields_wrapper';
COMMENT ON FUNCTION @extschema@.llm_extract(text, text[], jsonb) IS 'returns the values that a model finds in a text; a field is a name, or a name and a type such as ''amount numeric''';
