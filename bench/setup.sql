-- What each case starts from: an empty table, a server, a model, the classifier of bench/tickets.py. Variables: base_url,
-- tokens (a minute, or empty), instruction, labels, rows_per_request.
CREATE EXTENSION pg_llm_batch;
CREATE SERVER fake FOREIGN DATA WRAPPER llm_provider OPTIONS (api 'openai', base_url :'base_url');
CREATE TABLE ticket (id bigint PRIMARY KEY, body text NOT NULL, want text NOT NULL, topic text);
SELECT llm_batch.create_model('fake', server => 'fake', model => 'fake', tokens_per_minute => nullif(:'tokens', '')::integer);
SELECT llm_batch.create_classifier('topic', model => 'fake', labels => :'labels', instruction => :'instruction',
                                   options => jsonb_build_object('max_rows_per_request', :rows_per_request));
