//! Providers: foreign servers of the wrapper `llm_provider`, and keys in user mappings. Postgres' own rights apply.

use std::path::Path;

use llm_batch_core::dialect::{Api, Counts};
use llm_batch_core::url;
use llm_batch_gateway::files;
use llm_batch_gateway::protocol::{Endpoint, Secret};
use pgrx::PgList;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use crate::error::{Error, Result};
use crate::{settings, sql};

/// Paths of requests, which documentation of providers shows behind their addresses, each with the end of such an address.
const REQUESTS: &[(&str, &str)] = &[
    ("", "/chat/completions"),
    ("", "/embeddings"),
    ("/v1", "/messages"),
    ("/v1", "/responses"),
    ("/v1", "/decisions"),
    ("/v1", "/systemone"),
    ("/v1beta", "/decisions"),
    ("/v2", "/chat"),
    ("/v2", "/embed"),
    ("/api", "/chat"),
    ("/api", "/embed"),
];
const SERVER_OPTIONS: &str = "api, api_version, base_url, account, counts, api_key_file, allow_http, ca_file";
const MAPPING_OPTIONS: &str = "api_key";
/// Most bytes of a file that holds a key.
const MOST_KEY: u64 = 4 * 1024;

#[pg_extern(sql = false)]
fn provider_validator(options: Vec<Option<String>>, catalog: pg_sys::Oid) -> std::result::Result<(), ErrorReport> {
    let valid = match catalog {
        pg_sys::ForeignServerRelationId => SERVER_OPTIONS,
        pg_sys::UserMappingRelationId => MAPPING_OPTIONS,
        _ => "",
    };
    let allow_http = match find(&options, "allow_http") {
        Some(value) if catalog == pg_sys::ForeignServerRelationId => boolean("allow_http", &value)?,
        _ => false,
    };
    let (mut seen_url, mut named_api, mut version) = (false, None, None);
    for option in options.iter().flatten() {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        if !valid.split(", ").any(|v| v == name) || valid.is_empty() {
            let hint = if valid.is_empty() {
                "There are no valid options in this context.".to_owned()
            } else {
                format!("Valid options in this context are: {valid}.")
            };
            return Err(Error::new(
                PgSqlErrorCode::ERRCODE_FDW_INVALID_OPTION_NAME,
                format!("invalid option \"{name}\""),
            )
            .hint(hint)
            .into());
        }
        // A key must not show up in an error, whatever is wrong with it.
        if value.trim().is_empty() {
            return Err(bad_value(format!("option \"{name}\" must not be empty")).into());
        }
        match name {
            "api_key_file" | "ca_file" if !Path::new(value).is_absolute() => {
                return Err(bad_value(format!("option \"{name}\" must be an absolute path"))
                    .hint("Write it from the root on, such as '/etc/llm/key'.")
                    .into());
            }
            "ca_file" => check_superuser(name)?,
            "allow_http" if allow_http => check_superuser(name)?,
            "api" => named_api = Some(api(value)?),
            "api_version" => version = Some(value.to_owned()),
            "base_url" => {
                seen_url = true;
                url::parse(value, allow_http).map_err(url_error)?;
                if !llm_batch_gateway::is_readable(value) {
                    return Err(bad_value("invalid base_url: the host is not a valid name".to_owned())
                        .hint("Write it as https://host/path. The prefix \"xn--\" is for internationalized names.")
                        .into());
                }
                if let Some(end) = path_of_request(value) {
                    return Err(bad_value(format!("invalid base_url: it ends in {end}"))
                        .hint(format!("Leave out {end}: each request has such a path of its own."))
                        .into());
                }
            }
            "counts" => drop(counts(value)?),
            "api_key" if !is_header(value) || value.len() as u64 > MOST_KEY => {
                let most = format!("A key has visible ASCII characters alone, and at most {MOST_KEY} of them.");
                return Err(bad_value("option \"api_key\" is not a valid key".to_owned())
                    .detail(most)
                    .hint("Copy the key as the provider shows it, without spaces, line breaks, or an ellipsis.")
                    .into());
            }
            _ => {}
        }
    }
    if let Some(version) = version {
        check_version(named_api.unwrap_or_default(), &version)?;
    }
    if catalog == pg_sys::ForeignServerRelationId && !seen_url {
        check_has_place(named_api)?;
    }
    Ok(())
}

