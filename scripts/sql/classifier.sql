\o /dev/null
CREATE SERVER local FOREIGN DATA WRAPPER llm_provider
    OPTIONS (api 'openai', base_url :'base_url');

SELECT llm_batch.create_model('qwen', server => 'local', model => :'model',
    max_concurrent_requests => 2, input_price => 0, output_price => 0, parameters => '{"temperature": 0}');

SELECT llm_batch.create_classifier('sentiment', model => 'qwen',
    labels => '{"positive": "good feelings or good news", "negative": "bad feelings or bad news"}',
    instruction => 'These are tweets. Say whether the feeling of the writer, or of what is told, is positive or negative, as most people would judge it. Every tweet is one of the two.',
    options => jsonb_build_object('max_rows_per_request', :rows_a_request, 'structured_output', 'json_schema'));

SELECT llm_batch.create_classifier('sentiment_single', model => 'qwen',
    labels => '{"positive": "good feelings or good news", "negative": "bad feelings or bad news"}',
    instruction => 'These are tweets. Say whether the feeling of the writer, or of what is told, is positive or negative, as most people would judge it. Every tweet is one of the two.',
    options => '{"max_rows_per_request": 1, "structured_output": "json_schema", "reuse": false}');
