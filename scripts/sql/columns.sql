-- Three columns more, and a task that gives all three. Variables: rows_a_request, filter.
ALTER TABLE tweets
    ADD COLUMN mood text,             -- as `sentiment`
    ADD COLUMN topic text,            -- what it is about
    ADD COLUMN gist text;             -- what it says, in twelve words at most

\o /dev/null
SELECT llm_batch.create_extractor('reading', model => 'qwen',
    fields => '{
        "mood":  {"labels": {"positive": "good feelings or good news", "negative": "bad feelings or bad news"},
                  "description": "the feeling of the writer, or of what is told, as most people would judge it; always one of the two"},
        "topic": {"labels": {"people": "friends, family, greetings, thanks", "fun": "music, films, television, games, sport",
                             "news": "politics, business, technology", "daily life": "food, weather, work, school, health, travel"}},
        "gist":  {"type": "text", "max_words": 12, "description": "what happens, told in the third person"}}',
    instruction => 'These are tweets. Fill in the fields for each.',
    examples => '[
        {"input": "@anonymous so my train was cancelled AGAIN and i missed the whole first act :(",
         "answer": {"mood": "negative", "topic": "daily life", "gist": "A cancelled train made the writer miss a show."}},
        {"input": "Big thanks to @anonymous for the cake, you are the best!!",
         "answer": {"mood": "positive", "topic": "people", "gist": "The writer thanks a friend for a cake."}}]',
    -- A longer text is asked for again, with the hint on its line; a row whose text stays too long is listed as failed.
    options => jsonb_build_object('max_rows_per_request', :rows_a_request,
        'check', '{"gist": "array_length(string_to_array(btrim(gist), '' ''), 1) <= 12"}'::jsonb,
        'check_hint', '{"gist": "twelve words at most"}'::jsonb));

-- To compare: a task for each of the columns. Nothing is asked with them; estimate() says what their jobs would take.
SELECT llm_batch.create_classifier('mood', model => 'qwen',
    labels => '{"positive": "good feelings or good news", "negative": "bad feelings or bad news"}',
    instruction => 'These are tweets. Pick the feeling of the writer, or of what is told, as most people would judge it. Every tweet is one of the two.',
    options => jsonb_build_object('max_rows_per_request', :rows_a_request));
SELECT llm_batch.create_classifier('topic', model => 'qwen',
    labels => '{"people": "friends, family, greetings, thanks", "fun": "music, films, television, games, sport",
                "news": "politics, business, technology", "daily life": "food, weather, work, school, health, travel"}',
    instruction => 'These are tweets. Pick what each is about.',
    options => jsonb_build_object('max_rows_per_request', :rows_a_request));
SELECT llm_batch.create_generator('gist', model => 'qwen',
    instruction => 'These are tweets. Say what happens, told in the third person.',
    examples => '[
        {"input": "@anonymous so my train was cancelled AGAIN and i missed the whole first act :(",
         "answer": "A cancelled train made the writer miss a show."},
        {"input": "Big thanks to @anonymous for the cake, you are the best!!", "answer": "The writer thanks a friend for a cake."}]',
    options => jsonb_build_object('max_rows_per_request', :rows_a_request, 'max_words', 12));

CREATE TABLE plan AS
SELECT 1 AS line, 'one pass, three columns' AS what, e.*
  FROM llm_batch.estimate('tweets', input => 'body', targets => '{"mood": "mood", "topic": "topic", "gist": "gist"}',
                          task => 'reading', filter => :'filter') e
UNION ALL
SELECT j.line, 'a job for ' || j.task, e.*
  FROM (VALUES (2, 'mood'), (3, 'topic'), (4, 'gist')) j (line, task),
       llm_batch.estimate('tweets', input => 'body', target => j.task, task => j.task, filter => :'filter') e;
\o
