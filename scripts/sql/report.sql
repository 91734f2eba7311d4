-- The demo's last report. Variables: rows, single, rows_a_request.

\echo 'Rows by state:'
SELECT target AS "column", status AS job, rows_total AS rows, rows_done AS done, rows_skipped AS skipped,
       rows_failed AS failed, rows_left AS left
  FROM llm_batch.progress ORDER BY job_id;

\echo 'Accuracy: how often the model says what the people said (a coin would have 50 %):'
SELECT t.what AS "answers", count(*) AS rows, count(*) FILTER (WHERE t.answer = t.human) AS right,
       round(100.0 * count(*) FILTER (WHERE t.answer = t.human) / count(*), 1) || ' %' AS accuracy
  FROM (SELECT 1 AS line, format('all rows, up to %s a request', :rows_a_request) AS what, sentiment AS answer, human
          FROM tweets
        UNION ALL
        SELECT 2, format('the first %s rows, up to %s a request', :single, :rows_a_request), sentiment, human
          FROM tweets WHERE id <= :single
        UNION ALL
        SELECT 3, format('the same %s rows, one a request', :single), sentiment_single, human
          FROM tweets WHERE id <= :single) t
 GROUP BY t.line, t.what ORDER BY t.line;

\echo 'What it took. The last line: this many rows at one a request would have taken, by the rows that were asked so:'
WITH took AS (
    SELECT row_number() OVER (ORDER BY job_id) AS job, (rows_done + rows_skipped + rows_failed)::numeric AS rows,
           requests::numeric, input_tokens::numeric, output_tokens::numeric
      FROM llm_batch.progress
), lines AS (
    SELECT 1 AS line, format('up to %s rows a request', :rows_a_request) AS what, rows, requests, input_tokens, output_tokens
      FROM took WHERE job = 1
    UNION ALL
    SELECT 2, 'one row a request', rows, requests, input_tokens, output_tokens FROM took WHERE job = 2
    UNION ALL
    SELECT 3, 'one row a request, all rows', a.rows, round(b.requests * a.rows / nullif(b.rows, 0)),
           round(b.input_tokens * a.rows / nullif(b.rows, 0)), round(b.output_tokens * a.rows / nullif(b.rows, 0))
      FROM took a, took b WHERE a.job = 1 AND b.job = 2
)
SELECT what AS "job", rows, requests, input_tokens AS "tokens in", output_tokens AS "tokens out",
       round(requests / nullif(rows, 0), 3) AS "requests a row",
       round((input_tokens + output_tokens) / nullif(rows, 0), 1) AS "tokens a row"
  FROM lines ORDER BY line;

\echo 'Ten rows:'
SELECT id, CASE WHEN length(body) > 64 THEN left(body, 63) || '…' ELSE body END AS body, round(rating, 1) AS rating,
       human, sentiment, CASE WHEN sentiment IS DISTINCT FROM human THEN '<- differs' ELSE '' END AS " "
  FROM tweets WHERE id <= 10 ORDER BY id;
