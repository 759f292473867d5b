//! The shapes of fields that the service reads as plain JSON, for the OpenAPI document: schemes, graders, items, methods and templates of prompts.
#![expect(dead_code, reason = "they describe; the service and the trainer read the fields themselves")]

use std::collections::HashMap;

use serde::Serialize;
use utoipa::ToSchema;

/// A scheme's name, or its description. Unknown keys are refused.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub(super) enum Scheme {
    /// One of the named schemes.
    Name(SchemeName),
    /// In full.
    Full(SchemeDescription),
}

/// A named scheme; `GET /adapters/schemes` says how many numbers each has.
#[derive(Serialize, ToSchema)]
pub(super) enum SchemeName {
    /// PEFT's core and projections, rank 2, 13 groups of one number, seed 42: 26 bytes.
    #[serde(rename = "tiny13")]
    Tiny13,
    /// The same with one group of 13 numbers.
    #[serde(rename = "u13-tied")]
    U13Tied,
    /// The paper's core, 16 consecutive sites a group.
    #[serde(rename = "paper16")]
    Paper16,
}

/// A scheme in full; what is missing is as in `tiny13`.
#[derive(Serialize, ToSchema)]
pub(super) struct SchemeDescription {
    /// The formula of the core: `peft`, `paper` or `lora-xs`.
    #[schema(default = "peft")]
    convention: Option<String>,
    /// Singular triplets of a site that the core acts on.
    #[schema(minimum = 1, maximum = 256, default = 2)]
    rank: Option<u32>,
    /// Numbers a group.
    #[schema(minimum = 1, maximum = 4096, default = 1)]
    u: Option<u32>,
    /// Which sites share numbers.
    #[schema(default = json!({"kind": "groups", "count": 13}))]
    ties: Option<SchemeTies>,
    /// Of the random projections.
    #[schema(default = 42)]
    seed: Option<u64>,
    /// Adapted kinds of sites.
    #[schema(default = json!(["q", "k", "v", "o", "gate", "up", "down"]))]
    targets: Option<Vec<String>>,
    /// Precision of the projections: `f32` or `bf16`.
    #[schema(default = "f32")]
    projection: Option<String>,
}

/// Which sites share numbers.
#[derive(Serialize, ToSchema)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub(super) enum SchemeTies {
    /// So many groups of consecutive sites.
    Groups {
        /// How many.
        count: u64,
    },
    /// As many groups as PEFT makes of its `weight_tying`.
    Peft {
        /// 0 (no ties) to 1 (one group).
        weight_tying: f64,
    },
    /// Consecutive sites, whatever their kind.
    Tiled {
        /// Sites a group.
        n_tie: u64,
    },
    /// Consecutive layers of the same kind.
    Structured {
        /// Sites a group.
        n_tie: u64,
    },
}

/// A list of items, or a text of JSON lines, one item each.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub(super) enum Items {
    /// Items.
    #[schema(value_type = Vec<Object>)]
    List(Vec<serde_json::Value>),
    /// JSON lines.
    Lines(String),
}

/// A text with placeholders such as `{{item.question}}`, or a list of messages whose `content` is one.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub(super) enum PromptTemplate {
    /// Text to continue.
    Text(String),
    /// A conversation.
    Messages(Vec<MessageTemplate>),
}

/// A message of a template.
#[derive(Serialize, ToSchema)]
pub(super) struct MessageTemplate {
    /// `system`, `user` or `assistant`.
    role: String,
    /// Its text, with placeholders.
    content: String,
}

