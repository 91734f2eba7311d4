//! Azure OpenAI: OpenAI's wire under the address of a deployment, which is the model's name, or under `/openai/v1`.
//!
//! Source: Microsoft's published REST reference and page on quotas: a request reserves its prompt and its cap.

use serde_json::Value;

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
        if base.ends_with("/openai/v1") {
            let query = version.map(|version| format!("?api-version={version}")).unwrap_or_default();
            return format!("{base}/chat/completions{query}");
        }
        // The address may have been copied with the deployment in it.
        let deployment = if base.contains("/openai/deployments/") {
            base.to_owned()
        } else {
            format!("{}/openai/deployments/{}", base.trim_end_matches("/openai"), segment(model))
        };
        format!("{deployment}/chat/completions?api-version={}", version.unwrap_or(VERSION))
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_addresses_are_written() {
        let resource = "https://x.openai.azure.com";
        let classic = "https://x.openai.azure.com/openai/deployments/my%20gpt/chat/completions?api-version=2024-10-21";
        assert_eq!(Azure.url(resource, "my gpt", None), classic);
        assert_eq!(Azure.url(&format!("{resource}/openai"), "my gpt", None), classic);
        assert_eq!(Azure.url(&format!("{resource}/openai/deployments/my%20gpt"), "other", None), classic);
        assert_eq!(Azure.url(resource, "my gpt", Some("2025-01-01")), classic.replace("2024-10-21", "2025-01-01"));
        let newer = format!("{resource}/openai/v1");
        assert_eq!(Azure.url(&newer, "m", None), format!("{newer}/chat/completions"));
        assert_eq!(Azure.url(&newer, "m", Some("preview")), format!("{newer}/chat/completions?api-version=preview"));
    }
}
