-- The surface of the extension, and rules that hold for all of it.
\pset format unaligned
\pset tuples_only on
CREATE EXTENSION pg_llm_batch;

\echo -- functions
SELECT p.oid::regprocedure, '->', pg_get_function_result(p.oid)
  FROM pg_proc p JOIN pg_depend d ON d.objid = p.oid AND d.deptype = 'e' AND d.classid = 'pg_proc'::regclass
  JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'pg_llm_batch'
 ORDER BY p.oid::regprocedure::text COLLATE "C";

\echo -- columns of the views
SELECT c.relname, string_agg(a.attname || ' ' || format_type(a.atttypid, a.atttypmod), ', ' ORDER BY a.attnum)
  FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
 WHERE c.relnamespace = 'llm_batch'::regnamespace AND c.relkind = 'v' GROUP BY 1 ORDER BY 1;

\echo -- functions without a comment: none
SELECT p.oid::regprocedure FROM pg_proc p JOIN pg_depend d ON d.objid = p.oid AND d.deptype = 'e' AND d.classid = 'pg_proc'::regclass
  JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'pg_llm_batch' WHERE obj_description(p.oid, 'pg_proc') IS NULL;

\echo -- relations without a comment: none
SELECT c.oid::regclass FROM pg_class c WHERE c.relnamespace = 'llm_batch'::regnamespace AND c.relkind IN ('r', 'v') AND obj_description(c.oid, 'pg_class') IS NULL;

\echo -- functions that pin no search_path: those that run SQL of the caller, end transactions or are called row by row
SELECT p.proname FROM pg_proc p JOIN pg_depend d ON d.objid = p.oid AND d.deptype = 'e' AND d.classid = 'pg_proc'::regclass
  JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'pg_llm_batch'
 WHERE NOT coalesce(array_to_string(p.proconfig, ' ') ~ '^search_path=pg_catalog, pg_temp$', false) ORDER BY 1;

\echo -- functions that run with other rights than the caller has: none
SELECT p.oid::regprocedure FROM pg_proc p WHERE p.pronamespace = 'llm_batch'::regnamespace AND p.prosecdef;

\echo -- what PUBLIC may do with our relations: read nine of them
SELECT c.oid::regclass, a.privilege_type FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) a
 WHERE c.relnamespace = 'llm_batch'::regnamespace AND a.grantee = 0 ORDER BY c.relname;

\echo -- what a dump keeps
SELECT r::regclass FROM pg_extension, unnest(extconfig) r WHERE extname = 'pg_llm_batch' ORDER BY r::regclass::text COLLATE "C";

\echo -- settings
SELECT name, setting, unit, context FROM pg_settings WHERE name LIKE 'llm_batch.%' ORDER BY 1;

\echo -- a dropped extension leaves nothing
DROP EXTENSION pg_llm_batch;
SELECT nspname FROM pg_namespace WHERE nspname = 'llm_batch';
SELECT fdwname FROM pg_foreign_data_wrapper;
