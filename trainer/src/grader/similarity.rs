//! Text similarity: how close an output is to a reference, by the field's measures that need no model.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value;

use super::{Grade, GradeCall, Grader, GraderConfigError, GraderError, config::output_text};
use crate::template::{Scope, Template};

/// Both texts are compared up to so many characters (fuzzy_match, rouge_l: their time grows with the square).
const MAX_COMPARED: usize = 8192;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Metric {
    /// `2 * LCS / (a + b)` over characters (rapidfuzz's ratio).
    FuzzyMatch,
    /// Sentence BLEU-4 (Papineni et al. 2002), counts of two words and more smoothed by one (Lin & Och 2004).
    Bleu,
    /// The smaller of precision and recall over all 1 to 4 word sequences (arXiv 1609.08144).
    Gleu,
    /// F1 over words, pairs, ... (Lin 2004).
    #[serde(rename = "rouge_1")]
    Rouge1,
    #[serde(rename = "rouge_2")]
    Rouge2,
    #[serde(rename = "rouge_3")]
    Rouge3,
    #[serde(rename = "rouge_4")]
    Rouge4,
    #[serde(rename = "rouge_5")]
    Rouge5,
    /// F1 over the longest common subsequence of words.
    RougeL,
    /// Needs an embedding model.
    Cosine,
    /// Needs a dictionary.
    Meteor,
}

/// `{"type": "text_similarity", "reference": "{{item.answer}}", "evaluation_metric": "rouge_l"}`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SimilaritySpec {
    #[serde(default = "output_text")]
    input: Template,
    reference: Template,
    evaluation_metric: Metric,
    pass_threshold: Option<f32>,
}

/// The similarity, 0 to 1; with a `pass_threshold`, 1 from there on and 0 below.
pub(super) struct SimilarityGrader(SimilaritySpec);

impl SimilarityGrader {
    pub(super) fn new(at: &str, spec: SimilaritySpec) -> Result<Self, GraderConfigError> {
        let unsupported = match spec.evaluation_metric {
            Metric::Cosine => Some("cosine needs an embedding model and is not supported"),
            Metric::Meteor => Some("meteor needs a dictionary and is not supported"),
            _ => None,
        };
        if let Some(message) = unsupported {
            return Err(GraderConfigError::new(format!("{at}.evaluation_metric"), message));
        }
        if spec.pass_threshold.is_some_and(|threshold| !(0.0..=1.0).contains(&threshold)) {
            return Err(GraderConfigError::new(format!("{at}.pass_threshold"), "must be from 0 to 1"));
        }
        Ok(Self(spec))
    }
}

impl Grader for SimilarityGrader {
    fn grade(&self, call: GradeCall<'_>) -> Result<Grade, GraderError> {
        let (input, reference) = (call.render(&self.0.input)?, call.render(&self.0.reference)?);
        let similarity = similarity(self.0.evaluation_metric, &input, &reference) as f32;
        Ok(match self.0.pass_threshold {
            Some(threshold) => Grade::pass(similarity >= threshold),
            None => Grade::of(similarity),
        })
    }

    fn check_item(&self, item: &Value) -> Result<(), String> {
        self.0.input.check(item, true).map_err(|error| error.to_string())?;
        let scope = Scope { item, output_text: Some("") };
        let reference = self.0.reference.render(scope).map_err(|error| error.to_string())?;
        if !self.0.reference.uses_output() && reference.trim().is_empty() {
            return Err("the reference is empty".to_owned());
        }
        if reference.chars().count() > MAX_COMPARED {
            return Err(format!("the reference is longer than {MAX_COMPARED} characters"));
        }
        Ok(())
    }
}

fn similarity(metric: Metric, input: &str, reference: &str) -> f64 {
    if metric == Metric::FuzzyMatch {
        let characters = |text: &str| text.chars().take(MAX_COMPARED).collect::<Vec<char>>();
        let (a, b) = (characters(input), characters(reference));
        return if a.is_empty() && b.is_empty() {
            1.0
        } else {
            2.0 * ratio(common_subsequence(&a, &b), a.len() + b.len())
        };
    }
    let (a, b) = (words(input), words(reference));
    match metric {
        Metric::Bleu => bleu(&a, &b),
        Metric::Gleu => gleu(&a, &b),
        Metric::RougeL => f1(common_subsequence(&a, &b), a.len(), b.len()),
        Metric::Rouge1 => rouge(&a, &b, 1),
        Metric::Rouge2 => rouge(&a, &b, 2),
        Metric::Rouge3 => rouge(&a, &b, 3),
        Metric::Rouge4 => rouge(&a, &b, 4),
        Metric::Rouge5 => rouge(&a, &b, 5),
        Metric::FuzzyMatch | Metric::Cosine | Metric::Meteor => 0.0,
    }
}

/// Runs of letters and digits, in lower case.
fn words(text: &str) -> Vec<String> {
    let text: String = text.chars().take(MAX_COMPARED).collect();
    text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).map(str::to_lowercase).collect()
}

fn ratio(part: usize, whole: usize) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

fn f1(common: usize, a: usize, b: usize) -> f64 {
    2.0 * ratio(common, a + b)
}

