//! `mote bench` where it starts servers of its own. What it measures is not looked at, but for what cannot be otherwise.

use std::{
    path::Path,
    process::{Command, Output},
};

use serde_json::Value;

use crate::support::golden;

/// Runs `mote bench` on the tiny model, in a temporary folder of its own.
fn bench(words: &str, folder: &Path) -> Output {
    let model = golden("llama").join("model");
    Command::new(env!("CARGO_BIN_EXE_mote"))
        .args(["--log", "warn", "bench"])
        .args(words.split(' '))
        .args(["--device", "cpu", "--json", "report.json", "--model"])
        .arg(model)
        .current_dir(folder)
        .env("TMPDIR", folder)
        .output()
        .expect("mote runs")
}

/// The JSON report of a run that must succeed; nothing else stays behind.
fn report(words: &str) -> Value {
    let folder = tempfile::tempdir().expect("a folder");
    let Output { status, stdout, stderr } = bench(words, folder.path());
    assert!(status.success(), "{words}: {}", String::from_utf8_lossy(&stderr));
    assert!(!stdout.is_empty());
    let left: Vec<_> =
        folder.path().read_dir().expect("the folder").map(|entry| entry.expect("an entry").file_name()).collect();
    assert_eq!(left, ["report.json"], "{words} left more behind");
    let text = std::fs::read_to_string(folder.path().join("report.json")).expect("the report");
    serde_json::from_str(&text).expect("JSON")
}

fn list<'a>(report: &'a Value, key: &str) -> &'a [Value] {
    report[key].as_array().unwrap_or_else(|| panic!("no {key} in {report}"))
}

fn positive(value: &Value) -> bool {
    value.as_f64().is_some_and(|value| value > 0.0)
}

#[test]
fn a_served_load_is_measured_in_every_mode() {
    let report = report(
        "served --clients 1,3 --adapters 0,1,each --prompt-tokens 5 --max-tokens 6 --requests 2 --rounds 2 --streamed-rounds 1 --resident 1,40 --compare-rank 0",
    );
    let served = list(&report, "served");
    assert_eq!(served.len(), 6);
    for result in served {
        assert!(positive(&result["tokens_per_second"]["median"]) && positive(&result["ratio"]["median"]), "{result}");
        assert!(positive(&result["first_token_ms"]["p50"]), "{result}");
        assert!(result["between_tokens_ms"]["p99"].is_number(), "{result}");
    }
    assert_eq!(served[0]["ratio"]["median"], 1.0);
    assert_eq!((list(&report, "ranks").len(), list(&report, "resident").len()), (4, 2));
    assert_eq!(report["machine"]["debug_assertions"], cfg!(debug_assertions));
    if cfg!(target_os = "linux") {
        assert!(positive(&report["memory_mib"]["peak"]), "{report}");
        assert_eq!(list(&report, "resident_memory")[0]["adapters"], 40);
        assert!(report["machine"]["others_during"].is_number(), "{report}");
    }
}

#[test]
fn uploads_are_counted_under_the_sync_mode_that_was_asked_for() {
    let report = report("upload --sync full --singles 30 --connections 4 --batch 200 --rounds 1 --first-tokens 3");
    assert_eq!(report["flags"]["sync"], "full");
    assert!(list(&report, "uploads").iter().all(|result| positive(&result["uploads_per_second"]["median"])));
    assert_eq!(list(&report, "first_tokens").len(), 3);
}

#[test]
fn what_cannot_be_measured_says_why() {
    let folder = tempfile::tempdir().expect("a folder");
    for (words, said) in [
        ("served --rank 0", "--rank 0"),
        ("served --prompt-tokens 250 --max-tokens 100 --adapters 0 --clients 1", "answered 400"),
        ("decode --context 5000", "at most 256"),
        ("quality --ids nowhere.json", "nowhere.json"),
        ("profile --temperature nan", "--temperature"),
    ] {
        let Output { status, stderr, .. } = bench(words, folder.path());
        let stderr = String::from_utf8_lossy(&stderr);
        assert!(!status.success() && stderr.contains(said), "{words} said: {stderr}");
        assert!(!stderr.contains("panicked"), "{words} said: {stderr}");
    }
}
