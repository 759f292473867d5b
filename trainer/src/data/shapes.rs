//! Public datasets read as their authors publish them: GSM8K (question, answer with `#### n` at its end) and SVAMP (Body, Question, Answer).

use serde_json::Value;

use super::{Message, Prompt, Role};

/// What a known shape says.
pub(super) struct Known {
    pub(super) prompt: Prompt,
    pub(super) completion: String,
}

fn user(content: String) -> Prompt {
    Prompt::Messages(vec![Message { role: Role::User, content }])
}

/// Prompt and demonstration of an item in a known shape. The prompt is the question as a user's message. The demonstration of GSM8K is its worked answer without the calculator's marks (`<<48/2=24>>`), that of
/// SVAMP its number.
pub(super) fn read(item: &Value) -> Option<Known> {
    if let (Some(question), Some(answer)) = (item["question"].as_str(), item["answer"].as_str()) {
        return Some(Known { prompt: user(question.to_owned()), completion: without_calculator(answer) });
    }
    let (body, question) = (item["Body"].as_str()?.trim(), item["Question"].as_str()?.trim());
    let answer = item["Answer"].as_f64()?;
    let joint = if body.ends_with(['.', '?', '!', ',']) { " " } else { ". " };
    Some(Known { prompt: user(format!("{body}{joint}{question}")), completion: answer.to_string() })
}

/// The reference a number grader needs for items of a known shape, as a template.
pub fn default_reference(item: &Value) -> Option<&'static str> {
    read(item)?;
    Some(if item["answer"].is_string() { "{{item.answer}}" } else { "{{item.Answer}}" })
}

/// Is this an item of GSM8K or SVAMP as published?
pub fn is_known_shape(item: &Value) -> bool {
    read(item).is_some()
}

fn without_calculator(answer: &str) -> String {
    let mut text = String::with_capacity(answer.len());
    let mut rest = answer;
    while let Some((before, after)) = rest.split_once("<<") {
        text.push_str(before);
        match after.split_once(">>") {
            Some((_, after)) => rest = after,
            None => {
                text.push_str("<<");
                rest = after;
            }
        }
    }
    text + rest
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn calculator_marks_go_and_nothing_else() {
        for (answer, want) in [
            ("48/2 = <<48/2=24>>24 clips.\n#### 24", "48/2 = 24 clips.\n#### 24"),
            ("1 << 2 and no end", "1 << 2 and no end"),
            ("<<a>><<b>>", ""),
            ("", ""),
        ] {
            assert_eq!(without_calculator(answer), want);
        }
    }

    #[test]
    fn shapes_know_their_reference() {
        let gsm = json!({"question": "How many?", "answer": "#### 3"});
        let svamp = json!({"Body": "Tom has 3 pens", "Question": "How many?", "Answer": 3.0});
        assert_eq!(default_reference(&gsm), Some("{{item.answer}}"));
        assert_eq!(default_reference(&svamp), Some("{{item.Answer}}"));
        assert!(
            !is_known_shape(&json!({"question": "x"}))
                && !is_known_shape(&json!({"Body": 1, "Question": "", "Answer": 1}))
        );
        assert_eq!(read(&svamp).unwrap().completion, "3");
        assert_eq!(read(&svamp).unwrap().prompt, user("Tom has 3 pens. How many?".to_owned()));
    }
}
