//! A way of asking about the rows of a group.

use std::sync::Arc;

use llm_batch_core::dialect::{FRAME_TOKENS, Service, decisions};
use llm_batch_core::task::Kind;
use llm_batch_core::{prompt, request};

use crate::cache::{Keys, TextKey};
use crate::protocol::Stream;
use crate::tokens;

/// A way of asking, and the tokens that it takes.
#[derive(Debug)]
pub struct Asking {
    pub service: Service,
    pub kind: Arc<dyn Kind>,
    /// Stands for what an answer depends on, beside the text: rows with the same scope and text have the same answer.
    pub scope: TextKey,
    /// The fixed prefix.
    pub system: String,
    pub prefix_tokens: usize,
    /// Tokens of an answer beside its rows, and of a row's question, if there is one.
    pub answer_frame: usize,
    pub question_tokens: usize,
    /// Memory of the stream and what was made of it, about.
    pub bytes: usize,
}

impl Asking {
    pub fn new(stream: &Stream, keys: &Keys) -> Self {
        let task = &stream.task;
        let kind = task.spec.prepare(&task.options, &tokens::count);
        let service = task.service();
        let system = match service {
            Service::Chat => request::system(&*kind),
            Service::Embeddings => String::new(),
            Service::Decisions => request::decided(&*kind),
        };
        let (has_prefix, is_written) = (service != Service::Embeddings, service == Service::Chat);
        let model = &stream.model;
        let scope = serde_json::json!([
            stream.database,
            stream.role,
            stream.endpoint,
            model.model,
            model.parameters,
            model.max_request_tokens,
            stream.others,
            system,
            task.spec,
            task.options.answer_shape,
            task.options.too_long,
        ])
        .to_string();
        Self {
            service,
            scope: keys.of(0, &scope),
            // Each member has a copy of the task.
            bytes: 2 * scope.len() * (1 + stream.others.len()),
            prefix_tokens: if has_prefix { tokens::count(&system) + FRAME_TOKENS } else { 0 },
            system,
            answer_frame: if is_written { prompt::tokens_of_the_frame(&tokens::count) } else { 0 },
            question_tokens: kind.choices().map_or(0, |choices| decisions::tokens(choices, &tokens::count)),
            kind: kind.into(),
        }
    }

    /// Tokens of a request beside its rows and their answers.
    pub fn frame(&self) -> usize {
        self.prefix_tokens + self.answer_frame
    }
}