/// What gives a completion its reward. Unknown keys are refused. Every grader may have a `name`, which is only shown. Texts hold placeholders: `{{item.x}}` is a field of the item, `{{sample.output_text}}` the
/// completion.
#[derive(Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum Grader {
    /// 1 if the text's number is the reference's, else 0. Signs, `$`, thousands' commas, decimals and `%` are understood.
    Number {
        /// The text to grade.
        #[schema(default = "{{sample.output_text}}")]
        input: Option<String>,
        /// The right answer.
        #[schema(example = "{{item.answer}}")]
        reference: String,
        /// Where the answer stands: `auto` (after the last `####`, else in the last `\boxed{}`, else the last number), `last`, `hashes`, `boxed`, or `only` (nothing but the number).
        #[schema(default = "auto")]
        extract: Option<String>,
        /// How far the two may be apart.
        #[schema(minimum = 0, default = 0.0)]
        tolerance: Option<f64>,
    },
    /// 1 or 0, on the texts as they are.
    StringCheck {
        /// The text to grade.
        #[schema(default = "{{sample.output_text}}")]
        input: Option<String>,
        /// What it is compared with.
        reference: String,
        /// `eq`, `ne`, `like` (the text holds the reference), or `ilike` (whatever the case).
        #[schema(default = "eq")]
        operation: Option<String>,
    },
    /// 1 if the pattern is found, else 0; with a `reference`, 1 if a group of the last match is it.
    Regex {
        /// The text to grade.
        #[schema(default = "{{sample.output_text}}")]
        input: Option<String>,
        /// Without look-around and back-references.
        pattern: String,
        /// What the group must be.
        reference: Option<String>,
        /// The group's number. Only with `reference`.
        #[schema(minimum = 0, default = 1)]
        group: Option<u64>,
    },
    /// How alike two texts are, 0 to 1.
    TextSimilarity {
        /// The text to grade.
        #[schema(default = "{{sample.output_text}}")]
        input: Option<String>,
        /// What it is compared with.
        reference: String,
        /// `fuzzy_match`, `bleu`, `gleu`, `rouge_1` to `rouge_5`, or `rouge_l`.
        evaluation_metric: String,
        /// 1 from here on and 0 below, instead of the similarity itself.
        #[schema(minimum = 0, maximum = 1)]
        pass_threshold: Option<f64>,
    },
    /// 1 if the whole text is JSON that satisfies the schema, else 0.
    JsonSchema {
        /// The text to grade.
        #[schema(default = "{{sample.output_text}}")]
        input: Option<String>,
        /// JSON Schema without references.
        #[schema(value_type = Object)]
        schema: serde_json::Value,
    },
    /// 1 from `min` to `max`, of which one is needed; less outside.
    Length {
        /// The text to grade.
        #[schema(default = "{{sample.output_text}}")]
        input: Option<String>,
        /// `characters`, `words` or `lines`.
        #[schema(default = "characters")]
        unit: Option<String>,
        /// At least so many.
        min: Option<u64>,
        /// At most so many.
        max: Option<u64>,
        /// Over so many units the reward falls to 0; 0: at once.
        #[schema(default = 0)]
        falloff: Option<u64>,
    },
    /// A formula over other graders' rewards.
    Multi {
        /// By name, none of them `multi`.
        #[schema(value_type = HashMap<String, Object>)]
        graders: HashMap<String, serde_json::Value>,
        /// Of their names.
        #[schema(example = "0.8 * right + 0.2 * short")]
        calculate_output: String,
    },
    /// A service of yours, on a host that the server allows (`--grader-hosts`).
    Remote {
        /// Where completions are sent; https only.
        #[schema(example = "https://grader.example.org/grade")]
        url: String,
        /// How long one call may take, in milliseconds.
        #[schema(minimum = 1, maximum = 120_000, default = 10_000)]
        timeout_ms: Option<u64>,
        /// How often a failed call is tried again.
        #[schema(minimum = 0, maximum = 10, default = 2)]
        retries: Option<u32>,
    },
}

/// How a fine-tuning job learns. Beside OpenAI's hyperparameters (`n_epochs`, `batch_size`, `learning_rate_multiplier`, `compute_multiplier`) those of `/adapters/train` may be given.
#[derive(Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "lowercase")]
pub(super) enum FineTuningMethod {
    /// By demonstrations: `sft`.
    Supervised {
        /// How.
        supervised: Option<SupervisedMethod>,
    },
    /// By a grader's rewards: `grpo`.
    Reinforcement {
        /// How.
        reinforcement: Option<ReinforcementMethod>,
    },
}

/// Learning by demonstrations.
#[derive(Serialize, ToSchema)]
pub(super) struct SupervisedMethod {
    /// OpenAI's, or ours.
    #[schema(value_type = Option<Object>)]
    hyperparameters: Option<serde_json::Value>,
}

/// Learning by rewards.
#[derive(Serialize, ToSchema)]
pub(super) struct ReinforcementMethod {
    /// Required but for items of GSM8K and SVAMP.
    grader: Option<Grader>,
    /// OpenAI's, or ours.
    #[schema(value_type = Option<Object>)]
    hyperparameters: Option<serde_json::Value>,
}
