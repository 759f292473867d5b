//! Several graders and a formula over their scores.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::{
    ConnectRemote, Grade, GradeCall, Grader, GraderConfigError, GraderError,
    config::build_at,
    expression::{Expression, is_name},
};
use crate::policy::Stop;

const MAX_GRADERS: usize = 16;

/// `{"type": "multi", "graders": {"a": {..}, "b": {..}}, "calculate_output": "0.8 * a + 0.2 * b"}`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MultiSpec {
    graders: BTreeMap<String, Value>,
    calculate_output: String,
}

pub(super) struct MultiGrader {
    names: Vec<String>,
    graders: Vec<Box<dyn Grader>>,
    formula: Expression,
}

impl MultiGrader {
    pub(super) fn new(at: &str, spec: MultiSpec, remote: &dyn ConnectRemote) -> Result<Self, GraderConfigError> {
        let param = format!("{at}.graders");
        if spec.graders.is_empty() || spec.graders.len() > MAX_GRADERS {
            return Err(GraderConfigError::new(param, format!("must hold 1 to {MAX_GRADERS} graders")));
        }
        let (mut names, mut graders) = (Vec::new(), Vec::new());
        for (name, spec) in spec.graders {
            if !is_name(&name) {
                let message = format!("{name:?} is no name for a formula: letters, digits and _, no function's name");
                return Err(GraderConfigError::new(param, message));
            }
            graders.push(build_at(&format!("{param}.{name}"), &spec, remote, false)?);
            names.push(name);
        }
        let param = format!("{at}.calculate_output");
        let formula = Expression::parse(&spec.calculate_output, &names);
        let formula = formula.map_err(|message| GraderConfigError::new(&param, message))?;
        for score in [0.0, 1.0] {
            formula
                .evaluate(&vec![score; names.len()])
                .map_err(|message| GraderConfigError::new(&param, format!("with every score {score}: {message}")))?;
        }
        Ok(Self { names, graders, formula })
    }

    fn combine(&self, scores: &[f32]) -> Result<Grade, GraderError> {
        let values: Vec<f64> = scores.iter().map(|&score| f64::from(score)).collect();
        let reward = self.formula.evaluate(&values).map_err(GraderError::Failed)? as f32;
        Ok(Grade { reward, parts: self.names.iter().cloned().zip(scores.iter().copied()).collect() })
    }
}

impl Grader for MultiGrader {
    fn grade(&self, call: GradeCall<'_>) -> Result<Grade, GraderError> {
        let scores = self.graders.iter().map(|grader| Ok(grader.grade(call)?.reward)).collect::<Result<Vec<_>, _>>()?;
        self.combine(&scores)
    }

    fn grade_batch(&self, calls: &[GradeCall<'_>], stop: &Stop) -> Result<Vec<Grade>, (usize, GraderError)> {
        let columns =
            self.graders.iter().map(|grader| grader.grade_batch(calls, stop)).collect::<Result<Vec<_>, _>>()?;
        let row = |index: usize| {
            let scores: Vec<f32> = columns.iter().map(|column| column[index].reward).collect();
            self.combine(&scores).map_err(|error| (index, error))
        };
        (0..calls.len()).map(row).collect()
    }

    fn check_item(&self, item: &Value) -> Result<(), String> {
        for (name, grader) in self.names.iter().zip(&self.graders) {
            grader.check_item(item).map_err(|message| format!("{name}: {message}"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::grader::{NoRemote, build};

    fn spec(formula: &str) -> Value {
        json!({"type": "multi", "graders": {
            "right": {"type": "number", "reference": "{{item.a}}"},
            "short": {"type": "length", "max": 3, "falloff": 4},
        }, "calculate_output": formula})
    }

    #[test]
    fn scores_are_combined() {
        let item = json!({"a": 7});
        let grader = build(&spec("0.8 * right + 0.2 * short"), &NoRemote).unwrap();
        let calls: Vec<GradeCall<'_>> =
            ["7", "It: 7", "no"].iter().map(|text| GradeCall { item: &item, output_text: text }).collect();
        let batch = grader.grade_batch(&calls, &Stop::default()).unwrap();
        for (call, (grade, want)) in calls.iter().zip(batch.iter().zip([1.0, 0.9, 0.2])) {
            assert!((grade.reward - want).abs() < 1e-6, "{grade:?}");
            assert_eq!(&grader.grade(*call).unwrap(), grade);
        }
        assert_eq!(batch[1].parts, [("right".to_owned(), 1.0), ("short".to_owned(), 0.5)]);
        assert!(grader.check_item(&json!({"a": "x"})).unwrap_err().starts_with("right: "));
    }

    #[test]
    fn formulas_are_checked_before_a_job_starts() {
        for (formula, want) in [
            ("right + wrong", "unknown name `wrong`"),
            ("1 / short", "with every score 0"),
            ("log(short)", "with every score 0"),
            ("", "ends too early"),
        ] {
            match build(&spec(formula), &NoRemote) {
                Ok(_) => panic!("{formula} was taken"),
                Err(error) => assert!(error.message.contains(want), "{formula}: {error}"),
            }
        }
        let named =
            json!({"type": "multi", "graders": {"min": {"type": "length", "max": 1}}, "calculate_output": "min"});
        match build(&named, &NoRemote) {
            Ok(_) => panic!("a function's name was taken"),
            Err(error) => assert!(error.message.contains("no name for a formula")),
        }
        // A formula that only some scores break fails the job, never a reward.
        let grader = build(&spec("1 / (short - 0.5)"), &NoRemote).unwrap();
        let call = GradeCall { item: &json!({"a": 1}), output_text: "12345" };
        assert!(matches!(grader.grade(call), Err(GraderError::Failed(message)) if message.contains("not a finite")));
    }
}
