-- List prices, from which create_model() takes a model's prices where none are given.

CREATE TABLE llm_batch.list_price (
    provider           text NOT NULL,
    model              text NOT NULL,
    input_price        numeric NOT NULL,
    cached_input_price numeric,
    output_price       numeric NOT NULL,
    batch_input_price  numeric,
    batch_output_price numeric,
    context_tokens     integer,
    output_tokens      integer,
    as_of              date NOT NULL DEFAULT CURRENT_DATE,
    is_own             boolean NOT NULL DEFAULT true,
    PRIMARY KEY (provider, model, is_own)
);
COMMENT ON TABLE llm_batch.list_price IS 'list prices of models in dollars per million tokens; to correct one, insert a row: it takes precedence over the row that came with the extension';
COMMENT ON COLUMN llm_batch.list_price.provider IS 'host of the server''s base_url';
COMMENT ON COLUMN llm_batch.list_price.model IS 'the provider''s name of the model; a name with a date behind it is found too';
COMMENT ON COLUMN llm_batch.list_price.input_price IS 'dollars per million prompt tokens';
COMMENT ON COLUMN llm_batch.list_price.cached_input_price IS 'dollars per million prompt tokens that the provider had cached; NULL means input_price';
COMMENT ON COLUMN llm_batch.list_price.output_price IS 'dollars per million answer tokens';
COMMENT ON COLUMN llm_batch.list_price.batch_input_price IS 'dollars per million prompt tokens through the provider''s batch interface; NULL means that none is known';
COMMENT ON COLUMN llm_batch.list_price.batch_output_price IS 'dollars per million answer tokens through the provider''s batch interface; NULL means that none is known';
COMMENT ON COLUMN llm_batch.list_price.context_tokens IS 'maximum number of tokens of a prompt';
COMMENT ON COLUMN llm_batch.list_price.output_tokens IS 'maximum number of tokens of an answer';
COMMENT ON COLUMN llm_batch.list_price.as_of IS 'date of the price';
COMMENT ON COLUMN llm_batch.list_price.is_own IS 'false for the rows that came with the extension, which dumps leave out';

