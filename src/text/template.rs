//! The model's own chat template: Jinja, as transformers runs it.

use minijinja::{
    Environment, Error, ErrorKind, Value, context,
    syntax::SyntaxConfig,
    value::{Kwargs, Serde},
};
use serde::Serialize;

/// A render may take so many steps (one an instruction, one for each 64 bytes made): far above any real conversation, far below a second.
const FUEL: u64 = 10_000_000;
const NAME: &str = "chat_template";
/// Calls, blocks, brackets and prefixes within one another: each takes a piece of the stack, of which a thread has little.
const DEEPEST: usize = 60;

/// A template that cannot be compiled, or that refused these messages.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The model's files hold a broken template.
    #[error("the chat template does not compile: {0}")]
    Compile(String),
    /// The template called `raise_exception`, or the messages do not fit it.
    #[error("the chat template refused the messages: {0}")]
    Render(String),
}

/// A compiled chat template with the special tokens it may write.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// Compiles a template. `bos` and `eos` are the texts of the tokenizer's special tokens, empty where it has none.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self, TemplateError> {
        if is_too_deep(source) {
            return Err(TemplateError::Compile("it is nested too deeply".into()));
        }
        let mut environment = Environment::new();
        environment.set_recursion_limit(DEEPEST);
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| TemplateError::Compile(describe(&error)))?);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| strftime(&format, now()));
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(|error| TemplateError::Compile(describe(&error)))?;
        Ok(Self { environment, bos: bos.to_owned(), eos: eos.to_owned() })
    }

    /// The prompt for these messages. The template sees `messages`, `add_generation_prompt`, `bos_token`, `eos_token` and nothing else.
    pub fn render<M: Serialize>(&self, messages: &[M], add_generation_prompt: bool) -> Result<String, TemplateError> {
        let render = |error: Error| TemplateError::Render(describe(&error));
        let template = self.environment.get_template(NAME).map_err(render)?;
        let context = context! {
            messages => Value::from(Serde(messages)),
            add_generation_prompt,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
        };
        template.render(context).map_err(render)
    }
}

/// Roughly, and before the compiler sees it: brackets and blocks that are open at once, and prefixes (`not`, `-`) in a row.
fn is_too_deep(source: &str) -> bool {
    let (mut brackets, mut prefixes, mut blocks) = (0usize, 0usize, 0usize);
    for c in source.chars() {
        match c {
            '(' | '[' | '{' => brackets += 1,
            ')' | ']' | '}' => brackets = brackets.saturating_sub(1),
            _ => {}
        }
        prefixes = if c == '-' { prefixes + 1 } else { 0 };
        if brackets > DEEPEST || prefixes > 4 * DEEPEST {
            return true;
        }
    }
    for tag in source.split("{%").skip(1) {
        let word = tag.trim_start_matches(['-', '+', ' ', '\t', '\n', '\r']);
        if word.starts_with("end") {
            blocks = blocks.saturating_sub(1);
        } else if ["if", "for", "macro", "call", "filter", "with", "block"].iter().any(|name| word.starts_with(name)) {
            blocks += 1;
        }
        if blocks > DEEPEST {
            return true;
        }
    }
    let mut negations = 0;
    source.split_whitespace().any(|word| {
        negations = if word == "not" { negations + 1 } else { 0 };
        negations > DEEPEST
    })
}

