//! `mote train`, `mote eval` and `mote task` as a user types them, over the tiny golden model.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::support::golden;

/// The program, in a folder of its own.
fn mote(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mote"));
    command.current_dir(folder).env("MOTE_CACHE_DIR", folder.join("cache")).stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn on_the_model(command: &mut Command) -> &mut Command {
    command.args(["--dtype", "f32", "--model"]).arg(golden("llama").join("model"))
}

fn succeeds(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).unwrap()
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Items whose reward varies even when the tokens are noise.
fn data(folder: &Path) -> PathBuf {
    let items: String = (0..16).map(|n| format!("{{\"prompt\": \"The {n} foxes\", \"answer\": \"e\"}}\n")).collect();
    let path = folder.join("items.jsonl");
    std::fs::write(&path, items).unwrap();
    path
}

const GRADER: &str = r#"{"type": "string_check", "reference": "{{item.answer}}", "operation": "like"}"#;

fn training<'a>(folder: &Path, command: &'a mut Command, steps: u32, out: &str) -> &'a mut Command {
    let data = data(folder);
    command.args(["train", "--grader", GRADER, "--seed", "3", "--out", out, "--data"]).arg(&data);
    command.arg("--validation").arg(&data).args(["--validation-limit", "6"]);
    for set in ["prompts_per_step=4", "samples_per_prompt=6", "max_completion_tokens=12", "learning_rate=0.1"] {
        command.args(["--set", set]);
    }
    command.args(["--set", &format!("steps={steps}"), "--set", "flat_reward_steps=0", "--set", "checkpoint_every=1"]);
    on_the_model(command)
}

#[test]
fn an_interrupted_training_goes_on_to_the_same_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let said = succeeds(training(folder.path(), &mut mote(folder.path()), 12, "a.bin"));
    assert!(said.contains("12 steps") && said.contains("base: greedy") && said.contains("gain:"), "{said}");
    let report = json(&folder.path().join("a.bin.json"));
    assert_eq!(report["curve"].as_array().unwrap().len(), 12);
    assert_eq!(
        (&report["numbers"], &report["steps"], &report["validation"]["zero"]["n"]),
        (&13.into(), &12.into(), &6.into())
    );
    assert!(std::fs::read_to_string(folder.path().join("a.bin.svg")).unwrap().contains("<polyline"));

    // Interrupted as soon as it has a checkpoint, killed some steps later, then left alone.
    let checkpoint = folder.path().join("b.bin.checkpoint");
    let steps_done = || -> u64 {
        let read = std::fs::read(&checkpoint).ok().and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
        read.map_or(0, |value| value["run"]["state"]["step"].as_u64().unwrap())
    };
    let mut interrupted = 0;
    for (signal, at) in [("INT", 1), ("KILL", 4)] {
        let mut child = training(folder.path(), &mut mote(folder.path()), 12, "b.bin").arg("--resume").spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while child.try_wait().unwrap().is_none() && steps_done() < at {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(1));
        }
        if child.try_wait().unwrap().is_none() {
            let pid = child.id().to_string();
            assert!(Command::new("kill").args([&format!("-{signal}"), &pid]).status().unwrap().success());
        }
        interrupted += u32::from(!child.wait().unwrap().success());
    }
    assert!(interrupted > 0, "it was always too fast");
    assert!(checkpoint.exists() || interrupted == 0);
    succeeds(training(folder.path(), &mut mote(folder.path()), 12, "b.bin").arg("--resume"));
    let bytes = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
    assert_eq!(bytes("a.bin"), bytes("b.bin"));
    assert_eq!(bytes("a.bin").len(), 26);
    assert!(bytes("a.bin").iter().any(|byte| *byte != 0), "it learnt something");
    let curve = |name: &str| -> Vec<Value> {
        let steps = json(&folder.path().join(name))["curve"].as_array().unwrap().clone();
        steps.into_iter().map(|step| step["reward_mean"].clone()).collect()
    };
    assert_eq!(curve("a.bin.json"), curve("b.bin.json"), "the whole curve is there");
    assert!(!checkpoint.exists(), "what it was for is done");

    // The adapter's scheme is found beside it.
    let mut command = mote(folder.path());
    command.args([
        "eval",
        "--adapter",
        "a.bin",
        "--grader",
        GRADER,
        "--csv",
        "all.csv",
        "--json",
        "eval.json",
        "--data",
        "items.jsonl",
    ]);
    command.args(["--set", "max_completion_tokens=12", "--seed", "3", "--limit", "6", "--samples", "2"]);
    let said = succeeds(on_the_model(&mut command));
    assert!(said.contains("adapter: greedy"), "{said}");
    let lines = std::fs::read_to_string(folder.path().join("all.csv")).unwrap();
    assert!(lines.starts_with("adapter,item,place,temperature,reward,tokens,finished,text\n"));
    let mut records = csv::Reader::from_reader(lines.as_bytes());
    assert_eq!(records.records().map(Result::unwrap).count(), 2 * 6 * 3);
    let results = json(&folder.path().join("eval.json"))["results"].clone();
    for part in ["zero", "adapter"] {
        assert_eq!(
            results[part]["reward"], report["validation"][part]["reward"],
            "{part}: as at the end of the training"
        );
    }
}

#[test]
fn mistakes_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let fails = |command: &mut Command| {
        let Output { status, stderr, .. } = command.output().unwrap();
        assert!(!status.success());
        String::from_utf8(stderr).unwrap()
    };
    let said = fails(training(folder.path(), &mut mote(folder.path()), 2, "a.bin").args(["--set", "learning_rat=1"]));
    assert!(said.contains("hyperparameters.learning_rat"), "{said}");
    let said = fails(training(folder.path(), &mut mote(folder.path()), 2, "a.bin").args(["--set", "steps"]));
    assert!(said.contains("--set steps"), "{said}");
    let said = fails(training(folder.path(), &mut mote(folder.path()), 2, "a.bin").args(["--scheme", "tiny14"]));
    assert!(said.contains("tiny14"), "{said}");
    std::fs::write(folder.path().join("short.bin"), [0; 25]).unwrap();
    let said = fails(training(folder.path(), &mut mote(folder.path()), 2, "a.bin").args(["--init", "short.bin"]));
    assert!(said.contains("25 bytes"), "{said}");
    std::fs::write(folder.path().join("broken.jsonl"), "{\"prompt\": \"a\", \"answer\": 1}\n{\"prompt\": 5}\n")
        .unwrap();
    let said = fails(training(folder.path(), &mut mote(folder.path()), 2, "a.bin").args(["--data", "broken.jsonl"]));
    assert!(said.contains("line 2"), "{said}");
    assert!(!folder.path().join("a.bin").exists());
    let said =
        fails(mote(folder.path()).args(["task", "arithmetic", "--out", "sums", "--train", "900", "--validation", "1"]));
    assert!(said.contains("900 different questions"), "{said}");
}

#[test]
fn a_made_up_task_can_be_read_back() {
    let folder = tempfile::tempdir().unwrap();
    for task in ["arithmetic", "only-number"] {
        succeeds(mote(folder.path()).args(["task", task, "--out", task, "--train", "20", "--validation", "10"]));
        let lines = std::fs::read_to_string(folder.path().join(task).join("train.jsonl")).unwrap();
        assert_eq!(lines.lines().count(), 20);
        assert!(json(&folder.path().join(task).join("grader.json"))["type"].is_string());
    }
}
