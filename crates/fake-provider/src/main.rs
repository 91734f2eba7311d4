//! `llm-fake-provider`: the provider as a process of its own.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use llm_fake_provider::{Config, FakeProvider, RateHeaders, RetryAfter};
use serde::Deserialize;

const USAGE: &str = "\
usage: llm-fake-provider [OPTION]...
  --listen ADDR:PORT        default 127.0.0.1:0
  --limiter KIND            rolling (default) or bucket
  --window SECONDS          the time limits are given for, default 60
  --tokens-per-window N     default no limit
  --input-tokens-per-window N, --output-tokens-per-window N,
  --requests-per-window N   default no limit
  --other-client SHARE      another client takes this part (0 to 1) of the token limit
  --other-client-tokens N   tokens of each of its requests, default 1000
  --other-client-after SECONDS
                            it begins so long after our first request
  --other-client-yields     it is refused too where there is no room
  --reserve HOW             actual (default), prompt-plus-max or max
  --release                 give back what was reserved and not used
  --rate-headers STYLE      openai (default), anthropic, mistral, azure or none
  --retry-after STYLE       both (default: s and ms), seconds, date or none
  --cache-prefix            report system messages that come again as cached
  --context-tokens N, --max-answer-tokens N, --max-row-bytes N
                            default no limit
  --thinking-tokens N       spent before each answer, default 0
  --base-ms N               delay of every answer
  --per-token-ms N          delay per completion token
  --spread F                sigma of the lognormal factor on the delay
  --fault NAME=RATE         probability of a fault, may be repeated
  --api-key KEY             default none asked for
  --model NAME              a model served, may be repeated, default all
  --seed N                  default 1
  --no-retry-after, --no-rate-headers, --no-json-schema, --no-json-object, --no-base64,
  --no-max-tokens           leave out what real servers may lack
Prints one line of JSON with base_url, and bases by dialect, once it listens; runs until killed.";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--help") {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    let started =
        configure(arguments).and_then(|config| FakeProvider::start(config).map_err(|error| error.to_string()));
    match started {
        Ok(provider) => {
            let ready = serde_json::json!({ "base_url": provider.base_url(), "bases": provider.bases() });
            println!("{ready}");
            let _ = std::io::stdout().flush();
            loop {
                std::thread::park();
            }
        }
        Err(message) => {
            eprintln!("llm-fake-provider: {message}\n{USAGE}");
            ExitCode::FAILURE
        }
    }
}

fn configure(arguments: Vec<String>) -> Result<Config, String> {
    let mut config = Config::default();
    let mut arguments = arguments.into_iter();
    while let Some(option) = arguments.next() {
        match option.as_str() {
            "--no-retry-after" => config.retry_after = RetryAfter::None,
            "--no-rate-headers" => config.rate_headers = RateHeaders::None,
            "--other-client-yields" => config.other_client.get_or_insert_default().insists = false,
            "--release" => config.release = true,
            "--cache-prefix" => config.cache_prefix = true,
            "--no-json-schema" => config.json_schema = false,
            "--no-json-object" => config.json_object = false,
            "--no-base64" => config.base64 = false,
            "--no-system-role" => config.system_role = false,
            "--no-max-tokens" => config.max_tokens_param = false,
            _ => {
                let value = arguments.next().ok_or(format!("{option} needs a value"))?;
                set(&mut config, &option, &value).ok_or(format!("{option} {value} is not understood"))?;
            }
        }
    }
    Ok(config)
}

fn set(config: &mut Config, option: &str, value: &str) -> Option<()> {
    match option {
        "--listen" => config.listen = value.parse().ok()?,
        "--limiter" => config.limiter = named(value)?,
        "--window" => config.window = seconds(value, 1.0)?,
        "--tokens-per-window" => config.tokens_per_window = Some(value.parse().ok()?),
        "--input-tokens-per-window" => config.input_tokens_per_window = Some(value.parse().ok()?),
        "--output-tokens-per-window" => config.output_tokens_per_window = Some(value.parse().ok()?),
        "--requests-per-window" => config.requests_per_window = Some(value.parse().ok()?),
        "--context-tokens" => config.context_tokens = Some(value.parse().ok()?),
        "--max-answer-tokens" => config.max_answer_tokens = Some(value.parse().ok()?),
        "--max-row-bytes" => config.max_row_bytes = Some(value.parse().ok()?),
        "--thinking-tokens" => config.thinking_tokens = value.parse().ok()?,
        "--other-client" => config.other_client.get_or_insert_default().share = value.parse().ok()?,
        "--other-client-tokens" => config.other_client.get_or_insert_default().request_tokens = value.parse().ok()?,
        "--other-client-after" => config.other_client.get_or_insert_default().after = seconds(value, 1.0)?,
        "--rate-headers" => config.rate_headers = named(value)?,
        "--retry-after" => config.retry_after = named(value)?,
        "--reserve" => config.reserve = named(value)?,
        "--base-ms" => config.latency.base = seconds(value, 1000.0)?,
        "--per-token-ms" => config.latency.per_output_token = seconds(value, 1000.0)?,
        "--spread" => config.latency.spread = value.parse().ok()?,
        "--fault" => {
            // From the right: a redirect's target may hold an equals sign.
            let (name, rate) = value.rsplit_once('=')?;
            config.faults.push((name.parse().ok()?, rate.parse().ok()?));
        }
        "--api-key" => config.api_key = Some(value.to_owned()),
        "--model" => config.models.get_or_insert_default().push(value.to_owned()),
        "--seed" => config.seed = value.parse().ok()?,
        _ => return None,
    }
    Some(())
}

/// The variant of this name.
fn named<T: for<'de> Deserialize<'de>>(name: &str) -> Option<T> {
    serde_json::from_value(name.into()).ok()
}

fn seconds(value: &str, per_second: f64) -> Option<Duration> {
    let number: f64 = value.parse().ok()?;
    Duration::try_from_secs_f64(number / per_second).ok()
}
