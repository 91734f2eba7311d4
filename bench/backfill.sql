-- The job of bench/run: made-up tickets, eight labels. Prints the job's id.
\pset tuples_only on
\pset format unaligned
CREATE EXTENSION pg_llm_batch;
CREATE SERVER fake FOREIGN DATA WRAPPER llm_provider OPTIONS (api 'openai', base_url :'base_url');
CREATE TABLE ticket (id bigint PRIMARY KEY, body text NOT NULL, topic text);
INSERT INTO ticket
SELECT n, format('Ticket %s: since %s days the %s of my order does not %s, please help.', n, n % 9,
              (ARRAY['invoice', 'parcel', 'account', 'app'])[n % 4 + 1], (ARRAY['arrive', 'open', 'work'])[n % 3 + 1])
  FROM generate_series(1, :rows) n;
ANALYZE ticket;
SELECT llm_batch.create_model('fake', server => 'fake', model => 'fake', max_concurrent_requests => 8);
SELECT llm_batch.create_classifier('topic', model => 'fake',
    labels => '["billing", "shipping", "account", "bug", "question", "complaint", "praise", "other"]',
    instruction => 'Tickets of a web shop''s customers. Pick by what the customer wants done.',
    options => jsonb_build_object('max_rows_per_request', :rows_a_request));
SELECT llm_batch.backfill('ticket', input => 'body', target => 'topic', task => 'topic');
