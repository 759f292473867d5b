//! The commands on a golden model, so that they cannot rot. What they measure is nobody's business here.

use clap::Parser;
use serde_json::Value;

use super::{forward, in_turn, profile, quality, report::Report};
use crate::config::{BenchCommand, Cli, Command};

fn command(words: &str) -> BenchCommand {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/golden/llama/model");
    let words = words.split(' ').chain(["--model", model, "--device", "cpu"]);
    let Command::Bench(args) = Cli::parse_from(["mote", "bench"].into_iter().chain(words)).command else {
        panic!("not a bench")
    };
    args.command
}

fn results<'a>(report: &'a Report, key: &str) -> &'a Vec<Value> {
    report.get(key).as_array().unwrap()
}

fn positive(value: &Value) -> bool {
    value.as_f64().is_some_and(|value| value > 0.0)
}

#[test]
fn decode_measures_every_combination() {
    let BenchCommand::Decode(args) =
        command("decode --batch 1,3 --context 5,20 --adapters none,each --steps 2 --rounds 2 --dtype f32")
    else {
        panic!("not decode")
    };
    let report = forward::decode(&args).unwrap();
    let results = results(&report, "results");
    assert_eq!(results.len(), 8);
    for result in results {
        assert_eq!(result["tokens_per_second"]["rounds"].as_array().unwrap().len(), 2, "{result}");
        assert!(positive(&result["tokens_per_second"]["median"]) && positive(&result["ratio_to_base"]), "{result}");
    }
    assert_eq!((&results[0]["adapters"], &results[0]["ratio_to_base"]), (&"base".into(), &1.0.into()));
}

#[test]
fn prefill_measures_every_length_and_refuses_what_the_context_does_not_hold() {
    let BenchCommand::Prefill(args) = command("prefill --tokens 3,40 --adapters none,1 --rounds 1") else {
        panic!("not prefill")
    };
    assert_eq!(results(&forward::prefill(&args).unwrap(), "results").len(), 4);
    let BenchCommand::Prefill(args) = command("prefill --tokens 300") else { panic!("not prefill") };
    assert!(forward::prefill(&args).unwrap_err().to_string().contains("256"));
}

#[test]
fn quality_finds_f32_equal_to_itself_and_the_others_near() {
    let folder = tempfile::tempdir().unwrap();
    let ids = folder.path().join("ids.json");
    let window = |from: u32| (0..24).map(|at| (from * 37 + at * 11) % 300).collect::<Vec<u32>>();
    std::fs::write(&ids, serde_json::json!({ "windows": [window(1), window(2)] }).to_string()).unwrap();
    let BenchCommand::Quality(args) = command(&format!("quality --ids {}", ids.display())) else {
        panic!("not quality")
    };
    let report = quality::run(&args).unwrap();
    let results = results(&report, "results");
    assert!(results.len() >= 3);
    assert_eq!(results[0]["precision"], "f32");
    assert_eq!((results[0]["kl_mean"].as_f64(), results[0]["top1_agreement"].as_f64()), (Some(0.0), Some(1.0)));
    let perplexity = results[0]["perplexity"].as_f64().unwrap();
    for other in &results[1..] {
        assert_eq!(other["positions"], 46);
        assert!(positive(&other["kl_mean"]) && other["kl_mean"].as_f64().unwrap() < 0.5, "{other}");
        assert!((other["perplexity"].as_f64().unwrap() / perplexity - 1.0).abs() < 0.2, "{other}");
    }
}

#[test]
fn quality_cuts_text_into_windows() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text.txt");
    std::fs::write(&text, "A fox sat by the river and waited. ".repeat(40)).unwrap();
    let line = format!("quality --precisions bf16 --windows 2 --text {}", text.display());
    let BenchCommand::Quality(args) = command(&line) else { panic!("not quality") };
    let report = quality::run(&args).unwrap();
    let names: Vec<&Value> = results(&report, "results").iter().map(|result| &result["precision"]).collect();
    assert_eq!(names, ["f32", "bf16"]);
    assert_eq!(results(&report, "results")[1]["positions"], 2 * 255);
}

#[test]
fn a_profile_names_the_parts_of_both_kinds_of_steps() {
    let line = "profile --batch 1,3 --prefill 40 --context 5 --steps 6 --prefill-chunk 16 --adapters each";
    let BenchCommand::Profile(args) = command(line) else { panic!("not profile") };
    // This model's six steps may be over before this thread, on a busy machine, has seen the first token.
    let report = (0..20).find_map(|_| profile::run(&args).ok()).unwrap();
    let results = results(&report, "results");
    assert_eq!(results.len(), 3);
    let phases: Vec<&str> = results.iter().map(|result| result["phase"].as_str().unwrap()).collect();
    assert_eq!(phases, ["decode", "decode", "prefill"]);
    for result in results {
        let parts = result["parts"].as_array().unwrap();
        let part = |name: &str| parts.iter().find(|part| part["part"] == name).unwrap();
        for name in ["begin", "embed", "qkv", "attention", "o", "gate_up", "down", "head", "read", "sample", "commit"] {
            assert!(positive(&part(name)["ms"]), "{name} of {result}");
        }
        assert!(positive(&result["named_share"]) && positive(&result["steps"]), "{result}");
    }
}

#[test]
fn every_case_has_every_place_and_follows_no_other_more_often_than_it_is_followed() {
    for cases in 1..7 {
        let rounds: Vec<Vec<usize>> = (0..2 * cases).map(|round| in_turn(cases, round).collect()).collect();
        let follows = |a, b| rounds.iter().filter(|order| order.windows(2).any(|pair| pair == [a, b])).count();
        for a in 0..cases {
            assert!((0..cases).all(|place| rounds.iter().filter(|order| order[place] == a).count() == 2));
            assert!((0..cases).all(|b| follows(a, b) == follows(b, a)), "{cases} cases");
        }
    }
}
