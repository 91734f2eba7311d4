//! Mistakes of a new user.

use super::{nothing_happened, refused};
use crate::common::{Bed, run};

/// Mistakes of a new user, in the order of the first steps: each is refused at once, with a hint of what to write instead.
#[test]
fn first_steps_in_a_wrong_way() {
    let bed = Bed::new("errors_first_steps");
    let c = &mut bed.connect();
    run(
        c,
        "CREATE TABLE t (id int PRIMARY KEY, body text, topic text, n int, due date, data jsonb, v real[]);
         CREATE SERVER claude FOREIGN DATA WRAPPER llm_provider OPTIONS (api 'anthropic');
         SELECT llm_batch.create_model('claude', 'claude', 'x'), llm_batch.create_route('bulk', ARRAY['m']),
                llm_batch.create_extractor('bill', '{\"amount\": \"numeric\", \"due\": \"date\"}', 'm'),
                llm_batch.create_embedder('vector', 'm', 3)",
    );
    for (sql, code, says) in SERVERS.iter().chain(MODELS_AND_ROUTES).chain(TASKS).chain(JOBS) {
        refused(c, sql, code, says);
    }
    // A model is no route.
    for (name, is, kind) in [("bulk", "route", "model"), ("m", "model", "route")] {
        for verb in ["alter", "drop"] {
            let says = [format!("\"{name}\" is a {is}"), format!("llm_batch.alter_{is}()")];
            let sql = format!("SELECT llm_batch.{verb}_{kind}('{name}')");
            refused(c, &sql, "42809", &says.each_ref().map(String::as_str));
        }
    }
    nothing_happened(&bed);
}

/// A statement, its SQLSTATE, and what the error says.
type Wrong = (&'static str, &'static str, &'static [&'static str]);

const SERVERS: &[Wrong] = &[
    (
        "CREATE SERVER x FOREIGN DATA WRAPPER llm_provider OPTIONS (base_url 'https://api.openai.com/v1/chat/completions')",
        "HV024",
        &["it ends in /chat/completions", "Leave out"],
    ),
    (
        "CREATE SERVER x FOREIGN DATA WRAPPER llm_provider OPTIONS (api 'anthropic', base_url 'https://a.example/v1/messages/')",
        "HV024",
        &["it ends in /messages", "Leave out /messages:"],
    ),
    (
        "CREATE SERVER x FOREIGN DATA WRAPPER llm_provider OPTIONS (api 'ollama', base_url 'http://localhost:11434/api/chat')",
        "HV024",
        &["it ends in /chat", "Leave out"],
    ),
    (
        "CREATE SERVER x FOREIGN DATA WRAPPER llm_provider OPTIONS (api 'cohere', base_url 'https://a.example/v2/embed')",
        "HV024",
        &["it ends in /embed", "Leave out"],
    ),
    (
        "CREATE SERVER x FOREIGN DATA WRAPPER llm_provider OPTIONS (api 'gemini', base_url 'https://a.example/v1beta/models/x:generateContent')",
        "HV024",
        &["it ends in /models/x:generateContent", "Leave out"],
    ),
    (
        "CREATE SERVER x FOREIGN DATA WRAPPER llm_provider OPTIONS (api 'openai', allow_http 'maybe')",
        "HV024",
        &["\"maybe\"", "true, false"],
    ),
    (
        "CREATE SERVER x FOREIGN DATA WRAPPER llm_provider OPTIONS (api 'openai', counts 'all')",
        "HV024",
        &["\"all\"", "reserved"],
    ),
    (
        "CREATE SERVER x FOREIGN DATA WRAPPER llm_provider OPTIONS (api 'openai', api_key_file 'key')",
        "HV024",
        &["api_key_file", "absolute", "/etc/llm/key"],
    ),
    ("CREATE USER MAPPING FOR postgres SERVER fake OPTIONS (apikey 'x')", "HV00D", &["\"apikey\"", "are: api_key."]),
    (
        "CREATE USER MAPPING FOR postgres SERVER fake OPTIONS (api_key 'Bearer sk-abc')",
        "HV024",
        &["not a valid key", "without spaces"],
    ),
];

