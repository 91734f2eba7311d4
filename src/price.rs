//! Prices of a model: given by its owner, or taken from the list.

use llm_batch_core::url;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use crate::error::Result;
use crate::sql;

/// The columns of `llm_batch.model` that hold prices.
pub const COLUMNS: [&str; 3] = ["input_price", "output_price", "cached_input_price"];

/// The prices of the list for a model.
#[derive(Debug, Clone)]
pub struct Listed {
    /// The prices, in the order of [`COLUMNS`].
    pub prices: [Option<AnyNumeric>; 3],
    /// Their date.
    pub as_of: Date,
    /// The prices through the provider's batch interface, as a part of these; the larger part of the two.
    pub batch_share: Option<f64>,
}

/// Looks for the prices of a provider's model. A name with a date behind it is the model of the name before.
pub fn listed(base_url: &str, model: &str) -> Result<Option<Listed>> {
    let Ok(target) = url::parse(base_url, true) else { return Ok(None) };
    sql::row(
        "SELECT l.input_price, l.output_price, l.cached_input_price, l.as_of,
                GREATEST(l.batch_input_price OPERATOR(pg_catalog./) NULLIF(l.input_price, 0),
                         l.batch_output_price OPERATOR(pg_catalog./) NULLIF(l.output_price, 0))::pg_catalog.float8 AS batch_share
           FROM llm_batch.list_price l
          WHERE l.provider OPERATOR(pg_catalog.=) $1
            AND l.model OPERATOR(pg_catalog.=)
                ANY (ARRAY[$2, pg_catalog.regexp_replace($2, '[-@]20[0-9]{2}-?[0-9]{2}-?[0-9]{2}$', '')])
          ORDER BY l.model OPERATOR(pg_catalog.=) $2 DESC, l.is_own DESC LIMIT 1",
        &[target.host.as_str().into(), model.into()],
        |row| {
            Ok(Listed {
                prices: [row.maybe("input_price")?, row.maybe("output_price")?, row.maybe("cached_input_price")?],
                as_of: row.get("as_of")?,
                batch_share: row.maybe("batch_share")?,
            })
        },
    )
}

/// The discount (percent) of a provider's model at the tier "flex". There a token costs what it does through the batch
/// interface. None where the list does not know that: others than OpenAI and Gemini ask the whole price.
pub fn flex_discount(base_url: &str, model: &str) -> Result<u64> {
    let Some(Listed { batch_share: Some(share), .. }) = listed(base_url, model)? else { return Ok(0) };
    Ok((1.0 - share).mul_add(100.0, 1e-9).clamp(0.0, 100.0) as u64)
}

/// Says which prices a model has taken from the list, or that it has none.
pub fn tell(model: &str, listed: Option<&Listed>) {
    let (message, detail, hint) = match listed {
        Some(Listed { prices: [input, output, cached], as_of, .. }) => {
            let text = |price: &Option<AnyNumeric>| price.as_ref().map(ToString::to_string).unwrap_or_default();
            let cached = cached.as_ref().map(|price| format!(", {price} where cached")).unwrap_or_default();
            (
                format!("prices of \"{model}\" are taken from llm_batch.list_price"),
                format!(
                    "Per million tokens as of {as_of}: {} dollars for prompts{cached}, {} for answers.",
                    text(input),
                    text(output)
                ),
                "If you pay other prices, set input_price and output_price with llm_batch.alter_model().",
            )
        }
        None => (
            format!("no price of \"{model}\" is known"),
            "llm_batch.list_price has none for this model at the host of its server. Dollars are not counted, and it takes \
             no budget in dollars."
                .to_owned(),
            "Set input_price and output_price with llm_batch.alter_model() to count them.",
        ),
    };
    ErrorReport::new(PgSqlErrorCode::ERRCODE_SUCCESSFUL_COMPLETION, message, "pg_llm_batch")
        .set_detail(detail)
        .set_hint(hint)
        .report(PgLogLevel::NOTICE);
}
