//! A grader from its JSON.

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{
    ConnectRemote, Grader, json_schema::JsonSchemaGrader, length::LengthGrader, multi::MultiGrader,
    number::NumberGrader, pattern::RegexGrader, remote::RemoteSpec, similarity::SimilarityGrader,
    string_check::StringCheckGrader,
};
use crate::template::Template;

/// A grader's description that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{param}: {message}")]
pub struct GraderConfigError {
    /// Which field, from `grader` down.
    pub param: String,
    /// What is wrong with it.
    pub message: String,
}

impl GraderConfigError {
    pub(super) fn new(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: param.into(), message: message.into() }
    }
}

const KNOWN: &str = "number, string_check, regex, text_similarity, json_schema, length, multi, remote";

/// Builds a grader: `{"type": "number", "reference": "{{item.answer}}"}`. Unknown types and keys are refused. `remote` makes graders that live elsewhere.
pub fn build(spec: &Value, remote: &dyn ConnectRemote) -> Result<Box<dyn Grader>, GraderConfigError> {
    build_at("grader", spec, remote, true)
}

pub(super) fn build_at(
    at: &str,
    spec: &Value,
    remote: &dyn ConnectRemote,
    outermost: bool,
) -> Result<Box<dyn Grader>, GraderConfigError> {
    let Value::Object(object) = spec else {
        return Err(GraderConfigError::new(at, "must be an object"));
    };
    let kind_at = format!("{at}.type");
    let Some(kind) = object.get("type").and_then(Value::as_str) else {
        return Err(GraderConfigError::new(kind_at, format!("is missing or not a string; known are {KNOWN}")));
    };
    if object.get("name").is_some_and(|name| !name.is_string()) {
        return Err(GraderConfigError::new(format!("{at}.name"), "must be a string"));
    }
    let mut rest = object.clone();
    rest.retain(|key, _| key != "type" && key != "name");
    let rest = Value::Object(rest);
    Ok(match kind {
        "number" => Box::new(NumberGrader::new(at, read(at, rest)?)?),
        "string_check" => Box::new(read::<StringCheckGrader>(at, rest)?),
        "regex" => Box::new(RegexGrader::new(at, read(at, rest)?)?),
        "text_similarity" => Box::new(SimilarityGrader::new(at, read(at, rest)?)?),
        "json_schema" => Box::new(JsonSchemaGrader::new(at, read(at, rest)?)?),
        "length" => Box::new(LengthGrader::new(at, read(at, rest)?)?),
        "multi" if outermost => Box::new(MultiGrader::new(at, read(at, rest)?, remote)?),
        "multi" => return Err(GraderConfigError::new(kind_at, "a multi grader cannot hold another one")),
        "remote" => {
            let spec: RemoteSpec = read(at, rest)?;
            spec.check(at)?;
            remote.connect(&spec).map_err(|message| GraderConfigError::new(at, message))?
        }
        "python" | "score_model" | "label_model" | "endpoint" => {
            let message = format!("{kind} graders are not supported; known are {KNOWN} (remote calls your own code)");
            return Err(GraderConfigError::new(kind_at, message));
        }
        other => return Err(GraderConfigError::new(kind_at, format!("unknown: {other:?}; known are {KNOWN}"))),
    })
}

fn read<T: DeserializeOwned>(at: &str, value: Value) -> Result<T, GraderConfigError> {
    serde_json::from_value(value).map_err(|error| GraderConfigError::new(at, error.to_string()))
}

/// The `input` of most graders when it is not given.
pub(super) fn output_text() -> Template {
    Template::parse("{{sample.output_text}}").expect("this template is right")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::grader::NoRemote;

    #[test]
    fn every_mistake_names_its_param() {
        for (spec, want) in [
            (json!("number"), "grader: must be an object"),
            (json!({}), "grader.type: is missing"),
            (json!({"type": "exact"}), "grader.type: unknown: \"exact\"; known are number"),
            (json!({"type": "python", "source": "x"}), "grader.type: python graders are not supported"),
            (json!({"type": "score_model"}), "grader.type: score_model graders are not supported"),
            (json!({"type": "number", "name": 3, "reference": "1"}), "grader.name: must be a string"),
            (json!({"type": "number"}), "grader: missing field `reference`"),
            (json!({"type": "number", "reference": "{{item.a}}", "tolerence": 1}), "grader: unknown field `tolerence`"),
            (json!({"type": "number", "reference": "{{a}}"}), "grader: unknown name `a`"),
            (json!({"type": "number", "reference": "1", "tolerance": -1}), "grader.tolerance: must"),
            (json!({"type": "number", "reference": "1", "extract": "first"}), "grader: unknown variant `first`"),
            (json!({"type": "string_check", "reference": "1", "operation": "neq"}), "grader: unknown variant `neq`"),
            (json!({"type": "regex", "pattern": "("}), "grader.pattern: "),
            (json!({"type": "regex", "pattern": "(a{1000}){1000}"}), "grader.pattern: "),
            (
                json!({"type": "regex", "pattern": "a", "reference": "{{item.a}}"}),
                "grader.group: the pattern has no group 1",
            ),
            (json!({"type": "regex", "pattern": "x".repeat(5000)}), "grader.pattern: is longer than"),
            (
                json!({"type": "text_similarity", "reference": "1", "evaluation_metric": "cosine"}),
                "grader.evaluation_metric: cosine",
            ),
            (
                json!({"type": "text_similarity", "reference": "1", "evaluation_metric": "rouge_9"}),
                "grader: unknown variant `rouge_9`",
            ),
            (
                json!({"type": "text_similarity", "reference": "1", "evaluation_metric": "bleu", "pass_threshold": 2}),
                "grader.pass_threshold: must",
            ),
            (json!({"type": "json_schema", "schema": {"$ref": "#"}}), "grader.schema: `$ref` is not supported"),
            (
                json!({"type": "json_schema", "schema": {"properties": {"a": {"tipe": "string"}}}}),
                "grader.schema.properties.a: `tipe` is not supported",
            ),
            (json!({"type": "length", "unit": "words"}), "grader: give min, max or both"),
            (json!({"type": "length", "min": 9, "max": 3}), "grader.min: must be at most max"),
            (json!({"type": "multi", "graders": {}, "calculate_output": "1"}), "grader.graders: must hold"),
            (
                json!({"type": "multi", "graders": {"a": {"type": "multi"}}, "calculate_output": "a"}),
                "grader.graders.a.type: a multi grader cannot",
            ),
            (
                json!({"type": "multi", "graders": {"a": {"type": "number"}}, "calculate_output": "a"}),
                "grader.graders.a: missing field",
            ),
            (json!({"type": "remote", "url": "https://example.org/g"}), "grader: remote graders are not available"),
            (json!({"type": "remote", "url": "http://example.org/g"}), "grader.url: must begin with https://"),
            (json!({"type": "remote", "url": "https://example.org/g", "timeout_ms": 0}), "grader.timeout_ms: must"),
        ] {
            match build(&spec, &NoRemote) {
                Ok(_) => panic!("{spec} was taken"),
                Err(error) => assert!(error.to_string().starts_with(want), "{spec}: {error}"),
            }
        }
    }
}
