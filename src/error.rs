//! The error type of this crate: SQLSTATE, message, detail and hint.

use llm_batch_gateway::protocol::{Full, Stop, StopReason, Stream};
use pgrx::PgSqlErrorCode;
use pgrx::pg_sys::panic::{CaughtError, ErrorReport};

/// An error with its SQLSTATE; becomes an `ereport(ERROR)` when a SQL function returns it.
#[derive(Debug, Clone)]
pub struct Error {
    pub code: PgSqlErrorCode,
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub fn new(code: PgSqlErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), detail: None, hint: None }
    }

    /// 22023, for a value that can't be used.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE, message)
    }

    /// 42704, for a name that means nothing.
    pub fn unknown(message: impl Into<String>) -> Self {
        Self::new(PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT, message)
    }

    /// 42501.
    pub fn denied(message: impl Into<String>) -> Self {
        Self::new(PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE, message)
    }

    /// 55000, for something that is not in the state it would have to be in.
    pub fn state(message: impl Into<String>) -> Self {
        Self::new(PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE, message)
    }

    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// With a hint, unless it has one.
    pub fn hint_if_none(mut self, hint: impl Into<String>) -> Self {
        self.hint.get_or_insert_with(|| hint.into());
        self
    }

    /// Its SQLSTATE and message.
    pub fn with_state(&self) -> String {
        format!("{}: {}", sqlstate(self.code), self.message)
    }

    /// The error for a provider's refusal.
    pub fn from_stop(stop: &Stop, model: &str, stream: &Stream) -> Self {
        use PgSqlErrorCode as C;
        let (code, message, hint) = match stop.reason {
            StopReason::Auth if stream.endpoint.api_key.is_none() && stream.others.is_empty() => (
                C::ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION,
                format!("the provider of model \"{model}\" asks for an API key, and there is none"),
                "Create it with CREATE USER MAPPING FOR … SERVER … OPTIONS (api_key '…'). A mapping counts for its role \
                 alone; one for PUBLIC counts for every role without its own.",
            ),
            StopReason::Auth => (
                C::ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION,
                format!("the provider of model \"{model}\" rejected the API key"),
                "Correct it with ALTER USER MAPPING … OPTIONS (SET api_key '…'), or in the file of api_key_file.",
            ),
            StopReason::Spend => (
                C::ERRCODE_INSUFFICIENT_RESOURCES,
                format!("the account of model \"{model}\" is out of credit"),
                "Add credit or raise the spending limit at the provider.",
            ),
            StopReason::Quota => (
                C::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
                format!("the quota of model \"{model}\" is exhausted"),
                "Wait until the provider renews the quota, or raise it at the provider.",
            ),
            StopReason::ProviderDown if stop.message.contains("invalid peer certificate") => (
                C::ERRCODE_CONNECTION_FAILURE,
                format!("the provider of model \"{model}\" does not answer"),
                "Where the certificate is signed by an authority of one's own, a superuser can set option ca_file of the \
                 server.",
            ),
            StopReason::ProviderDown if stop.message.contains("InvalidContentType") => (
                C::ERRCODE_CONNECTION_FAILURE,
                format!("the provider of model \"{model}\" does not answer"),
                "The endpoint does not speak TLS at this port. Check the option base_url of the foreign server: https, or \
                 http for this machine and, with allow_http, for private addresses.",
            ),
            StopReason::ProviderDown if stop.message.contains("is not JSON") => (
                C::ERRCODE_CONNECTION_FAILURE,
                format!("the provider of model \"{model}\" does not answer with JSON"),
                "A web page or another service may answer there. Check the option base_url of the foreign server, which \
                 usually ends in /v1.",
            ),
            StopReason::ProviderDown => (
                C::ERRCODE_CONNECTION_FAILURE,
                format!("the provider of model \"{model}\" does not answer"),
                "Check the option base_url of the foreign server, and that the endpoint is reachable from the database server.",
            ),
            StopReason::NotFound => (
                C::ERRCODE_UNDEFINED_OBJECT,
                format!("the provider does not know model \"{model}\""),
                "Check the name of the model and base_url of the server, which usually ends in /v1.",
            ),
            StopReason::Rejected => (
                C::ERRCODE_FDW_INVALID_ATTRIBUTE_VALUE,
                format!("the provider of model \"{model}\" rejected the request"),
                "Check the parameters of the model and the options of the task, such as structured_output.",
            ),
            StopReason::NoAnswers => (
                C::ERRCODE_DATA_EXCEPTION,
                format!("model \"{model}\" gives no valid answer to this task"),
                "Ask another model, or change the task: fewer or plainer labels, another answer_shape or \
                 structured_output, fewer rows with max_rows_per_request.",
            ),
            StopReason::Disabled => (
                C::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                "pg_llm_batch is disabled".to_owned(),
                "Set llm_batch.enabled = on and reload the configuration.",
            ),
        };
        Self::new(code, message).detail(stop.message.clone()).hint(hint)
    }

    /// 53000: others have all places in the gateway.
    pub fn from_full(full: Full) -> Self {
        let (message, detail) = match full {
            Full::Role(n) => (
                "this role's sessions ask too much at the same time",
                format!("They may have {n} connections to the llm_batch gateway, and all are at work."),
            ),
            Full::Gateway(n) => (
                "sessions ask too much at the same time",
                format!("The llm_batch gateway serves {n} connections, and all are at work."),
            ),
            Full::Memory(bytes) => (
                "sessions ask tasks that are too large at the same time",
                format!("Their instructions, labels and examples take {} kB in the llm_batch gateway.", bytes >> 10),
            ),
        };
        if let Full::Memory(_) = full {
            return Self::new(PgSqlErrorCode::ERRCODE_INSUFFICIENT_RESOURCES, message)
                .detail(detail)
                .hint("Try again when some have been answered, or raise llm_batch.gateway_memory.");
        }
        Self::new(PgSqlErrorCode::ERRCODE_INSUFFICIENT_RESOURCES, message).detail(detail).hint(
            "Try again when some have been answered. With a higher limit of open files at its start (ulimit -Hn, \
             LimitNOFILE) the server takes more.",
        )
    }

    /// One line for `last_error`.
    pub fn one_line(&self) -> String {
        match &self.detail {
            Some(detail) => format!("{}: {detail}", self.message),
            None => self.message.clone(),
        }
    }
}