/// The message without the template's name and line: those are of no use to a client.
fn describe(error: &Error) -> String {
    error.detail().map_or_else(|| error.kind().to_string(), str::to_owned)
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`, which is what transformers' `tojson` is. (Jinja's own also escapes HTML.)
fn to_json(value: Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let fail = |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
    let mut out = Vec::new();
    match indent {
        Some(indent) => {
            let spaces = vec![b' '; indent.min(16)];
            let formatter = serde_json::ser::PrettyFormatter::with_indent(&spaces);
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter)).map_err(fail)?;
        }
        None => {
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, PythonFormatter)).map_err(fail)?
        }
    }
    Ok(Value::from_safe_string(String::from_utf8_lossy(&out).into_owned()))
}

/// `", "` and `": "`, as Python separates by default.
struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The directives that chat templates use, in UTC and English.
fn strftime(format: &str, unix: u64) -> Result<String, Error> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, second) = (unix / 86_400, unix % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out += &year.to_string(),
            Some('y') => out += &format!("{:02}", year % 100),
            Some('m') => out += &format!("{month:02}"),
            Some('d') => out += &format!("{day:02}"),
            Some('B') => out += month_name,
            Some('b') => out += &month_name[..3],
            Some('A') => out += day_name,
            Some('a') => out += &day_name[..3],
            Some('H') => out += &format!("{hour:02}"),
            Some('M') => out += &format!("{minute:02}"),
            Some('S') => out += &format!("{second:02}"),
            Some('%') => out.push('%'),
            other => {
                let directive = other.map(String::from).unwrap_or_default();
                let message = format!("strftime_now: '%{directive}' is not supported");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        }
    }
    Ok(out)
}

/// Year, month and day of a number of days since 1970-01-01 (Howard Hinnant, "chrono-compatible low-level date algorithms").
fn civil(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (yoe + era * 400 + u64::from(month <= 2), month, doy - (153 * mp + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::types::fuzz::{cases, edits, spoil};

    fn fixture(path: &str) -> String {
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(path)).unwrap()
    }

    fn template(name: &str) -> ChatTemplate {
        ChatTemplate::new(&fixture(&format!("templates/{name}.jinja")), "<|begin_of_text|>", "<|im_end|>").unwrap()
    }

    #[test]
    fn smollm2_renders_what_transformers_renders() {
        let template = template("smollm2");
        let cases: Vec<serde_json::Value> = serde_json::from_str(&fixture("golden/smollm2.json")).unwrap();
        assert_eq!(cases.len(), 10);
        for case in cases {
            let rendered = template.render(&[json!({"role": "user", "content": case["user"]})], true).unwrap();
            assert_eq!(rendered, case["rendered"].as_str().unwrap());
        }
    }

    #[test]
    fn a_given_system_message_replaces_the_default_one() {
        let messages = [json!({"role": "system", "content": "Be brief."}), json!({"role": "user", "content": "Hi"})];
        let rendered = template("smollm2").render(&messages, false).unwrap();
        assert_eq!(rendered, "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n");
    }

    #[test]
    fn llama3_uses_the_date_and_trims() {
        let messages = [json!({"role": "user", "content": "  Hi \n"})];
        let rendered = template("llama3").render(&messages, true).unwrap();
        let today = strftime("%d %b %Y", now()).unwrap();
        let expected = format!(
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: {today}\n\n<|eot_id|>\
             <|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        );
        assert_eq!(rendered, expected);
    }

    #[test]
    fn qwen_runs_with_macros_methods_and_break() {
        let messages = [
            json!({"role": "user", "content": "1+1?"}),
            json!({"role": "assistant", "content": "<think>\nhm\n</think>\n\n2"}),
            json!({"role": "user", "content": "sure?"}),
        ];
        assert_eq!(
            template("qwen").render(&messages, true).unwrap(),
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n\
             <|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn a_template_may_refuse_and_cannot_run_for_ever() {
        let none: [serde_json::Value; 0] = [];
        let refuse = ChatTemplate::new("{{ raise_exception('roles must alternate') }}", "", "").unwrap();
        let words = "the chat template refused the messages: roles must alternate";
        assert_eq!(refuse.render(&none, true).unwrap_err().to_string(), words);
        let endless =
            ChatTemplate::new("{% for i in range(9999) %}{% for j in range(9999) %}x{% endfor %}{% endfor %}", "", "");
        assert!(matches!(endless.unwrap().render(&none, true), Err(TemplateError::Render(_))));
        assert!(matches!(ChatTemplate::new("{% if %}", "", ""), Err(TemplateError::Compile(_))));
    }

    /// What would take all memory or all of the stack ends in an error instead.
    #[test]
    fn templates_that_blow_up_are_refused() {
        let none: [serde_json::Value; 0] = [];
        let deep = |open: &str, close: &str| format!("{{{{ {}1{} }}}}", open.repeat(50_000), close.repeat(50_000));
        for source in [
            deep("(", ")"),
            deep("[", "]"),
            deep("not ", ""),
            deep("-", ""),
            "{% if true %}".repeat(50_000),
            "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".to_owned(),
            "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}"
                .to_owned(),
            "{{ 'x' * 9999999999 }}".to_owned(),
            "{{ range(9999999999999) | list }}".to_owned(),
        ] {
            let shown = source.chars().take(60).collect::<String>();
            let rendered = ChatTemplate::new(&source, "", "").and_then(|template| template.render(&none, true));
            assert!(rendered.is_err(), "{shown} gave {:?}", rendered.map(|text| text.len()));
        }
    }

    proptest! {
        #![proptest_config(cases(100))]

        /// The templates of real models, spoilt, over messages of any kind: a text or an error.
        #[test]
        fn fuzz_chat_templates(
            edits in edits(), which in 0usize..3, role in "user|assistant|system|tool|[a-z]{0,6}", content in "\\PC{0,40}", kind in 0u8..5
        ) {
            let source = fixture(&format!("templates/{}.jinja", ["llama3", "qwen", "smollm2"][which]));
            let source = String::from_utf8_lossy(&spoil(source.as_bytes(), &edits, usize::MAX)).into_owned();
            let content = match kind {
                0 => json!(content),
                1 => json!([{"type": "text", "text": content}]),
                2 => json!(null),
                3 => json!({"a": [content]}),
                _ => json!(17),
            };
            let messages = [json!({"role": role, "content": content}), json!({"role": "user", "content": "x"})];
            if let Ok(template) = ChatTemplate::new(&source, "<bos>", "<eos>") {
                let _ = template.render(&messages, true);
            }
        }
    }

    #[test]
    fn tojson_is_pythons() {
        let template =
            ChatTemplate::new("{{ messages | tojson }}|{{ messages[0] | tojson(indent=2) }}", "", "").unwrap();
        let rendered = template.render(&[json!({"a": "<é>", "b": [1, true, null]})], false).unwrap();
        assert_eq!(
            rendered,
            "[{\"a\": \"<é>\", \"b\": [1, true, null]}]|{\n  \"a\": \"<é>\",\n  \"b\": [\n    1,\n    true,\n    null\n  ]\n}"
        );
    }

    #[test]
    fn dates_are_right_across_leap_years() {
        let day = |unix| strftime("%A %d %B %Y %H:%M:%S", unix).unwrap();
        assert_eq!(day(0), "Thursday 01 January 1970 00:00:00");
        assert_eq!(day(951_782_400), "Tuesday 29 February 2000 00:00:00");
        assert_eq!(day(1_735_689_599), "Tuesday 31 December 2024 23:59:59");
        assert!(strftime("%Q", 0).is_err());
    }
}
