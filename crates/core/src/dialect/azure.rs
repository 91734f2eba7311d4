//! Azure OpenAI: OpenAI's wire under the address of a deployment, which is the model's name, or under `/openai/v1`.
//!
//! Source: Microsoft's published REST reference and page on quotas: a request reserves its prompt and its cap.

use serde_json::Value;

use super::embeddings::{Embeddings, Texts};
use super::openai::embeddings::OpenaiEmbeddings;
use super::{Ask, Counts, Dialect, Reply, Unread, openai, segment};

pub(super) struct Azure;

/// The version that is asked for at the address of a deployment.
const VERSION: &str = "2024-10-21";

impl Dialect for Azure {
    fn base_url(&self) -> Option<&'static str> {
        None
    }

    fn has_version(&self) -> bool {
        true
    }

    fn counts(&self) -> Counts {
        Counts::Reserved
    }

    fn reserved(&self) -> &'static [&'static str] {
        &openai::RESERVED
    }

    fn url(&self, base: &str, model: &str, version: Option<&str>) -> String {
        address(base, model, version, "chat/completions")
    }

    fn key_header(&self) -> (&'static str, &'static str) {
        ("api-key", "")
    }

    fn body(&self, ask: &Ask) -> Value {
        openai::Openai.body(ask)
    }

    fn reply(&self, body: &[u8]) -> Result<Reply, Unread> {
        openai::Openai.reply(body)
    }

    /// A deployment whose name does not tell its model may be any.
    fn cache_write_surcharge(&self, model: &str) -> u64 {
        openai::write_surcharge(model).unwrap_or(25)
    }

    fn embeddings(&self) -> Option<&'static dyn Embeddings> {
        Some(&Azure)
    }
}

/// As OpenAI's at another address.
impl Embeddings for Azure {
    fn url(&self, base: &str, model: &str, version: Option<&str>) -> String {
        address(base, model, version, "embeddings")
    }

    fn most_texts(&self) -> usize {
        OpenaiEmbeddings.most_texts()
    }

    fn most_tokens(&self, model: &str) -> u64 {
        OpenaiEmbeddings.most_tokens(model)
    }

    fn body(&self, texts: &Texts) -> Value {
        OpenaiEmbeddings.body(texts)
    }

    fn reply(&self, body: &[u8], texts: usize) -> Result<Reply, Unread> {
        OpenaiEmbeddings.reply(body, texts)
    }
}

/// The address of what a model is asked for.
fn address(base: &str, model: &str, version: Option<&str>, what: &str) -> String {
    if base.ends_with("/openai/v1") {
        let query = version.map(|version| format!("?api-version={version}")).unwrap_or_default();
        return format!("{base}/{what}{query}");
    }
    // The address may have been copied with the deployment in it.
    let deployment = if base.contains("/openai/deployments/") {
        base.to_owned()
    } else {
        format!("{}/openai/deployments/{}", base.trim_end_matches("/openai"), segment(model))
    };
    format!("{deployment}/{what}?api-version={}", version.unwrap_or(VERSION))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_addresses_are_written() {
        let resource = "https://x.openai.azure.com";
        let classic = "https://x.openai.azure.com/openai/deployments/my%20gpt/chat/completions?api-version=2024-10-21";
        assert_eq!(Dialect::url(&Azure, resource, "my gpt", None), classic);
        assert_eq!(Dialect::url(&Azure, &format!("{resource}/openai"), "my gpt", None), classic);
        assert_eq!(Dialect::url(&Azure, &format!("{resource}/openai/deployments/my%20gpt"), "other", None), classic);
        assert_eq!(
            Dialect::url(&Azure, resource, "my gpt", Some("2025-01-01")),
            classic.replace("2024-10-21", "2025-01-01")
        );
        let embeds = classic.replace("chat/completions", "embeddings");
        assert_eq!(Embeddings::url(&Azure, resource, "my gpt", None), embeds);
        let newer = format!("{resource}/openai/v1");
        assert_eq!(Dialect::url(&Azure, &newer, "m", None), format!("{newer}/chat/completions"));
        assert_eq!(
            Dialect::url(&Azure, &newer, "m", Some("preview")),
            format!("{newer}/chat/completions?api-version=preview")
        );
    }
}
