-- Classifiers, and questions that are answered with yes or no

-- Labels in each form that has one. A literal without a type is text, by the rules for overloaded functions. json is stored as
-- its text, so that it goes where text goes.

CREATE FUNCTION llm_batch.create_classifier(
    name text, labels text, model text DEFAULT NULL, instruction text DEFAULT '',
    examples jsonb DEFAULT NULL, options jsonb DEFAULT '{}'
) RETURNS void
    LANGUAGE c PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'create_classifier_wrapper';
COMMENT ON FUNCTION llm_batch.create_classifier(text, text, text, text, jsonb, jsonb) IS 'creates a classifier: labels (JSON) with their descriptions, in the order in which the model sees them; an instruction, a model';

CREATE FUNCTION llm_batch.create_classifier(
    name text, labels json, model text DEFAULT NULL, instruction text DEFAULT '',
    examples jsonb DEFAULT NULL, options jsonb DEFAULT '{}'
) RETURNS void
    LANGUAGE c PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'create_classifier_wrapper';
COMMENT ON FUNCTION llm_batch.create_classifier(text, json, text, text, jsonb, jsonb) IS 'the same with labels of the type json';

CREATE FUNCTION llm_batch.create_classifier(
    name text, labels jsonb, model text DEFAULT NULL, instruction text DEFAULT '',
    examples jsonb DEFAULT NULL, options jsonb DEFAULT '{}'
) RETURNS void
    LANGUAGE sql PARALLEL UNSAFE
    RETURN llm_batch.create_classifier(name, labels::pg_catalog.text, model, instruction, examples, options);
COMMENT ON FUNCTION llm_batch.create_classifier(text, jsonb, text, text, jsonb, jsonb) IS 'the same with labels of the type jsonb, which sorts the keys of an object by length: an array keeps its order';

CREATE FUNCTION llm_batch.create_classifier(
    name text, labels text[], model text DEFAULT NULL, instruction text DEFAULT '',
    examples jsonb DEFAULT NULL, options jsonb DEFAULT '{}'
) RETURNS void
    LANGUAGE sql PARALLEL UNSAFE
    RETURN llm_batch.create_classifier(name, pg_catalog.to_json(labels)::pg_catalog.text, model, instruction, examples, options);
COMMENT ON FUNCTION llm_batch.create_classifier(text, text[], text, text, jsonb, jsonb) IS 'the same with labels without descriptions';

-- One form without labels, so that it is clear which one is called.

CREATE FUNCTION llm_batch.alter_classifier(
    name text, labels text DEFAULT NULL, model text DEFAULT NULL, instruction text DEFAULT NULL,
    examples jsonb DEFAULT NULL, options jsonb DEFAULT NULL
) RETURNS void
    LANGUAGE c PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'alter_classifier_wrapper';
COMMENT ON FUNCTION llm_batch.alter_classifier(text, text, text, text, jsonb, jsonb) IS 'changes the given settings of a classifier; labels are JSON';

CREATE FUNCTION llm_batch.alter_classifier(
    name text, labels json, model text DEFAULT NULL, instruction text DEFAULT NULL,
    examples jsonb DEFAULT NULL, options jsonb DEFAULT NULL
) RETURNS void
    LANGUAGE c PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'alter_classifier_wrapper';
COMMENT ON FUNCTION llm_batch.alter_classifier(text, json, text, text, jsonb, jsonb) IS 'the same with labels of the type json';

CREATE FUNCTION llm_batch.alter_classifier(
    name text, labels jsonb, model text DEFAULT NULL, instruction text DEFAULT NULL,
    examples jsonb DEFAULT NULL, options jsonb DEFAULT NULL
) RETURNS void
    LANGUAGE sql PARALLEL UNSAFE
    RETURN llm_batch.alter_classifier(name, labels::pg_catalog.text, model, instruction, examples, options);
COMMENT ON FUNCTION llm_batch.alter_classifier(text, jsonb, text, text, jsonb, jsonb) IS 'the same with labels of the type jsonb, which sorts the keys of an object by length: an array keeps its order';

CREATE FUNCTION llm_batch.alter_classifier(
    name text, labels text[], model text DEFAULT NULL, instruction text DEFAULT NULL,
    examples jsonb DEFAULT NULL, options jsonb DEFAULT NULL
) RETURNS void
    LANGUAGE sql PARALLEL UNSAFE
    RETURN llm_batch.alter_classifier(name, pg_catalog.to_json(labels)::pg_catalog.text, model, instruction, examples, options);
COMMENT ON FUNCTION llm_batch.alter_classifier(text, text[], text, text, jsonb, jsonb) IS 'the same with labels without descriptions';

CREATE FUNCTION @extschema@.llm_classify(input text, task text) RETURNS text
    LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED COST 100000
    AS 'MODULE_PATHNAME', 'llm_classify_wrapper';
COMMENT ON FUNCTION @extschema@.llm_classify(text, text) IS 'returns the label that a classifier gives a text; NULL, with a warning, if the model gives none';

CREATE FUNCTION @extschema@.llm_classify(input text, labels text[], options jsonb DEFAULT '{}') RETURNS text
    LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED COST 100000
    AS 'MODULE_PATHNAME', 'llm_classify_labels_wrapper';
COMMENT ON FUNCTION @extschema@.llm_classify(text, text[], jsonb) IS 'returns the label that a model gives a text; the model is the option "model" or llm_batch.default_model';

CREATE FUNCTION @extschema@.llm_filter(input text, question text, options jsonb DEFAULT '{}') RETURNS boolean
    LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED COST 100000
    AS 'MODULE_PATHNAME', 'llm_filter_wrapper';
COMMENT ON FUNCTION @extschema@.llm_filter(text, text, jsonb) IS 'returns whether a model answers a question about a text with yes; the model is the option "model" or llm_batch.default_model; NULL, with a warning, if it gives no answer';