-- Source: the price map of the package litellm 1.109.1, which has dates up to 2026-10-28.
INSERT INTO llm_batch.list_price
SELECT v.*, DATE '2026-10-28', false
  FROM (VALUES
    ('api.openai.com', 'gpt-6-luna', 0.1, 0.01, 0.5, 0.05, 0.25, 922000, 128000),
    ('api.openai.com', 'gpt-6-sol', 2, 0.2, 10, 1, 5, 922000, 128000),
    ('api.openai.com', 'gpt-6.1-sol', 2, 0.1, 10, 1, 5, 922000, 128000),
    ('api.openai.com', 'gpt-6.1-terra', 1, 0.05, 5, 0.5, 2.5, 922000, 128000),
    ('api.openai.com', 'gpt-6-astra', 10, 1, 50, 5, 25, 922000, 128000),
    ('api.openai.com', 'gpt-5.6-luna', 0.2, 0.02, 1.2, 0.1, 0.6, 922000, 128000),
    ('api.openai.com', 'gpt-5.4-nano', 0.2, 0.02, 1.25, 0.1, 0.625, 272000, 128000),
    ('api.openai.com', 'gpt-5.4-mini', 0.75, 0.075, 4.5, 0.375, 2.25, 272000, 128000),
    ('api.openai.com', 'gpt-5-nano', 0.05, 0.005, 0.4, 0.025, 0.2, 272000, 128000),
    ('api.openai.com', 'gpt-5-mini', 0.25, 0.025, 2, 0.125, 1, 272000, 128000),
    ('api.openai.com', 'gpt-4.1-mini', 0.4, 0.1, 1.6, 0.2, 0.8, 1047576, 32768),
    ('api.openai.com', 'gpt-4.1', 2, 0.5, 8, 1, 4, 1047576, 32768),
    ('api.openai.com', 'gpt-4o-mini', 0.15, 0.075, 0.6, 0.075, 0.3, 128000, 16384),
    ('api.openai.com', 'text-embedding-3-small', 0.02, NULL, 0, 0.01, 0, 8191, NULL),
    ('api.openai.com', 'text-embedding-3-large', 0.13, NULL, 0, 0.065, 0, 8191, NULL),
    ('api.openai.com', 'text-embedding-ada-002', 0.1, NULL, 0, NULL, NULL, 8191, NULL),
    ('api.anthropic.com', 'claude-haiku-4-5', 1, 0.1, 5, 0.5, 2.5, 200000, 64000),
    ('api.anthropic.com', 'claude-haiku-5-5', 0.1, 0.01, 0.5, 0.05, 0.25, 1000000, 128000),
    ('api.anthropic.com', 'claude-sonnet-5', 2, 0.2, 10, 1, 5, 1000000, 128000),
    ('api.anthropic.com', 'claude-sonnet-5-5', 2, 0.1, 10, 1, 5, 1000000, 128000),
    ('api.anthropic.com', 'claude-opus-5-5', 4, 0.2, 20, 2, 10, 1000000, 128000),
    ('api.anthropic.com', 'claude-fable-5-1', 10, 0.25, 50, 5, 25, 1000000, 128000),
    ('generativelanguage.googleapis.com', 'gemini-2.5-flash-lite', 0.1, 0.01, 0.4, 0.05, 0.2, 1048576, 65536),
    ('generativelanguage.googleapis.com', 'gemini-2.5-flash', 0.3, 0.03, 2.5, 0.15, 1.25, 1048576, 65536),
    ('generativelanguage.googleapis.com', 'gemini-2.5-pro', 1.25, 0.125, 10, 0.625, 5, 1048576, 65536),
    ('generativelanguage.googleapis.com', 'gemini-3.1-flash-lite', 0.25, 0.025, 1.5, 0.125, 0.75, 1048576, 65536),
    ('generativelanguage.googleapis.com', 'gemini-3.5-flash-lite', 0.3, 0.03, 2.5, 0.15, 1.25, 1048576, 65536),
    ('generativelanguage.googleapis.com', 'gemini-3.8-flash', 0.75, 0.075, 3.75, 0.375, 1.875, 1048576, 65536),
    ('generativelanguage.googleapis.com', 'gemini-4-argon', 2, 0.1, 10, 1, 5, 1048576, 1048576),
    ('generativelanguage.googleapis.com', 'gemini-embedding-001', 0.15, NULL, 0, 0.075, 0, 2048, NULL),
    ('generativelanguage.googleapis.com', 'gemini-embedding-2', 0.2, NULL, 0, 0.1, 0, 8192, NULL),
    ('api.mistral.ai', 'ministral-8b-2512', 0.15, 0.015, 0.15, NULL, NULL, 262144, 262144),
    ('api.mistral.ai', 'mistral-small-2603', 0.15, 0.015, 0.6, NULL, NULL, 262144, 262144),
    ('api.mistral.ai', 'mistral-medium-2604', 1.5, 0.15, 7.5, NULL, NULL, 262144, 262144),
    ('api.mistral.ai', 'mistral-large-2512', 0.5, 0.05, 1.5, NULL, NULL, 262144, 262144),
    ('api.mistral.ai', 'mistral-large-4', 1.36, 0.14, 4.18, NULL, NULL, 1048576, 1048576),
    ('api.mistral.ai', 'mistral-embed', 0.1, NULL, 0, NULL, NULL, 8192, NULL),
    ('api.mistral.ai', 'codestral-embed', 0.15, NULL, 0, NULL, NULL, 8192, NULL),
    ('api.deepseek.com', 'deepseek-v4-flash', 0.3, 0.006, 1.2, NULL, NULL, 1000000, 393216),
    ('api.groq.com', 'openai/gpt-oss-20b', 0.075, 0.0375, 0.3, NULL, NULL, 131072, 65536),
    ('api.groq.com', 'openai/gpt-oss-120b', 0.15, 0.075, 0.6, NULL, NULL, 131072, 65536),
    ('api.cohere.com', 'embed-v4.0', 0.12, NULL, 0, NULL, NULL, 128000, NULL),
    ('api.cohere.com', 'embed-v5.0-fast', 0.08, NULL, 0, NULL, NULL, 128000, NULL),
    ('api.cohere.com', 'embed-v5.0-pro', 0.12, NULL, 0, NULL, NULL, 128000, NULL),
    ('api.voyageai.com', 'voyage-3.5-lite', 0.02, NULL, 0, NULL, NULL, 32000, NULL),
    ('api.voyageai.com', 'voyage-4-lite', 0.02, NULL, 0, NULL, NULL, 32000, NULL),
    ('api.voyageai.com', 'voyage-4', 0.06, NULL, 0, NULL, NULL, 32000, NULL),
    ('api.voyageai.com', 'voyage-4-large', 0.12, NULL, 0, NULL, NULL, 32000, NULL)
  ) v (provider, model, input_price, cached_input_price, output_price, batch_input_price, batch_output_price,
       context_tokens, output_tokens);

SELECT pg_catalog.pg_extension_config_dump('llm_batch.list_price', 'WHERE is_own');
