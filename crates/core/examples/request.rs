//! What is asked of a model and how its answer is read, for scripts: bench/injection measures with it what is shipped.
//! One JSON object a line comes in, and one value goes out: `{"task", "ids", "texts"}` → the messages and the
//! `response_format`; with an `"answer"` instead of texts → the label of each id, or null.

use std::io::BufRead;

use llm_batch_core::answer::{self, Verdict};
use llm_batch_core::codes::Legend;
use llm_batch_core::forms::Forms;
use llm_batch_core::options::Options;
use llm_batch_core::prompt;
use llm_batch_core::task::{Task, labels_from_json};
use serde_json::{Value, json};

fn reply(line: &str) -> Result<Value, Box<dyn std::error::Error>> {
    let said: Value = serde_json::from_str(line)?;
    let task = Task {
        instruction: said["task"]["instruction"].as_str().unwrap_or_default().to_owned(),
        labels: labels_from_json(&said["task"]["labels"]).map_err(|e| e.message)?,
        examples: Vec::new(),
        options: Options::from_json([&said["task"]["options"]]).map_err(|e| e.message)?,
    };
    let ids: Vec<u16> = serde_json::from_value(said["ids"].clone())?;
    // Tokens are the gateway's to count; `codes` is to be given.
    let legend = Legend::new(&task.labels, task.options.codes, &str::len);
    if let Some(text) = said["answer"].as_str() {
        let label = |v: &Verdict| match v {
            Verdict::Label(i) => json!(task.labels[*i].label),
            _ => Value::Null,
        };
        return Ok(answer::read(text, &ids, &legend).unwrap_or_default().iter().map(label).collect());
    }
    let texts: Vec<String> = serde_json::from_value(said["texts"].clone())?;
    let user: String = ids.iter().zip(&texts).map(|(id, text)| prompt::row(*id, &prompt::quote(text))).collect();
    let Options { answer_shape, structured_output, .. } = task.options;
    let form = Forms::default().next(answer_shape, structured_output);
    Ok(json!({
        "system": prompt::system(&task, &legend),
        "user": user,
        "response_format": prompt::response_format(answer_shape, form, &legend, &ids),
    }))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for line in std::io::stdin().lock().lines() {
        println!("{}", reply(&line?)?);
    }
    Ok(())
}
