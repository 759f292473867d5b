//! The rooms of the house: who may import whom (ARCHITECTURE.md has the table).

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// What each room may name after `crate::`, besides itself, `types`, `config` and `telemetry`.
const ALLOWED: &[(&str, &[&str])] = &[
    ("app", &["http", "service", "tenant", "store", "text", "engine", "model", "adapter", "kernel"]),
    ("http", &["service", "tenant"]),
    ("service", &["engine", "adapter", "text", "store", "tenant"]),
    ("engine", &["model", "adapter", "kernel"]),
    ("model", &["kernel", "adapter"]),
    ("adapter", &["kernel"]),
    ("store", &["tenant"]),
    ("tenant", &[]),
    ("text", &[]),
    ("types", &[]),
    ("config", &[]),
    ("telemetry", &[]),
];
const EVERYWHERE: [&str; 3] = ["types", "config", "telemetry"];

#[test]
fn imports_follow_the_table() {
    let allowed: BTreeMap<&str, BTreeSet<&str>> =
        ALLOWED.iter().map(|(room, others)| (*room, others.iter().copied().collect())).collect();
    let mut wrong = Vec::new();
    for (file, room) in sources() {
        let Some(may) = allowed.get(room.as_str()) else {
            wrong.push(format!("{}: room '{room}' is not in the table", file.display()));
            continue;
        };
        for named in rooms_named(&fs::read_to_string(&file).expect("a readable source file")) {
            if named != room && !EVERYWHERE.contains(&named.as_str()) && !may.contains(named.as_str()) {
                wrong.push(format!("{}: {room} may not import {named}", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn status_codes_live_in_http_and_unsafe_nowhere_but_in_the_kernel_crate() {
    for (file, room) in sources() {
        let text = fs::read_to_string(&file).expect("a readable source file");
        assert!(room == "http" || !text.contains("StatusCode"), "{} names StatusCode", file.display());
        assert!(!text.contains("unsafe_code"), "{} allows unsafe code", file.display());
        // As `crate::kernel` it is in the table; under its own name only for `TokenId`, which everybody may name.
        assert!(room == "types" || !text.contains("mote_kernel::"), "{} goes around the table", file.display());
    }
}

/// Every source file below src/ with its room; main.rs and lib.rs stand outside the table.
fn sources() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a readable folder") {
            let path = entry.expect("a folder entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let below = path.strip_prefix(&root).expect("below src").to_string_lossy().into_owned();
                let room = below.split('/').next().expect("a first part").trim_end_matches(".rs").to_owned();
                if room != "main" && room != "lib" {
                    found.push((path, room));
                }
            }
        }
    }
    assert!(found.len() > 20, "the walk found only {} files", found.len());
    found
}

/// The rooms after `crate::`, also in `use crate::{a::X, b::{Y, Z}}`.
fn rooms_named(text: &str) -> BTreeSet<String> {
    let mut rooms = BTreeSet::new();
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        if let Some(list) = rest.strip_prefix('{') {
            let mut depth = 0;
            let mut item = String::new();
            for c in list.chars() {
                match c {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => rooms.extend(first_name(&std::mem::take(&mut item))),
                    _ if depth == 0 => item.push(c),
                    _ => {}
                }
            }
            rooms.extend(first_name(&item));
        } else {
            rooms.extend(first_name(rest));
        }
    }
    rooms
}

fn first_name(path: &str) -> Option<String> {
    let name: String = path.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    (!name.is_empty() && name.chars().all(|c| c.is_lowercase() || c == '_')).then_some(name)
}

#[test]
fn the_import_reader_reads_nested_lists() {
    let rooms = rooms_named(
        "use crate::{\n    kernel::{Cores, weight::Weight},\n    types::TokenId,\n};\nlet x = crate::model::f();\n// crate::http\n",
    );
    assert_eq!(rooms.into_iter().collect::<Vec<_>>(), ["kernel", "model", "types"]);
}
