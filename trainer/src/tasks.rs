//! Generated tasks with checkable answers, for examples and benchmarks. Every question of a task is different, so held-out ones are truly held out.

use serde_json::{Value, json};

use crate::rng::{Purpose, Stream};

/// Which task. A model of 135 million parameters half knows both: it must now and then be right, or there is nothing to learn from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// Sums of one- and two-digit numbers: "What is 12 plus 7?" Graded by the last number, so that the model may talk.
    Arithmetic,
    /// Tiny word problems after two that are answered, whose answer must be the number and nothing else: it is the form that is to be learnt. Half the reward is for a bare
    /// number, half for the right one.
    OnlyNumber,
}

/// Questions to train on and others to test with.
#[derive(Debug, Clone, PartialEq)]
pub struct Split {
    /// To learn from.
    pub train: Vec<Value>,
    /// Held out.
    pub validation: Vec<Value>,
}

impl Task {
    /// All tasks, by name.
    pub const ALL: [(&'static str, Self); 2] = [("arithmetic", Self::Arithmetic), ("only-number", Self::OnlyNumber)];

    /// The grader's description for this task.
    pub fn grader(self) -> Value {
        match self {
            Self::Arithmetic => json!({"type": "number", "reference": "{{item.answer}}"}),
            Self::OnlyNumber => json!({
                "type": "multi",
                "graders": {
                    "form": {"type": "regex", "pattern": "^\\s*-?[0-9]+\\s*$"},
                    "answer": {"type": "number", "reference": "{{item.answer}}", "extract": "only"},
                },
                "calculate_output": "0.5 * form + 0.5 * answer",
            }),
        }
    }

    /// How many different questions there are.
    pub fn len(self) -> usize {
        match self {
            Self::Arithmetic => 30 * 30,
            Self::OnlyNumber => STORIES.len() * NAMES.len() * THINGS.len() * 9 * 9,
        }
    }

    /// Never.
    pub fn is_empty(self) -> bool {
        false
    }

    /// Draws items without repetition: `{"messages": [..], "answer": 19, "completion": "19"}`. The demonstration is the bare number for both tasks. None if the task has fewer questions than that.
    pub fn split(self, train: usize, validation: usize, seed: u64) -> Option<Split> {
        if train.checked_add(validation)? > self.len() {
            return None;
        }
        let order = Stream::new(seed, Purpose::Task, self as u64).permutation(self.len());
        let items: Vec<Value> = order[..train + validation].iter().map(|&index| self.item(index)).collect();
        Some(Split { train: items[..train].to_vec(), validation: items[train..].to_vec() })
    }

    fn item(self, index: usize) -> Value {
        let (question, answer) = match self {
            Self::Arithmetic => arithmetic(index),
            Self::OnlyNumber => story(index),
        };
        let turn = |role: &str, content: &str| json!({"role": role, "content": content});
        let mut messages = Vec::new();
        if self == Self::OnlyNumber {
            for (question, answer) in ANSWERED {
                messages.extend([turn("user", &format!("{question} {ONLY}")), turn("assistant", answer)]);
            }
        }
        messages.push(turn("user", &question));
        json!({"messages": messages, "answer": answer, "completion": answer.to_string()})
    }
}

fn arithmetic(index: usize) -> (String, i64) {
    let (a, b) = (index % 30 + 1, index / 30 % 30 + 1);
    (format!("What is {a} plus {b}?"), (a + b) as i64)
}

/// What every word problem ends with.
const ONLY: &str = "Answer with the number only.";
/// Word problems that come before the one to be answered.
const ANSWERED: [(&str, &str); 2] = [
    ("Kim has 3 pears and gets 2 more. How many pears does Kim have now?", "5"),
    ("Lea has 9 balls and gives 4 away. How many balls does Lea have left?", "5"),
];
const NAMES: [&str; 6] = ["Tom", "Ann", "Sam", "Mia", "Ben", "Eva"];
const THINGS: [&str; 6] = ["apples", "pens", "books", "coins", "cards", "shells"];
/// Name, thing, two numbers; how the second one changes the first.
const STORIES: [(&str, i64); 2] = [
    ("{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?", 1),
    ("{name} has {a} {thing} and gives {b} away. How many {thing} does {name} have left?", -1),
];

fn story(index: usize) -> (String, i64) {
    let mut rest = index;
    let mut next = |n: usize| {
        let digit = rest % n;
        rest /= n;
        digit
    };
    let (story, name, thing) = (STORIES[next(STORIES.len())], NAMES[next(NAMES.len())], THINGS[next(THINGS.len())]);
    let (a, b) = (next(9) as i64 + 2, next(9) as i64 + 1);
    let first = if story.1 < 0 { a + b } else { a };
    let text = story.0.replace("{name}", name).replace("{thing}", thing);
    let text = text.replace("{a}", &first.to_string()).replace("{b}", &b.to_string());
    (format!("{text} {ONLY}"), first + story.1 * b)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::{
        data::{ReadOptions, read_values},
        grader::{GradeCall, NoRemote, build},
    };

    #[test]
    fn questions_are_different_and_demonstrations_right() {
        for (name, task) in Task::ALL {
            let split = task.split(300, 100, 7).unwrap();
            let all: Vec<Value> = [split.train.clone(), split.validation.clone()].concat();
            let questions: HashSet<String> =
                all.iter().map(|item| item["messages"].as_array().unwrap().last().unwrap().to_string()).collect();
            assert_eq!(questions.len(), 400, "{name}");
            let grader = build(&task.grader(), &NoRemote).unwrap();
            let items = read_values(all, &ReadOptions { supervised: true, ..ReadOptions::default() }).unwrap();
            for item in &items {
                assert!(grader.check_item(&item.fields).is_ok());
                let call = GradeCall { item: &item.fields, output_text: item.completion.as_deref().unwrap() };
                assert_eq!(grader.grade(call).unwrap().reward, 1.0);
                assert!(item.fields["answer"].as_i64().unwrap() >= 0);
            }
            assert_eq!(task.split(300, 100, 7).unwrap(), split);
            assert_ne!(task.split(300, 100, 8).unwrap(), split);
            assert_eq!(task.split(task.len(), 1, 0), None);
            let whole = task.split(task.len(), 0, 0).unwrap().train;
            let questions: HashSet<String> =
                whole.iter().map(|item| item["messages"].as_array().unwrap().last().unwrap().to_string()).collect();
            assert_eq!(questions.len(), task.len(), "{name}");
        }
    }

    #[test]
    fn questions_read_well() {
        assert_eq!(arithmetic(11 + 30 * 6), ("What is 12 plus 7?".to_owned(), 19));
        assert_eq!(
            story(0).0,
            "Tom has 2 apples and gets 1 more. How many apples does Tom have now? Answer with the number only."
        );
    }
}
