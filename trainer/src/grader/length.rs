//! The length grader: is the output as long as it should be?

use serde::Deserialize;
use serde_json::Value;

use super::{Grade, GradeCall, Grader, GraderConfigError, GraderError, config::output_text};
use crate::template::Template;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Unit {
    #[default]
    Characters,
    Words,
    Lines,
}

/// `{"type": "length", "unit": "words", "max": 20, "falloff": 10}`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LengthSpec {
    #[serde(default = "output_text")]
    input: Template,
    #[serde(default)]
    unit: Unit,
    min: Option<u64>,
    max: Option<u64>,
    #[serde(default)]
    falloff: u64,
}

/// 1 from `min` to `max`; outside it falls to 0 over `falloff` units (at once if that is 0).
pub(super) struct LengthGrader(LengthSpec);

impl LengthGrader {
    pub(super) fn new(at: &str, spec: LengthSpec) -> Result<Self, GraderConfigError> {
        match (spec.min, spec.max) {
            (None, None) => Err(GraderConfigError::new(at, "give min, max or both")),
            (Some(min), Some(max)) if min > max => {
                Err(GraderConfigError::new(format!("{at}.min"), "must be at most max"))
            }
            _ => Ok(Self(spec)),
        }
    }
}

impl Grader for LengthGrader {
    fn grade(&self, call: GradeCall<'_>) -> Result<Grade, GraderError> {
        let input = call.render(&self.0.input)?;
        let length = match self.0.unit {
            Unit::Characters => input.chars().count(),
            Unit::Words => input.split_whitespace().count(),
            Unit::Lines => input.lines().count(),
        } as u64;
        let below = self.0.min.map_or(0, |min| min.saturating_sub(length));
        let above = self.0.max.map_or(0, |max| length.saturating_sub(max));
        let beyond = below.max(above);
        Ok(match (beyond, self.0.falloff) {
            (0, _) => Grade::of(1.0),
            (_, 0) => Grade::of(0.0),
            (beyond, falloff) => Grade::of((1.0 - beyond as f64 / falloff as f64).max(0.0) as f32),
        })
    }

    fn check_item(&self, item: &Value) -> Result<(), String> {
        self.0.input.check(item, true).map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::grader::{NoRemote, build};

    #[test]
    fn lengths_fall_off() {
        for (spec, output, want) in [
            (json!({"type": "length", "max": 3}), "äöü", 1.0),
            (json!({"type": "length", "max": 3}), "abcd", 0.0),
            (json!({"type": "length", "unit": "words", "min": 2, "max": 3, "falloff": 4}), "a b c d", 0.75),
            (json!({"type": "length", "unit": "words", "min": 2, "max": 3, "falloff": 4}), "a", 0.75),
            (json!({"type": "length", "unit": "words", "max": 1, "falloff": 2}), "a b c d e f", 0.0),
            (json!({"type": "length", "unit": "lines", "min": 2}), "a\nb", 1.0),
        ] {
            let grade = build(&spec, &NoRemote).unwrap().grade(GradeCall { item: &json!({}), output_text: output });
            assert_eq!(grade.unwrap().reward, want, "{spec} {output:?}");
        }
    }
}
