//! The regex grader. The `regex` crate finds one match in time linear in the text, the compiled pattern's size is bounded, and so is the work of looking for the last of many matches: a
//! stranger's pattern can neither hang nor fill the memory.

use regex::{Regex, RegexBuilder};
use serde::Deserialize;
use serde_json::Value;

use super::{Grade, GradeCall, Grader, GraderConfigError, GraderError, config::output_text};
use crate::template::Template;

const MAX_PATTERN: usize = 4096;
const MAX_COMPILED: usize = 1 << 20;
const MAX_NESTING: u32 = 64;
/// Matches times bytes of the text, at most, while the last match is looked for: each may be found only after the whole rest was read.
const MAX_LOOKED_AT: usize = 1 << 24;

/// `{"type": "regex", "pattern": "^\\d+$"}`: 1 if the pattern is found. With a `reference`, 1 if the last match's group `group` (1 by default), trimmed, equals the reference, trimmed.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RegexSpec {
    #[serde(default = "output_text")]
    input: Template,
    pattern: String,
    reference: Option<Template>,
    group: Option<usize>,
}

pub(super) struct RegexGrader {
    input: Template,
    pattern: Regex,
    reference: Option<(Template, usize)>,
}

impl RegexGrader {
    pub(super) fn new(at: &str, spec: RegexSpec) -> Result<Self, GraderConfigError> {
        let param = format!("{at}.pattern");
        if spec.pattern.len() > MAX_PATTERN {
            return Err(GraderConfigError::new(param, format!("is longer than {MAX_PATTERN} bytes")));
        }
        let mut builder = RegexBuilder::new(&spec.pattern);
        let pattern = builder.size_limit(MAX_COMPILED).dfa_size_limit(MAX_COMPILED).nest_limit(MAX_NESTING).build();
        let pattern = pattern.map_err(|error| GraderConfigError::new(param, error.to_string()))?;
        let group = spec.group.unwrap_or(1);
        if spec.reference.is_some() && group >= pattern.captures_len() {
            let message = format!("the pattern has no group {group}");
            return Err(GraderConfigError::new(format!("{at}.group"), message));
        }
        if spec.reference.is_none() && spec.group.is_some() {
            return Err(GraderConfigError::new(format!("{at}.group"), "means nothing without a reference"));
        }
        Ok(Self { input: spec.input, pattern, reference: spec.reference.map(|reference| (reference, group)) })
    }
}

impl Grader for RegexGrader {
    fn grade(&self, call: GradeCall<'_>) -> Result<Grade, GraderError> {
        let input = call.render(&self.input)?;
        let Some((reference, group)) = &self.reference else {
            return Ok(Grade::pass(self.pattern.is_match(&input)));
        };
        let reference = call.render(reference)?;
        let mut last = None;
        for (index, captures) in self.pattern.captures_iter(&input).enumerate() {
            if index.saturating_mul(input.len()) > MAX_LOOKED_AT {
                let message = format!("the pattern is found more than {index} times in {} bytes", input.len());
                return Err(GraderError::Failed(message));
            }
            last = captures.get(*group);
        }
        Ok(Grade::pass(last.is_some_and(|captured| captured.as_str().trim() == reference.trim())))
    }

    fn check_item(&self, item: &Value) -> Result<(), String> {
        let templates = [Some(&self.input), self.reference.as_ref().map(|(reference, _)| reference)];
        templates
            .into_iter()
            .flatten()
            .try_for_each(|template| template.check(item, true).map_err(|error| error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::grader::{NoRemote, build};

    #[test]
    fn patterns_match_or_capture() {
        let item = json!({"a": " B "});
        let grade = |spec: Value, output: &str| {
            build(&spec, &NoRemote).unwrap().grade(GradeCall { item: &item, output_text: output }).unwrap().reward
        };
        let shape = json!({"type": "regex", "pattern": r"^\d+$"});
        assert_eq!((grade(shape.clone(), "123"), grade(shape, "x 123")), (1.0, 0.0));
        let capture = json!({"type": "regex", "pattern": r"Answer: *(\w)", "reference": "{{item.a}}"});
        assert_eq!(grade(capture.clone(), "Answer: A. No, Answer: B."), 1.0);
        assert_eq!(grade(capture.clone(), "Answer: B. No, Answer: A."), 0.0);
        assert_eq!(grade(capture, "B"), 0.0);
        let optional = json!({"type": "regex", "pattern": "x(y)?", "reference": "{{item.a}}"});
        assert_eq!(grade(optional, "x"), 0.0);
    }

    #[test]
    fn the_last_of_many_matches_is_looked_for_within_bounds() {
        let spec = json!({"type": "regex", "pattern": ".*[^A-Z]|([A-Z])", "reference": "A"});
        let grader = build(&spec, &NoRemote).unwrap();
        let grade = |length: usize| {
            grader.grade(GradeCall { item: &json!({}), output_text: &"A".repeat(length) }).map(|grade| grade.reward)
        };
        assert_eq!(grade(4000).unwrap(), 1.0);
        assert!(grade(1 << 20).unwrap_err().to_string().contains("found more than 17 times in 1048576 bytes"));
    }

    #[test]
    fn evil_patterns_are_quick() {
        let spec = json!({"type": "regex", "pattern": "(a+)+$"});
        let grader = build(&spec, &NoRemote).unwrap();
        let text = "a".repeat(100_000) + "b";
        assert_eq!(grader.grade(GradeCall { item: &json!({}), output_text: &text }).unwrap().reward, 0.0);
    }
}