/// The part of an address that each request has for itself. What stands before it belongs to `base_url`.
fn path_of_request(url: &str) -> Option<&str> {
    let path = url.trim_end_matches('/');
    let of_model = path.find("/models/").and_then(|at| path.get(at..)).filter(|end| end.contains(':'));
    let is_at_end = |(before, end): &&(&str, &str)| path.strip_suffix(end).is_some_and(|rest| rest.ends_with(before));
    of_model.or_else(|| REQUESTS.iter().find(is_at_end).map(|(_, end)| *end))
}

/// The dialect of a name.
fn api(name: &str) -> Result<Api> {
    Api::ALL.iter().find(|api| api.name() == name).copied().ok_or_else(|| {
        let names: Vec<&str> = Api::ALL.iter().map(|api| api.name()).collect();
        bad_value(format!("invalid value for option \"api\": \"{name}\"")).hint(format!(
            "Valid values are: {}. Most other endpoints, such as those of vLLM and llama.cpp, speak openai.",
            names.join(", ")
        ))
    })
}

/// Refuses a version where there is none, or one that could be anything but a version.
fn check_version(api: Api, version: &str) -> Result<()> {
    if !api.dialect().has_version() {
        return Err(bad_value(format!("option \"api_version\" has no meaning with api '{}'", api.name()))
            .hint("Drop the option. Where a version is part of the address, write it in base_url."));
    }
    if !version.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b)) {
        return Err(bad_value("invalid value for option \"api_version\"".to_owned())
            .hint("Write it as the provider does, such as '2024-10-21'."));
    }
    Ok(())
}

/// Refuses a server without an address where the dialect alone does not say it.
fn check_has_place(named: Option<Api>) -> Result<()> {
    let hint = match named {
        Some(api) if api.dialect().base_url().is_some() => return Ok(()),
        Some(api) => {
            format!("Write OPTIONS (api '{}', base_url 'https://…'): the API has no address of its own.", api.name())
        }
        None => "Write OPTIONS (api 'openai', base_url 'https://api.openai.com/v1').".to_owned(),
    };
    Err(Error::new(PgSqlErrorCode::ERRCODE_FDW_OPTION_NAME_NOT_FOUND, "option \"base_url\" is missing").hint(hint))
}

fn bad_value(message: String) -> Error {
    Error::new(PgSqlErrorCode::ERRCODE_FDW_INVALID_ATTRIBUTE_VALUE, message)
}

fn url_error(e: llm_batch_core::Error) -> Error {
    Error { code: PgSqlErrorCode::ERRCODE_FDW_INVALID_ATTRIBUTE_VALUE, ..Error::from(e) }
}

/// An option's value among `name=value`.
fn find(options: &[Option<String>], name: &str) -> Option<String> {
    options.iter().flatten().find_map(|o| o.split_once('=').filter(|(n, _)| *n == name).map(|(_, v)| v.to_owned()))
}

/// A boolean, as other wrappers write it.
fn boolean(name: &str, value: &str) -> Result<bool> {
    match value.to_ascii_lowercase().as_str() {
        "true" | "on" => Ok(true),
        "false" | "off" => Ok(false),
        _ => Err(bad_value(format!("invalid value for option \"{name}\": \"{value}\""))
            .hint("Valid values are: true, false.")),
    }
}

/// All options of a server come to the validator when one is changed: nobody else changes a server that has this one.
fn check_superuser(option: &str) -> Result<()> {
    // SAFETY: a catalog lookup on the main thread inside a transaction.
    if unsafe { pg_sys::superuser() } {
        return Ok(());
    }
    Err(Error::denied(format!("permission denied to use option \"{option}\""))
        .detail("Only a superuser may set it, or change a server that has it.")
        .hint(format!("A server without it can be changed: ALTER SERVER … OPTIONS (DROP {option}, …).")))
}

/// Reads the option that says which tokens count against the provider's limit.
fn counts(value: &str) -> Result<Counts> {
    serde_json::from_value(value.into()).map_err(|_| {
        bad_value(format!("invalid value for option \"counts\": \"{value}\"")).hint(
            "Valid values are: used (what a request took), reserved (the prompt and the cap of the answer), larger (the \
             larger of the two).",
        )
    })
}

/// Returns true if a key can be sent in a header.
fn is_header(key: &str) -> bool {
    key.bytes().all(|b| (0x21..0x7f).contains(&b))
}