/// How many n-word sequences two texts share, and how many each has.
fn overlap(a: &[String], b: &[String], n: usize) -> (usize, usize, usize) {
    let mut counts: HashMap<&[String], usize> = HashMap::new();
    b.windows(n).for_each(|sequence| *counts.entry(sequence).or_default() += 1);
    let mut common = 0;
    for sequence in a.windows(n) {
        if let Some(left) = counts.get_mut(sequence).filter(|left| **left > 0) {
            *left -= 1;
            common += 1;
        }
    }
    (common, (a.len() + 1).saturating_sub(n), (b.len() + 1).saturating_sub(n))
}

fn rouge(a: &[String], b: &[String], n: usize) -> f64 {
    let (common, in_a, in_b) = overlap(a, b, n);
    f1(common, in_a, in_b)
}

fn bleu(a: &[String], b: &[String]) -> f64 {
    let orders = a.len().min(4);
    let precision = |n: usize| {
        let (common, in_a, _) = overlap(a, b, n);
        let smooth = usize::from(n > 1);
        ratio(common + smooth, in_a + smooth)
    };
    if orders == 0 || precision(1) == 0.0 {
        return 0.0;
    }
    let mean = (1..=orders).map(|n| precision(n).ln()).sum::<f64>() / orders as f64;
    let brevity = (1.0 - b.len() as f64 / a.len() as f64).min(0.0);
    (mean + brevity).exp()
}

fn gleu(a: &[String], b: &[String]) -> f64 {
    let (mut common, mut in_a, mut in_b) = (0, 0, 0);
    for n in 1..=4 {
        let (shared, first, second) = overlap(a, b, n);
        common += shared;
        in_a += first;
        in_b += second;
    }
    ratio(common, in_a.max(in_b))
}

/// The length of the longest common subsequence, one row of the table at a time.
fn common_subsequence<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    let mut row = vec![0usize; b.len() + 1];
    for x in a {
        let mut diagonal = 0;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if x == y { diagonal + 1 } else { above.max(row[j]) };
            diagonal = above;
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::grader::{NoRemote, build};

    const METRICS: [Metric; 9] = [
        Metric::FuzzyMatch,
        Metric::Bleu,
        Metric::Gleu,
        Metric::Rouge1,
        Metric::Rouge2,
        Metric::Rouge3,
        Metric::Rouge4,
        Metric::Rouge5,
        Metric::RougeL,
    ];

    #[test]
    fn measures_worked_out_by_hand() {
        // words: the cat sat / the cat lay down
        for (metric, want) in [
            (Metric::Rouge1, 4.0 / 7.0),
            (Metric::Rouge2, 2.0 / 5.0),
            (Metric::Rouge3, 0.0),
            (Metric::RougeL, 4.0 / 7.0),
            // 1-grams 2/3, 2-grams (1 + 1)/(2 + 1), 3-grams (0 + 1)/(1 + 1); brevity exp(1 - 4/3)
            (Metric::Bleu, (2.0f64 / 3.0 * 2.0 / 3.0 * 0.5).powf(1.0 / 3.0) * (-1.0f64 / 3.0).exp()),
            // common 2 + 1, of 6 and 10 sequences
            (Metric::Gleu, 3.0 / 10.0),
        ] {
            let got = similarity(metric, "The cat sat.", "the cat lay down");
            assert!((got - want).abs() < 1e-12, "{metric:?} {got} {want}");
        }
        assert!((similarity(Metric::FuzzyMatch, "kitten", "sitting") - 8.0 / 13.0).abs() < 1e-12);
    }

    #[test]
    fn thresholds_make_it_pass_or_fail() {
        let item = json!({"answer": "the cat lay down"});
        let grade = |threshold: Option<f64>| {
            let mut spec =
                json!({"type": "text_similarity", "reference": "{{item.answer}}", "evaluation_metric": "rouge_1"});
            if let Some(threshold) = threshold {
                spec["pass_threshold"] = json!(threshold);
            }
            let grader = build(&spec, &NoRemote).unwrap();
            grader.grade(GradeCall { item: &item, output_text: "The cat sat" }).unwrap().reward
        };
        assert!((grade(None) - 4.0 / 7.0).abs() < 1e-6);
        assert_eq!((grade(Some(0.5)), grade(Some(0.6))), (1.0, 0.0));
        let grader = build(
            &json!({"type": "text_similarity", "reference": "{{item.a}}", "evaluation_metric": "bleu"}),
            &NoRemote,
        )
        .unwrap();
        assert!(grader.check_item(&json!({"a": " "})).unwrap_err().contains("empty"));
        assert!(grader.check_item(&json!({"a": "x".repeat(9000)})).unwrap_err().contains("longer"));
    }

    proptest! {
        #[test]
        fn similarities_are_from_zero_to_one_and_one_for_equals(a in "[a-c .]{0,20}", b in "[a-c .]{0,20}") {
            for metric in METRICS {
                let it = similarity(metric, &a, &b);
                prop_assert!((0.0..=1.0 + 1e-12).contains(&it), "{metric:?} {it}");
            }
            let long = format!("{a} v w x y z");
            for metric in METRICS {
                prop_assert!((similarity(metric, &long, &long) - 1.0).abs() < 1e-9, "{metric:?}");
            }
        }
    }
}