const MODELS_AND_ROUTES: &[Wrong] = &[
    ("SELECT llm_batch.create_model('', 'fake', 'x')", "22023", &["1 to 200", "such as"]),
    ("SELECT llm_batch.create_model('x', 'fake', '')", "22023", &["\"model\" must not be empty", "provider's name"]),
    ("SELECT llm_batch.create_model('x', 'm', 'x')", "42704", &["server \"m\"", "CREATE SERVER"]),
    (
        "SELECT llm_batch.create_model('x', 'fake', 'x', tokens_per_minute => 0)",
        "22023",
        &["\"tokens_per_minute\" must be greater than zero", "Leave it out"],
    ),
    (
        "SELECT llm_batch.create_model('x', 'fake', 'x', max_concurrent_requests => -1)",
        "22023",
        &["\"max_concurrent_requests\"", "Leave it out"],
    ),
    (
        "SELECT llm_batch.create_model('x', 'fake', 'x', input_price => -1)",
        "22023",
        &["\"input_price\"", "dollars per million"],
    ),
    (
        "SELECT llm_batch.create_model('x', 'fake', 'x', request_timeout => '2 days')",
        "22023",
        &["\"request_timeout\"", "1 day", "such as"],
    ),
    (
        "SELECT llm_batch.create_model('x', 'fake', 'x', parameters => '[]')",
        "22023",
        &["\"parameters\"", "temperature"],
    ),
    (
        "SELECT llm_batch.create_model('x', 'fake', 'x', parameters => '{\"model\": \"y\"}')",
        "22023",
        &["parameter \"model\" cannot be set", "for each request"],
    ),
    ("SELECT llm_batch.create_route('x', ARRAY['m', 'm'])", "22023", &["named twice", "once"]),
    ("SELECT llm_batch.create_route('x', ARRAY['bulk'])", "22023", &["\"bulk\" is a route", "of models"]),
    ("SELECT llm_batch.create_route('x', ARRAY['gone'])", "42704", &["model \"gone\"", "create_model"]),
    (
        "SELECT llm_batch.create_route('x', ARRAY['m'], 'fastest')",
        "22023",
        &["\"fastest\"", "failover", "spread", "cheapest"],
    ),
    ("SELECT llm_batch.create_route('x', '{}')", "22023", &["1 to 16 models", "ARRAY["]),
];

const TASKS: &[Wrong] = &[
    ("SELECT llm_batch.create_classifier('x', ARRAY['a'], model => 'm')", "22023", &["2 to 250 labels", "Write"]),
    ("SELECT llm_batch.create_classifier('x', '{a,b}', model => 'm')", "22P02", &["must be JSON", "ARRAY["]),
    (
        "SELECT llm_batch.create_classifier('x', '[\"a\", \"b\"]', model => 'm', examples => '[{\"input\": \"x\", \"label\": \"z\"}]')",
        "22023",
        &["\"z\"", "one of the labels"],
    ),
    ("SELECT llm_batch.create_extractor('x', '{}', 'm')", "22023", &["1 to 26 fields", "Write"]),
    ("SELECT llm_batch.create_extractor('x', '{\"a\": \"money\"}', 'm')", "22023", &["\"money\"", "numeric"]),
    (
        "SELECT llm_batch.create_extractor('x', '{\"a\": \"numeric(5, 2)\"}', 'm')",
        "22023",
        &["\"numeric(5, 2)\"", "those of the column"],
    ),
    (
        "SELECT llm_batch.create_extractor('x', '{\"a\": {\"type\": \"date\", \"labels\": [\"x\", \"y\"]}}', 'm')",
        "22023",
        &["of type date and has labels", "labels[]"],
    ),
    (
        "SELECT llm_batch.create_extractor('x', '{\"a\": {\"type\": \"labels\"}}', 'm')",
        "22023",
        &["\"a\" has no labels", "Write"],
    ),
    (
        "SELECT llm_batch.create_extractor('x', '{\"a\": {\"type\": \"date\", \"missing\": {\"value\": \"today\"}}}', 'm')",
        "22023",
        &["\"today\"", "YYYY-MM-DD", "NULL"],
    ),
    ("SELECT llm_batch.create_extractor('x', '{\"a\": \"date\", \"A\": \"date\"}', 'm')", "22023", &["twice", "case"]),
    (
        "SELECT llm_batch.create_extractor('x', '{\"a\": {\"type\": \"timestamptz\", \"time_zone\": \"x y\"}}', 'm')",
        "22023",
        &["\"x y\"", "pg_timezone_names"],
    ),
    (
        "SELECT llm_batch.create_extractor('x', '{\"a\": \"date\"}', 'm', examples => '[{\"input\": \"x\", \"answer\": {\"b\": 1}}]')",
        "22023",
        &["field \"b\" that does not exist", "the fields are \"a\""],
    ),
    (
        "SELECT llm_batch.create_extractor('x', '{\"a\": \"date\"}', 'm', examples => '[{\"input\": \"x\", \"answer\": \"1\"}]')",
        "22023",
        &["not an object", "the fields are \"a\""],
    ),
    ("SELECT llm_batch.create_scorer('x', 'y', 5, 1, 'm')", "22023", &["not below", "low => 1"]),
    ("SELECT llm_batch.create_embedder('x', 'm', 0)", "22023", &["\"dimensions\"", "1 to 8192"]),
    ("SELECT llm_batch.create_embedder('x', 'gone', 3)", "42704", &["model \"gone\"", "create_model"]),
    ("SELECT llm_batch.create_embedder('x', 'claude', 3)", "0A000", &["\"anthropic\"", "serves no embeddings"]),
    ("SELECT llm_batch.alter_embedder('topic', dimensions => 3)", "42809", &["not an embedder", "alter_classifier"]),
    ("SELECT llm_embed('x', 'topic')", "42809", &["not an embedder", "llm_run()"]),
    ("SELECT llm_classify('x', 'vector')", "42809", &["not a classifier", "llm_run()"]),
    ("SELECT llm_classify('topic', 'A text to ask about.')", "42704", &["\"A text to ask", "comes first"]),
    ("SELECT llm_run('topic', repeat('text ', 1000))", "42704", &["text …\" does not exist", "comes first"]),
    (
        "SELECT llm_batch.create_scorer('x', 'y', model => 'm', options => '{\"check\": \"anwser > 5\"}')",
        "42703",
        &["check: column \"anwser\" does not exist", "the column \"answer\""],
    ),
    (
        "SELECT llm_extract('x', ARRAY['amount: numeric'])",
        "22023",
        &["\"amount: numeric\"", "such as 'amount numeric'"],
    ),
    ("SELECT llm_classify('x', ARRAY['a', NULL])", "22023", &["label must not be empty", "Name it"]),
    (
        "SELECT llm_batch.create_extractor('x', '{\"a\": {\"type\": \"date\", \"max_words\": 3}}', 'm')",
        "22023",
        &["\"a\" is of type date and has \"max_words\"", "for texts"],
    ),
    (
        "SELECT llm_batch.create_generator('x', 'y', 'm', options => '{\"max_word\": 4}')",
        "22023",
        &["\"max_word\"", "options are: max_words, max_output_tokens, language, max_rows_per_request"],
    ),
    (
        "SELECT llm_batch.create_generator('x', 'y', 'm', options => '{\"check\": true}')",
        "22023",
        &["\"check\": true", "such as \"length(answer)"],
    ),
    (
        "SELECT llm_batch.create_scorer('x', 'y', model => 'm', options => '{\"chekc\": \"true\"}')",
        "22023",
        &["\"chekc\"", "check_hint"],
    ),
];

