//! How texts stand in requests, and how many tokens they take there.

use std::sync::Arc;

use llm_batch_core::dialect::Service;
use llm_batch_core::options::TooLong;
use llm_batch_core::prompt;
use llm_batch_core::task::{Kind, Span};

use crate::tokens;

/// Turns texts into lines of a request. A long text is measured on another thread.
#[derive(Debug)]
pub struct Ruler {
    pub kind: Arc<dyn Kind>,
    pub service: Service,
    /// Tokens of a row's question.
    pub question_tokens: usize,
    pub most_bytes: usize,
    /// Tokens of a line and its answer.
    pub most: usize,
    pub too_long: TooLong,
}

/// A text as it stands in a request.
#[derive(Debug)]
pub struct Line {
    /// As a JSON string; empty: it is larger than a request may be.
    pub quoted: String,
    pub tokens: usize,
    pub answer: Span,
}

impl Ruler {
    pub fn line(&self, text: &str) -> Line {
        let tokens_of = |quoted: &str| match self.service {
            Service::Embeddings => tokens::count(quoted.get(1..quoted.len().saturating_sub(1)).unwrap_or_default()),
            Service::Chat | Service::Decisions => tokens::count(&prompt::row(417, quoted, None)) + self.question_tokens,
        };
        let answer = |tokens: usize| self.kind.tokens(tokens);
        // Counting a text that can't fit anyway would be wasted work.
        let hopeless = text.len() >= self.most_bytes;
        let mut quoted = if hopeless { String::new() } else { prompt::quote(text) };
        let mut tokens = tokens_of(&quoted);
        if hopeless || tokens + answer(tokens).planned > self.most {
            let cut = match self.too_long {
                TooLong::Skip => "",
                TooLong::Truncate => {
                    let most = self.most.saturating_sub(answer(self.most).planned);
                    tokens::beginning(text, most.saturating_sub(tokens_of("")))
                }
            };
            quoted = if cut.is_empty() { String::new() } else { prompt::quote(cut) };
            tokens = tokens_of(&quoted);
        }
        Line { quoted, tokens, answer: answer(tokens) }
    }
}
