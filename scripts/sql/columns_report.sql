-- The report of the demo's second act. Variables: filter.

\echo 'Row by row: the tweet; what the three columns say of it:'
\pset format unaligned
\pset tuples_only on
SELECT format(E'%4s  %s\n      %s | %s | %s', id, body, coalesce(mood, '-'), coalesce(topic, '-'), coalesce(gist, '-'))
  FROM tweets WHERE :filter ORDER BY id;
\pset tuples_only off
\pset format aligned

\echo
\echo 'The columns: rows with a value; of the moods, how many are what the people said; of the texts, how many have at most twelve words:'
SELECT count(*) AS rows, count(mood) AS mood, count(topic) AS topic, count(gist) AS gist,
       count(*) FILTER (WHERE mood = human) AS "mood right",
       count(*) FILTER (WHERE array_length(regexp_split_to_array(btrim(gist), '\s+'), 1) <= 12) AS "gist short"
  FROM tweets WHERE :filter;

\echo 'What it took, and what llm_batch.estimate() says that three jobs would have taken, at as many rows a request:'
WITH lines AS (
    SELECT 0 AS line, 'one pass, three columns: measured' AS what, rows_done + rows_skipped + rows_failed AS rows, requests,
           input_tokens, output_tokens
      FROM llm_batch.progress WHERE task = 'reading'
    UNION ALL
    SELECT line, what || ': estimated', rows, requests, input_tokens, output_tokens FROM plan
    UNION ALL
    SELECT 9, 'three jobs: estimated', max(rows), sum(requests), sum(input_tokens), sum(output_tokens) FROM plan WHERE line > 1
)
SELECT what AS "job", rows, requests, input_tokens AS "tokens in", output_tokens AS "tokens out",
       round((input_tokens + output_tokens) / nullif(rows, 0)::numeric, 1) AS "tokens a row"
  FROM lines ORDER BY line;
\echo 'An estimate reckons with one answer a row. The measured pass also has the rows that were asked again, since an answer was cut off'
\echo 'or failed the check: a small model is asked again often.'
