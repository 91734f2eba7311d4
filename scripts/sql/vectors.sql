\o /dev/null
CREATE SERVER vectors FOREIGN DATA WRAPPER llm_provider OPTIONS (api 'openai', base_url :'base_url');
SELECT llm_batch.create_model('minilm', server => 'vectors', model => 'all-minilm-l6-v2', max_request_tokens => 300,
         max_concurrent_requests => 2, input_price => 0, output_price => 0);
SELECT llm_batch.create_embedder('meaning', 'minilm', 384, options => '{"max_rows_per_request": 50}');
\if :has_pgvector
CREATE EXTENSION vector;
ALTER TABLE tweets ADD meaning vector(384);
\else
ALTER TABLE tweets ADD meaning real[]; -- with pgvector: vector(384)
\endif
