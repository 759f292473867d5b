//! Files that training reads and writes.

use std::path::{Path, PathBuf};

use mote_trainer::Method;
use serde_json::{Map, Value};

use crate::{app::AppError, config::DataArgs, service::training::LocalTask};

/// The contents of a file.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, AppError> {
    std::fs::read(path).map_err(|error| AppError::Io(path.display().to_string(), error))
}

/// Writes a file whole or not at all.
pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<(), AppError> {
    let failed = |error| AppError::Io(path.display().to_string(), error);
    let next = beside(path, "new");
    std::fs::write(&next, bytes).map_err(failed)?;
    std::fs::rename(&next, path).map_err(failed)
}

/// The same for JSON, a line.
pub(super) fn write_json(path: &Path, value: &Value) -> Result<(), AppError> {
    write(path, format!("{value}\n").as_bytes())
}

/// `alice.bin` and `json` make `alice.bin.json`.
pub(super) fn beside(path: &Path, extension: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(extension);
    name.into()
}

/// The scheme that was asked for, or else the one that stands beside an adapter's file.
pub(super) fn read_scheme(flag: Option<&str>, adapter: Option<&Path>) -> Result<Option<Value>, AppError> {
    if let Some(flag) = flag {
        return structured("--scheme", flag).map(Some);
    }
    let Some(path) = adapter.map(|path| beside(path, "json")).filter(|path| path.exists()) else { return Ok(None) };
    let value: Value = serde_json::from_slice(&read(&path)?)
        .map_err(|error| AppError::Train(format!("{}: not JSON: {error}", path.display())))?;
    Ok(value.get("scheme").cloned())
}

/// JSON if it looks like JSON, else the text itself: a template may begin with a name.
fn structured(flag: &str, text: &str) -> Result<Value, AppError> {
    let trimmed = text.trim_start();
    if trimmed.starts_with(['{', '[']) && !trimmed.starts_with("{{") {
        return serde_json::from_str(text).map_err(|error| AppError::Flag(format!("{flag}: not JSON: {error}")));
    }
    Ok(Value::String(text.to_owned()))
}

/// A grader: a type, JSON, or a file of it.
fn grader(text: &str) -> Result<Value, AppError> {
    match text.strip_prefix('@') {
        None => structured("--grader", text),
        Some(path) => {
            let bytes = read(Path::new(path))?;
            serde_json::from_slice(&bytes)
                .map_err(|error| AppError::Flag(format!("--grader @{path}: not JSON: {error}")))
        }
    }
}

/// `name=value` pairs as a JSON object; values are JSON if they can be read as such, else words.
fn hyperparameters(pairs: &[String]) -> Result<Value, AppError> {
    let mut all = Map::new();
    for pair in pairs {
        let Some((name, value)) = pair.split_once('=') else {
            return Err(AppError::Flag(format!("--set {pair}: write NAME=VALUE")));
        };
        let value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_owned()));
        all.insert(name.trim().to_owned(), value);
    }
    Ok(Value::Object(all))
}

/// What the flags of the data say.
pub(super) fn data_task(args: &DataArgs, method: Method, scheme: Option<Value>) -> Result<LocalTask, AppError> {
    Ok(LocalTask {
        method,
        scheme,
        prompt: args.prompt.as_deref().map(|text| structured("--prompt", text)).transpose()?,
        grader: args.grader.as_deref().map(grader).transpose()?,
        hyperparameters: hyperparameters(&args.set)?,
        seed: args.seed,
        training: read(&args.data)?,
        validation: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hyperparameters_are_read_as_json_or_words() {
        let pairs = ["steps=20", "learning_rate=0.03", "loss=dr_grpo", "mask_truncated=true"].map(str::to_owned);
        let want = serde_json::json!({"steps": 20, "learning_rate": 0.03, "loss": "dr_grpo", "mask_truncated": true});
        assert_eq!(hyperparameters(&pairs).unwrap(), want);
        assert!(hyperparameters(&["steps".to_owned()]).unwrap_err().to_string().contains("--set steps"));
    }

    #[test]
    fn templates_are_no_json() {
        let text = "{{item.question}} Answer:";
        assert_eq!(structured("--prompt", text).unwrap(), text);
        assert!(structured("--prompt", r#"[{"role": "user", "content": "x"}]"#).unwrap().is_array());
        assert!(structured("--prompt", "{nonsense").unwrap_err().to_string().contains("--prompt: not JSON"));
    }

    #[test]
    fn files_stand_beside_the_adapter() {
        assert_eq!(beside(Path::new("a/alice.bin"), "json"), Path::new("a/alice.bin.json"));
    }
}