impl From<Error> for ErrorReport {
    fn from(e: Error) -> Self {
        let mut report = ErrorReport::new(e.code, e.message, "pg_llm_batch");
        if let Some(detail) = e.detail {
            report = report.set_detail(detail);
        }
        if let Some(hint) = e.hint {
            report = report.set_hint(hint);
        }
        report
    }
}

impl From<llm_batch_core::Error> for Error {
    fn from(e: llm_batch_core::Error) -> Self {
        let code = match e.is_too_large {
            true => PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
            false => PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
        };
        Self { hint: e.hint, ..Self::new(code, e.message) }
    }
}

impl From<pgrx::spi::Error> for Error {
    fn from(e: pgrx::spi::Error) -> Self {
        Error::new(PgSqlErrorCode::ERRCODE_INTERNAL_ERROR, format!("an internal statement of pg_llm_batch failed: {e}"))
    }
}

impl From<CaughtError> for Error {
    fn from(e: CaughtError) -> Self {
        match e {
            CaughtError::PostgresError(e) | CaughtError::ErrorReport(e) | CaughtError::RustPanic { ereport: e, .. } => {
                Self {
                    code: e.sql_error_code(),
                    message: e.message().to_owned(),
                    detail: e.detail().map(str::to_owned),
                    hint: e.hint().map(str::to_owned),
                }
            }
        }
    }
}

/// Errors that should pass, and at first say nothing about a row.
pub fn is_passing(code: PgSqlErrorCode) -> bool {
    matches!(
        code,
        PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE
            | PgSqlErrorCode::ERRCODE_T_R_DEADLOCK_DETECTED
            | PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE
            | PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY
            | PgSqlErrorCode::ERRCODE_DISK_FULL
            | PgSqlErrorCode::ERRCODE_TOO_MANY_CONNECTIONS
            | PgSqlErrorCode::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED
            | PgSqlErrorCode::ERRCODE_INSUFFICIENT_RESOURCES
            | PgSqlErrorCode::ERRCODE_QUERY_CANCELED
    )
}

/// The five characters of an SQLSTATE.
pub fn sqlstate(code: PgSqlErrorCode) -> String {
    let mut packed = code as i32;
    (0..5)
        .map(|_| {
            let c = char::from(((packed & 0x3F) as u8).wrapping_add(b'0'));
            packed >>= 6;
            c
        })
        .collect()
}