/// A server of a name, with its name.
pub fn named(server: String) -> Result<(pg_sys::Oid, String)> {
    let oid = sql::one::<pg_sys::Oid>(
        "SELECT s.oid FROM pg_catalog.pg_foreign_server s WHERE s.srvname OPERATOR(pg_catalog.=) $1::pg_catalog.name",
        &[server.as_str().into()],
    )?;
    match oid {
        Some(oid) => Ok((oid, server)),
        None => Err(Error::unknown(format!("server \"{server}\" does not exist"))
            .hint("Create it with CREATE SERVER … FOREIGN DATA WRAPPER llm_provider.")),
    }
}

/// The dialect of a server.
pub fn api_of(oid: pg_sys::Oid) -> Result<Api> {
    let name = sql::one::<String>(
        "SELECT o.option_value
           FROM pg_catalog.pg_foreign_server s, pg_catalog.pg_options_to_table(s.srvoptions) o
          WHERE s.oid OPERATOR(pg_catalog.=) $1 AND o.option_name OPERATOR(pg_catalog.=) 'api'",
        &[oid.into()],
    )?;
    name.map_or(Ok(Api::default()), |name| api(&name))
}

/// The endpoint of a server for a role: USAGE, the allowed hosts and the key are looked at anew each time.
pub fn endpoint(oid: pg_sys::Oid, role: pg_sys::Oid) -> Result<Endpoint> {
    let found = sql::row(
        "SELECT s.srvname::pg_catalog.text, s.srvowner, w.fdwname::pg_catalog.text, pg_catalog.has_server_privilege($2, s.oid, 'USAGE'),
                ARRAY(SELECT pg_catalog.concat(o.option_name, '=', o.option_value) FROM pg_catalog.pg_options_to_table(s.srvoptions) o)
           FROM pg_catalog.pg_foreign_server s
           JOIN pg_catalog.pg_foreign_data_wrapper w ON w.oid OPERATOR(pg_catalog.=) s.srvfdw
          WHERE s.oid OPERATOR(pg_catalog.=) $1",
        &[oid.into(), role.into()],
        |row| {
            Ok((
                row.get::<String>(1)?,
                row.get::<pg_sys::Oid>(2)?,
                row.get::<String>(3)?,
                row.get::<bool>(4)?,
                row.get::<Vec<Option<String>>>(5)?,
            ))
        },
    )?;
    let Some((server, owner, wrapper, usage, options)) = found else {
        return Err(Error::unknown(format!("server with OID {} does not exist", oid.to_u32())));
    };
    let server = server.as_str();
    if wrapper != "llm_provider" {
        return Err(Error::invalid(format!("server \"{server}\" is not a provider of language models"))
            .hint("Name a server of the foreign data wrapper llm_provider."));
    }
    if !usage {
        return Err(Error::denied(format!("permission denied for foreign server {server}")).hint(format!(
            "The owner of the server can grant it: GRANT USAGE ON FOREIGN SERVER {} TO …",
            sql::name(server)
        )));
    }
    let option = |name: &str| find(&options, name);
    let api = option("api").map_or(Ok(Api::default()), |name| api(&name))?;
    let dialect = api.dialect();
    let base_url = option("base_url")
        .or_else(|| dialect.base_url().map(str::to_owned))
        .ok_or_else(|| bad_value(format!("server \"{server}\" has no base_url")))?;
    // SAFETY: a catalog lookup on the main thread inside a transaction.
    let trusted = unsafe { pg_sys::superuser_arg(owner) };
    let allow_http = option("allow_http").map_or(Ok(false), |value| boolean("allow_http", &value))?;
    let ca_file = option("ca_file");
    if !trusted {
        // The server may have had another owner when they were set.
        check_unset(server, &[("allow_http", allow_http), ("ca_file", ca_file.is_some())])?;
    }
    let target = url::parse(&base_url, allow_http).map_err(url_error)?;
    if !trusted {
        check_host(server, &target)?;
    }
    let key = match mapped_key(oid, role)? {
        Some(key) => Some(key),
        None => match option("api_key_file") {
            Some(_) if !trusted => {
                return Err(Error::denied(format!("server \"{server}\" is not allowed to read a key from a file"))
                    .detail("Only servers that a superuser owns can use api_key_file.")
                    .hint("Set the key with CREATE USER MAPPING … OPTIONS (api_key '…')."));
            }
            Some(path) => Some(key_from_file(server, &path)?),
            None => None,
        },
    };
    if let Some(path) = &ca_file {
        check_ca_file(server, path)?;
    }
    let counts = option("counts").map_or(Ok(dialect.counts()), |value| counts(&value))?;
    // Servers with one account share its limits and its troubles: no role can join the account of another one.
    let account = option("account").map(|a| if trusted { a } else { format!("{a} (of role {})", owner.to_u32()) });
    Ok(Endpoint {
        api,
        api_version: option("api_version"),
        base_url,
        is_trusted: trusted,
        allow_http,
        ca_file,
        account,
        api_key: key.map(Secret),
        counts,
    })
}

