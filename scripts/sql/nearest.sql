\if :has_pgvector
CREATE INDEX ON tweets USING hnsw (meaning vector_cosine_ops);
SELECT round((1 - (meaning <=> (SELECT llm_embed(:'near', 'meaning')::vector)))::numeric, 2) AS nearness, body
  FROM tweets ORDER BY meaning <=> (SELECT llm_embed(:'near', 'meaning')::vector) LIMIT 5;
\else
-- Vectors of this model have length 1, so the sum of the products is the cosine. With pgvector: ORDER BY meaning <=> …
SELECT round(n.nearness::numeric, 2) AS nearness, t.body
  FROM (SELECT llm_embed(:'near', 'meaning') AS of OFFSET 0) AS sentence, tweets t,
       LATERAL (SELECT sum(p.a::float8 * p.b::float8) AS nearness FROM unnest(t.meaning, sentence.of) AS p (a, b)) AS n
 ORDER BY n.nearness DESC LIMIT 5;
\endif
