//! Runs the scripts of `tests/sql` and holds what they print against `tests/expected`.
//! `UPDATE_EXPECTED=1 cargo test -p pg_llm_batch_e2e --test regress` writes it anew; read the difference before you
//! commit it.

use std::path::Path;

use pg_llm_batch_e2e::Cluster;

#[test]
fn scripts_print_what_is_expected() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests");
    let cluster = Cluster::builder("regress").start();
    let mut scripts: Vec<_> = std::fs::read_dir(root.join("sql")).unwrap().map(|e| e.unwrap().path()).collect();
    scripts.sort();
    assert!(!scripts.is_empty(), "no scripts in tests/sql");
    for script in scripts {
        let name = script.file_stem().unwrap().to_str().unwrap().to_owned();
        let output = cluster.psql("postgres", &std::fs::read_to_string(&script).unwrap());
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        let got = String::from_utf8(output.stdout).unwrap();
        let expected = root.join("expected").join(format!("{name}.out"));
        if std::env::var_os("UPDATE_EXPECTED").is_some() {
            std::fs::write(&expected, &got).unwrap();
        }
        let want = std::fs::read_to_string(&expected).unwrap_or_default();
        if let Some((n, (g, w))) = got.lines().zip(want.lines()).enumerate().find(|(_, (g, w))| g != w) {
            panic!("{name}, line {}:\n got      {g}\n expected {w}", n + 1);
        }
        assert_eq!(got.lines().count(), want.lines().count(), "{name}: another number of lines");
    }
}

/// Checks that the reference lists all of `surface.out`: functions, views with their columns, settings.
#[test]
fn the_reference_names_everything() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let reference = std::fs::read_to_string(root.join("docs/reference.md")).unwrap();
    let surface = std::fs::read_to_string(root.join("tests/expected/surface.out")).unwrap();
    let (mut part, mut missing, mut count) = ("", Vec::new(), 0);
    for line in surface.lines() {
        let (first, rest) = line.split_once('|').unwrap_or((line, ""));
        let names = match part {
            "-- functions" => vec![format!("{}(", first.split('(').next().unwrap_or_default())],
            "-- settings" => vec![format!("`{first}`")],
            "-- columns of the views" => std::iter::once(format!("`llm_batch.{first}`"))
                .chain(rest.split(", ").map(|column| format!("`{}`", column.split(' ').next().unwrap_or_default())))
                .collect(),
            _ => Vec::new(),
        };
        if line.starts_with("-- ") {
            part = line;
            continue;
        }
        count += names.len();
        missing.extend(names.into_iter().filter(|name| !reference.contains(name)));
    }
    assert!(count > 100, "only {count} names in surface.out");
    assert!(missing.is_empty(), "not in docs/reference.md: {missing:?}");
}
