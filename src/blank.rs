//! Which texts there is something to ask about.

/// Returns true if there is something to ask about: white space alone is no text.
pub fn has_text(text: &str) -> bool {
    !text.trim().is_empty()
}

/// The white space of [`has_text()`], which is all that Unicode has.
const WHITE_SPACE: [&str; 25] = [
    " ", r"\n", r"\r", r"\t", r"\u000b", r"\f", r"\u0085", r"\u00a0", r"\u1680", r"\u2000", r"\u2001", r"\u2002",
    r"\u2003", r"\u2004", r"\u2005", r"\u2006", r"\u2007", r"\u2008", r"\u2009", r"\u200a", r"\u2028", r"\u2029",
    r"\u202f", r"\u205f", r"\u3000",
];
/// Texts that begin with a character from the first to before the second have text.
const VISIBLE: [(&str, Option<&str>); 4] =
    [("!", Some(r"\u0085")), (r"\u00a1", Some(r"\u1680")), (r"\u1681", Some(r"\u2000")), (r"\u3001", None)];

/// The same in SQL, of an expression, which is evaluated once. Nearly always the first character decides. Nothing here
/// raises for a damaged text, as what looks at whole characters does: comparing and replacing take it for bytes.
pub fn has_text_sql(expression: &str) -> String {
    let text = r#"("llm_batch q".t COLLATE pg_catalog."C")"#;
    let begins = VISIBLE.map(|(first, end)| {
        let below = end.map_or(String::new(), |end| format!(" AND {text} OPERATOR(pg_catalog.<) E'{end}'"));
        format!("{text} OPERATOR(pg_catalog.>=) E'{first}'{below}")
    });
    let rest = WHITE_SPACE.iter().fold(text.to_owned(), |rest, c| format!("pg_catalog.replace({rest}, E'{c}', '')"));
    format!(
        "(SELECT COALESCE({} OR pg_catalog.octet_length({rest}) OPERATOR(pg_catalog.>) 0, false)
            FROM (SELECT {expression} AS t OFFSET 0) \"llm_batch q\")",
        begins.join(" OR ")
    )
}
