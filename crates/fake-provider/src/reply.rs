//! Replies: status, headers, body, in OpenAI's shapes.

use serde_json::{Value, json};

use crate::date::{http_date, unix_time};

/// A response.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) body: String,
    /// As it is, before the other headers.
    pub(crate) extra_head: Vec<u8>,
}

impl Reply {
    pub(crate) fn json(status: u16, body: &Value) -> Self {
        Self::text(status, body.to_string())
    }

    /// A body that is JSON already.
    pub(crate) fn text(status: u16, body: String) -> Self {
        let headers = vec![("content-type", "application/json".to_owned())];
        Self { status, headers, body, extra_head: Vec::new() }
    }

    /// An error of OpenAI's shape; `param` and `code` may be empty, for null.
    pub(crate) fn error(status: u16, kind: &str, param: &str, code: &str, message: &str) -> Self {
        let or_null = |text: &str| match text {
            "" => Value::Null,
            text => Value::from(text),
        };
        let error = json!({
            "message": message,
            "type": kind,
            "param": or_null(param),
            "code": or_null(code),
        });
        Self::json(status, &json!({ "error": error }))
    }

    /// A 400 of type `invalid_request_error`.
    pub(crate) fn invalid(param: &str, code: &str, message: &str) -> Self {
        Self::error(400, "invalid_request_error", param, code, message)
    }

    pub(crate) fn to_bytes(&self, keep_alive: bool) -> Vec<u8> {
        let mut bytes = format!("HTTP/1.1 {} {}\r\n", self.status, reason(self.status)).into_bytes();
        bytes.extend_from_slice(&self.extra_head);
        let mut head = format!(
            "date: {}\r\ncontent-length: {}\r\nconnection: {}\r\n",
            http_date(unix_time().as_secs()),
            self.body.len(),
            if keep_alive { "keep-alive" } else { "close" },
        );
        for (name, value) in &self.headers {
            // A header of a test's making (a redirect's target) must not break the head.
            let value: String = value.chars().filter(|c| !c.is_control()).collect();
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        bytes.extend_from_slice(head.as_bytes());
        bytes.extend_from_slice(self.body.as_bytes());
        bytes
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        302 => "Found",
        400 => "Bad Request",
        401 => "Unauthorized",
        404 => "Not Found",
        405 => "Method Not Allowed",
        411 => "Length Required",
        413 => "Content Too Large",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        503 => "Service Unavailable",
        _ => "Status",
    }
}
