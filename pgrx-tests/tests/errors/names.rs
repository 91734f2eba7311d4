//! Names, options and arguments that are refused.

use super::{call, nothing_happened, refused};
use crate::common::{Bed, error, run, tickets};

#[test]
fn names_and_options() {
    let bed = Bed::new("errors_names");
    let client = &mut bed.connect();
    tickets(client, "tickets", 1..=100);
    refused(client, &call("task => 'nothing'"), "42704", &["task \"nothing\"", "create_classifier"]);
    refused(client, "SELECT llm_classify('x', 'nothing')", "42704", &["task \"nothing\""]);
    refused(client, "SELECT llm_classify_batch('SELECT 1, 2', 'nothing')", "42704", &["task \"nothing\""]);
    refused(client, "SELECT llm_classify('x', ARRAY['a', 'b'])", "22023", &["no model", "llm_batch.default_model"]);
    refused(
        client,
        "SELECT llm_classify_batch('SELECT 1, 2', ARRAY['a', 'b'])",
        "22023",
        &["no model", "llm_batch.default_model"],
    );
    refused(
        client,
        "SET llm_batch.default_model = 'nothing'; SELECT llm_classify('x', ARRAY['a', 'b'])",
        "42704",
        &["model \"nothing\"", "create_model"],
    );
    run(client, "RESET llm_batch.default_model");

    // The name of a task where an instruction stands.
    for verb in ["llm_generate", "llm_score", "llm_filter"] {
        let sql = format!("SELECT {verb}('x', 'topic', '{{\"model\": \"m\"}}')");
        refused(client, &sql, "22023", &["\"topic\" is the name of a task", "llm_run(input, task)"]);
    }

    run(client, "CREATE FOREIGN DATA WRAPPER nothing; CREATE SERVER nothing FOREIGN DATA WRAPPER nothing");
    let create = |change: &str| format!("SELECT llm_batch.create_model('x', {change})");
    refused(client, &create("server => 'gone', model => 'x'"), "42704", &["server \"gone\"", "CREATE SERVER"]);
    refused(client, &create("server => 'nothing', model => 'x'"), "22023", &["nothing", "llm_provider"]);
    refused(client, &create("server => 'fake', model => ' '"), "22023", &["model"]);
    refused(client, &create("server => NULL, model => 'x'"), "22004", &[]);
    let deep = format!("'{{\"x\": {}{}}}'", "[".repeat(500), "]".repeat(500));
    for (name, value) in [
        ("tokens_per_minute", "0"),
        ("requests_per_minute", "-1"),
        ("input_tokens_per_minute", "0"),
        ("inputs_per_minute", "0"),
        ("output_tokens_per_minute", "0"),
        ("max_concurrent_requests", "0"),
        ("max_request_tokens", "0"),
        ("input_price", "-0.1"),
        ("output_price", "'NaN'"),
        ("request_timeout", "'0'"),
        ("request_timeout", "'-1 s'"),
        ("request_timeout", "'2 days'"),
        ("parameters", "'[]'"),
        ("parameters", "'{\"messages\": []}'"),
        ("parameters", "'{\"model\": \"x\"}'"),
        ("parameters", "'{\"stream\": true}'"),
        ("parameters", "'{\"temperature\": 1e400}'"),
        ("parameters", &deep),
    ] {
        let sql = create(&format!("server => 'fake', model => 'x', {name} => {value}"));
        let (code, message, ..) = error(client, &sql);
        assert_eq!(code, "22023", "{sql}: {message}");
        let sql = format!("SELECT llm_batch.alter_model('m', {name} => {value})");
        let (code, message, ..) = error(client, &sql);
        assert_eq!(code, "22023", "{sql}: {message}");
    }
    refused(client, "SELECT llm_batch.create_model('m', 'fake', 'x')", "42710", &["\"m\"", "alter_model"]);
    refused(client, "SELECT llm_batch.alter_model('gone')", "42704", &["\"gone\"", "create_model"]);
    refused(client, "SELECT llm_batch.alter_model('m', reset => ARRAY['name'])", "22023", &["input_price"]);
    refused(client, "SELECT llm_batch.alter_model('m', server => 'gone')", "42704", &["gone"]);
    refused(client, "SELECT llm_batch.drop_model('gone')", "42704", &["gone", "create_model"]);
    refused(client, "SELECT llm_batch.drop_model('m')", "2BP01", &["\"m\"", "task \"topic\"", "drop_task"]);

    // A stream stays in the gateway's memory, whoever wrote its parts and wherever.
    for sql in [
        "SELECT llm_classify('x', ARRAY['a', 'b'], jsonb_build_object('model', 'm', 'instruction', repeat('x ', 200000)))",
        "SELECT llm_score('x', repeat('words ', 100000), '{\"model\": \"m\"}')",
        "SELECT llm_batch.create_classifier('x', jsonb_build_object('a', repeat('x', 300000), 'b', ''), 'm')",
        "SELECT llm_batch.alter_classifier('topic', examples => jsonb_build_array(
            jsonb_build_object('input', repeat('x', 300000), 'label', 'bug')))",
    ] {
        refused(client, sql, "54000", &["262144", "Shorten"]);
    }
    run(
        client,
        "SELECT llm_batch.create_model('large', 'fake', 'x', parameters => jsonb_build_object('x', repeat('x', 600000)))",
    );
    let ask = "SELECT llm_classify('x', ARRAY['a', 'b'], '{\"model\": \"large\"}')";
    refused(client, ask, "54000", &["524288", "parameters"]);
    run(client, "SELECT llm_batch.drop_model('large')");

    let classifier = |labels: &str, more: &str| {
        format!("SELECT llm_batch.create_classifier('x', labels => '{labels}', model => 'm'{more})")
    };
    let labels = |n: usize| serde_json::to_string(&(0..n).map(|i| format!("l{i}")).collect::<Vec<_>>()).unwrap();
    for bad in [
        r#"["a"]"#,
        "[]",
        "{}",
        &labels(251),
        r#"["a", "A"]"#,
        r#"["a", "a"]"#,
        r#"["a", ""]"#,
        r#"["a", " b"]"#,
        r#"["a", "b\nc"]"#,
        r#"["a", 1]"#,
        r#"["a", null]"#,
        r#"{"a": 1, "b": ""}"#,
        r#"[{"label": "a"}, {"lable": "b"}]"#,
        "\"a\"",
        "null",
    ] {
        let (code, message, ..) = error(client, &classifier(bad, ""));
        assert_eq!(code, "22023", "{bad}: {message}");
    }
    for bad in [
        r#"{"input": "x", "label": "a"}"#,
        r#"[{"input": "x", "label": "c"}]"#,
        r#"[{"input": "x"}]"#,
        r#"["x"]"#,
        r#"[{"input": 1, "label": "a"}]"#,
    ] {
        let (code, message, ..) = error(client, &classifier(r#"["a", "b"]"#, &format!(", examples => '{bad}'")));
        assert_eq!(code, "22023", "{bad}: {message}");
    }
    run(client, &format!("BEGIN; {}; ROLLBACK", classifier(&labels(250), "")));
    run(client, &format!("BEGIN; {}; ROLLBACK", classifier(&labels(2), "")));
    refused(
        client,
        "SELECT llm_batch.create_classifier('topic', '[\"a\", \"b\"]', 'm')",
        "42710",
        &["alter_classifier"],
    );
    refused(client, "SELECT llm_batch.create_classifier('x', '[\"a\", \"b\"]', 'gone')", "42704", &["model \"gone\""]);
    refused(client, "SELECT llm_batch.create_classifier('x', '[\"a\", \"b\"]')", "22023", &["llm_batch.default_model"]);
    let (code, ..) = error(client, "SELECT llm_batch.alter_classifier('gone')");
    assert_eq!(code, "42704");
    let (code, ..) = error(client, "SELECT llm_batch.drop_task('gone')");
    assert_eq!(code, "42704");
    // An example's label must not be taken away.
    run(client, &classifier(r#"["a", "b"]"#, r#", examples => '[{"input": "x", "label": "a"}]'"#));
    let (code, ..) = error(client, "SELECT llm_batch.alter_classifier('x', labels => '[\"c\", \"d\"]')");
    assert_eq!(code, "22023");

    let deep = format!("{{\"priority\": {}{}}}", "[".repeat(500), "]".repeat(500));
    for bad in [
        "{\"max_rows\": 5}",
        "{\"max_rows_per_request\": 0}",
        "{\"max_rows_per_request\": 501}",
        "{\"max_attempts\": 11}",
        "{\"priority\": 101}",
        "{\"priority\": \"high\"}",
        "{\"structured_output\": \"yes\"}",
        "{\"codes\": \"emoji\"}",
        "{\"answer_shape\": 1}",
        "{\"too_long\": \"cry\"}",
        "{\"max_attempts\": 1e400}",
        "{\"max_attempts\": -1e400}",
        "{\"max_attempts\": 1e308}",
        "{\"priority\": 0.1}",
        "{\"priority\": \"NaN\"}",
        &deep,
        "[]",
        "1",
    ] {
        for sql in [
            call(&format!("options => '{bad}'")),
            format!("SELECT llm_classify_batch('SELECT 1, 2', 'topic', '{bad}')"),
            format!("SET llm_batch.default_model = 'm'; SELECT llm_classify('x', ARRAY['a', 'b'], '{bad}')"),
            classifier(r#"["a", "c"]"#, &format!(", options => '{bad}'")).replace("'x'", "'y'"),
        ] {
            refused(client, &sql, "22023", &["option"]);
        }
    }
    for bad in ["1e400", "-1", "0", "\"NaN\"", "-1e308", "[1]"] {
        for key in ["max_cost", "max_tokens"] {
            let sql = format!("SELECT llm_classify_batch('SELECT 1, 2', 'topic', '{{\"{key}\": {bad}}}')");
            let (code, message, _, hint) = error(client, &sql);
            assert!(code == "22023" && !hint.is_empty(), "{sql}: {code} {message} {hint}");
        }
    }
    refused(client, "SELECT llm_classify('x', array_fill('a'::text, ARRAY[100000]))", "22023", &[]);
    for bad in ["[1e400, \"a\"]", "{\"a\": 1e400, \"b\": \"\"}", "[{\"label\": \"a\", \"description\": 1e400}, \"b\"]"]
    {
        refused(client, &classifier(bad, "").replace("'x'", "'y'"), "22P02", &["number out of range"]);
    }
    refused(
        client,
        &call("options => '{\"max_rows\": 5}'"),
        "22023",
        &["\"max_rows\"", "max_rows_per_request", "codes"],
    );
    nothing_happened(&bed);
}

#[test]
fn options_of_servers_and_mappings() {
    let bed = Bed::new("errors_ddl");
    let client = &mut bed.connect();
    let server = |options: &str| format!("CREATE SERVER x FOREIGN DATA WRAPPER llm_provider OPTIONS ({options})");
    refused(client, &server("base_url 'https://a/v1', url 'x'"), "HV00D", &["\"url\"", "base_url, account"]);
    refused(client, &server("base_url 'https://a/v1', api_key 'x'"), "HV00D", &["\"api_key\"", "base_url"]);
    refused(client, "CREATE SERVER x FOREIGN DATA WRAPPER llm_provider", "HV00J", &["base_url"]);
    refused(client, &server("base_url 'https://a/v1', api 'gopher'"), "HV024", &["gopher", "openai"]);
    for url in [
        "http://api.openai.com/v1",
        "http://169.254.169.254/latest",
        "ftp://a/v1",
        "file:///etc/passwd",
        "api.openai.com/v1",
        "https://",
        "https://a/v1?key=x",
        "https://user:pw@a/v1",
        "http://127.0.0.1@evil.example/v1",
        "https://a:99999/v1",
        "https://xn--nx/v1",
    ] {
        refused(client, &server(&format!("base_url '{url}'")), "HV024", &["base_url", "https://host/path"]);
    }
    // Each dialect has its own.
    refused(client, &server("api 'azure'"), "HV00J", &["base_url", "azure", "https://"]);
    let azure =
        server("api 'azure', base_url 'https://x.openai.azure.com/openai/deployments/d?api-version=2024-10-21'");
    refused(client, &azure, "HV024", &["it contains a query", "api_version", "deployment"]);
    refused(client, &server("api 'openai', api_version '1'"), "HV024", &["api_version", "'openai'"]);
    refused(client, &server("api 'anthropic', api_version 'a b'"), "HV024", &["\"api_version\"", "2024-10-21"]);
    refused(client, &server("api 'Anthropic'"), "HV024", &["\"Anthropic\"", "anthropic", "gemini"]);
    run(client, &server("api 'gemini'"));
    let model = |name: &str, parameters: &str| {
        format!("SELECT llm_batch.create_model('{name}', server => 'x', model => 'm', parameters => '{parameters}')")
    };
    refused(client, &model("g", r#"{"generationConfig": {}}"#), "22023", &["\"generationConfig\"", "for each request"]);
    run(client, &model("g", r#"{"max_tokens": 5, "temperature": 0}"#));
    refused(client, "SELECT llm_batch.alter_model('g', parameters => '{\"contents\": 1}')", "22023", &["\"contents\""]);
    run(client, "SELECT llm_batch.drop_model('g'); DROP SERVER x");
    for option in ["api ''", "account ''", "api_key_file ' '"] {
        let (code, message, ..) = error(client, &server(&format!("base_url 'https://a/v1', {option}")));
        assert_eq!(code, "HV024", "{option}: {message}");
    }
    let (code, ..) = error(client, &server("base_url ''"));
    assert_eq!(code, "HV024");
    let mapping = |options: &str| format!("CREATE USER MAPPING FOR postgres SERVER fake OPTIONS ({options})");
    refused(client, &mapping("password 'x'"), "HV00D", &["\"password\"", "api_key"]);
    refused(client, &mapping("base_url 'https://a/v1'"), "HV00D", &["\"base_url\"", "api_key"]);
    for key in ["", " ", "two words", "tab\there", "line\nend", "ключ-secret"] {
        let (code, message, detail, hint) = error(client, &mapping(&format!("api_key '{key}'")));
        assert_eq!(code, "HV024", "{message}");
        assert!(key.trim().is_empty() || hint.starts_with("Copy the key"), "{message}: {hint}");
        let all = format!("{message}{detail}{hint}");
        assert!(key.trim().is_empty() || !all.contains(key), "the key is shown: {all}");
    }
    refused(client, "ALTER FOREIGN DATA WRAPPER llm_provider OPTIONS (ADD x 'y')", "HV00D", &["\"x\""]);
    refused(
        client,
        "CREATE FOREIGN TABLE f (a int) SERVER fake OPTIONS (x 'y')",
        "HV00D",
        &["\"x\"", "no valid options"],
    );
    refused(client, "ALTER SERVER fake OPTIONS (SET base_url 'http://a/v1')", "HV024", &["this machine alone"]);
    refused(client, "ALTER SERVER fake OPTIONS (DROP api, DROP base_url)", "HV00J", &["base_url"]);
    // A valid text passes.
    run(
        client,
        "CREATE SERVER x FOREIGN DATA WRAPPER llm_provider
         OPTIONS (api 'openai', base_url 'https://a.example:8443/v1/', account 'a', api_key_file '/nowhere')",
    );
}