/// Refuses options that count only where a superuser owns the server.
fn check_unset(server: &str, options: &[(&str, bool)]) -> Result<()> {
    match options.iter().find(|(_, is_set)| *is_set) {
        None => Ok(()),
        Some((option, _)) => Err(Error::denied(format!("server \"{server}\" may not have option \"{option}\""))
            .detail("Only the servers of superusers may.")
            .hint(format!(
                "Give the server to a superuser, or drop the option: ALTER SERVER {} OPTIONS (DROP {option}).",
                sql::name(server)
            ))),
    }
}

/// Here as well as where connections are made, so that a mistake shows at once.
fn check_ca_file(server: &str, path: &str) -> Result<()> {
    files::check_ca(path).map_err(|why| {
        Error::new(PgSqlErrorCode::ERRCODE_UNDEFINED_FILE, format!("could not use ca_file of server \"{server}\""))
            .detail(format!("File \"{path}\": {why}."))
            .hint(
                "ca_file must name a file of certificates in PEM form that the server's operating system user can read.",
            )
    })
}

/// Checks that a server which a superuser does not own may reach a host. The gateway checks the addresses of its name.
fn check_host(server: &str, target: &url::Target) -> Result<()> {
    let denied = |detail: &str| {
        Error::denied(format!("host \"{}\" of server \"{server}\" is not allowed", target.host)).detail(detail)
    };
    if target.address().is_some_and(url::is_reserved) {
        return Err(denied(
            "Servers that a superuser does not own cannot reach link-local, multicast or metadata addresses.",
        )
        .hint("A server that a superuser owns can reach it."));
    }
    if !target.is_listed(&settings::allowed_hosts()) {
        return Err(denied(
            "Servers that a superuser does not own can reach only the hosts in llm_batch.allowed_hosts.",
        )
        .hint("A superuser can add the host to llm_batch.allowed_hosts."));
    }
    Ok(())
}

/// Read anew for each use: a key that was changed holds from the next request on.
fn key_from_file(server: &str, path: &str) -> Result<String> {
    let fail = |why: String| {
        Error::new(PgSqlErrorCode::ERRCODE_UNDEFINED_FILE, format!("could not read the API key of server \"{server}\""))
            .detail(format!("File \"{path}\": {why}."))
            .hint("api_key_file must name a file of one line that the server's operating system user can read.")
    };
    let bytes = files::read(path, MOST_KEY).map_err(fail)?;
    let text = String::from_utf8(bytes).unwrap_or_default();
    let key = text.trim();
    if key.is_empty() || !is_header(key) {
        return Err(fail("it does not contain a valid key".into()));
    }
    Ok(key.to_owned())
}

/// The key of a role's user mapping, or of the one for PUBLIC.
fn mapped_key(server: pg_sys::Oid, role: pg_sys::Oid) -> Result<Option<String>> {
    // SAFETY: syscache lookups and GetUserMapping on the main thread inside a transaction. GetUserMapping raises if
    // there is no mapping, so that is asked first. Its list holds DefElem nodes with string values.
    unsafe {
        let exists = |user: pg_sys::Oid| {
            pg_sys::SearchSysCacheExists(
                pg_sys::SysCacheIdentifier::USERMAPPINGUSERSERVER as i32,
                pg_sys::Datum::from(user),
                pg_sys::Datum::from(server),
                pg_sys::Datum::from(0),
                pg_sys::Datum::from(0),
            )
        };
        if !exists(role) && !exists(pg_sys::InvalidOid) {
            return Ok(None);
        }
        let mapping = pg_sys::GetUserMapping(role, server);
        for element in PgList::<pg_sys::DefElem>::from_pg((*mapping).options).iter_ptr() {
            if std::ffi::CStr::from_ptr((*element).defname) == c"api_key" {
                let value = pg_sys::defGetString(element);
                return Ok(Some(std::ffi::CStr::from_ptr(value).to_string_lossy().into_owned()));
            }
        }
    }
    Ok(None)
}