const JOBS: &[Wrong] = &[
    (
        "SELECT llm_batch.backfill('t', 'body', targets => '{\"n\": \"amount\", \"topic\": \"amount\"}', task => 'bill')",
        "22023",
        &["\"n\" and \"topic\" cannot both take field \"amount\"", "of its own"],
    ),
    (
        "SELECT llm_batch.backfill('t', 'body', targets => '{\"n\": \"sum\"}', task => 'bill')",
        "42704",
        &["field \"sum\"", "amount, due"],
    ),
    (
        "SELECT llm_batch.backfill('t', 'body', targets => '{\"due\": \"amount\"}', task => 'bill')",
        "42804",
        &["\"amount\" is of type numeric", "\"due\" is of type date", "Fill a column"],
    ),
    (
        "SELECT llm_batch.backfill('t', 'body', '{\"due\": \"due\"}', 'bill')",
        "42703",
        &["A text names one column", "targets =>"],
    ),
    ("SELECT llm_batch.backfill('t', 'body', 'n', 'bill')", "42804", &["2 fields", "targets =>"]),
    ("SELECT llm_batch.backfill('t', 'body', 'n', 'vector')", "42804", &["real[]", "integer", "Fill a column"]),
    ("SELECT llm_batch.backfill('t', 'body', 'gone', 'vector')", "42703", &["\"gone\"", "ADD COLUMN"]),
    ("SELECT llm_batch.backfill('t', 'bdoy', 'topic', 'topic')", "42703", &["\"bdoy\"", "Perhaps you meant"]),
    (
        "SELECT llm_batch.backfill('t', 'text_of_it', 'topic', 'topic')",
        "42703",
        &["text_of_it", "argument \"input\" is an SQL"],
    ),
    ("SELECT llm_batch.backfill('t', 'body', 'n', 'topic')", "22P02", &["does not fit column \"n\"", "Every label"]),
    // What is meant is there under another name, or in another place.
    (
        "SELECT llm_batch.backfill('t', 'body', 'Topic', 'topic')",
        "42703",
        &["\"Topic\"", "Perhaps you meant column \"topic\""],
    ),
    ("SELECT llm_batch.backfill('t', 'body', '\"topic\"', 'topic')", "42703", &["column \"topic\"", "without quotes"]),
    (
        "SELECT llm_batch.backfill('t', 'body', targets => '{\"Due\": \"due\"}', task => 'bill')",
        "42703",
        &["\"Due\"", "Perhaps you meant column \"due\""],
    ),
    (
        "SELECT llm_batch.backfill('t', 'body', targets => '{\"due\": \"due\", \"amount\": \"n\"}', task => 'bill')",
        "42703",
        &["\"amount\"", "column comes first", "{\"n\":\"amount\"}"],
    ),
    (
        "SELECT llm_batch.backfill('t', 'body', 'bill', 'topic')",
        "42703",
        &["\"bill\"", "is a task", "behind the column"],
    ),
];
