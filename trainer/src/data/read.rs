//! Reading a dataset: JSONL, or one JSON list; each item checked, each mistake with its line and field.

use std::{cell::Cell, sync::Arc};

use serde_json::{Map, Value};

use super::{
    DataError, DataErrors, Item, Message, Place, Prompt, PromptTemplate, Role, collect,
    item::{WrittenMessage, optional_text, read_messages},
    list, shapes,
};

/// How much data is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a file.
    pub bytes: usize,
    /// Bytes of a line.
    pub line_bytes: usize,
    /// Items.
    pub items: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: 256 << 20, line_bytes: 1 << 20, items: 100_000 }
    }
}

/// How items are read.
#[derive(Debug, Clone, Copy, Default)]
pub struct ReadOptions<'a> {
    /// Must every item have a demonstration (sft)?
    pub supervised: bool,
    /// The prompt of items without `messages`.
    pub prompt: Option<&'a PromptTemplate>,
    /// How much is taken.
    pub limits: Limits,
}

/// Reads a file: JSONL (empty lines are skipped), or one JSON list of objects.
pub fn read_bytes(data: &[u8], options: &ReadOptions<'_>) -> Result<Vec<Item>, DataErrors> {
    if data.len() > options.limits.bytes {
        let message = format!("holds {} bytes; at most {} are taken", data.len(), options.limits.bytes);
        return Err(DataErrors::one(Place::All, None, message));
    }
    let data = data.strip_prefix(b"\xef\xbb\xbf").unwrap_or(data);
    if data.trim_ascii_start().starts_with(b"[") {
        let pieces = list::split(data).map_err(|line| {
            DataErrors::one(Place::Line(line), None, "is not JSON: the list does not end, or not with the data")
        })?;
        return read_pieces(
            pieces.into_iter().enumerate().map(|(index, piece)| (Place::Item(index + 1), piece)),
            options,
        );
    }
    let lines = data.split(|&byte| byte == b'\n').enumerate().filter(|(_, line)| !line.trim_ascii().is_empty());
    read_pieces(lines.map(|(index, line)| (Place::Line(index + 1), line)), options)
}

/// Reads pieces of JSON, an object each.
fn read_pieces<'a>(
    pieces: impl Iterator<Item = (Place, &'a [u8])>,
    options: &ReadOptions<'_>,
) -> Result<Vec<Item>, DataErrors> {
    let most = options.limits.line_bytes;
    let taken = Taken::new(options.limits);
    let items = collect(pieces.take_while(|_| !taken.is_full()), |(place, piece)| {
        if piece.len() > most {
            let whole = if matches!(place, Place::Line(_)) { "a line" } else { "an item" };
            let message = format!("holds {} bytes; {whole} has at most {most}", piece.len());
            return Err(DataError::new(place, None, message));
        }
        let value = serde_json::from_slice(piece).map_err(|error| {
            DataError::new(place, None, format!("is not JSON: {}", without_line(&error.to_string())))
        })?;
        read_item(value, place, options, &taken)
    })?;
    finish(items)
}

/// Reads items that are in memory already, as in a request's body.
pub fn read_values(values: Vec<Value>, options: &ReadOptions<'_>) -> Result<Vec<Item>, DataErrors> {
    let taken = Taken::new(options.limits);
    let items = collect(values.into_iter().enumerate().take_while(|_| !taken.is_full()), |(index, value)| {
        read_item(value, Place::Item(index + 1), options, &taken)
    })?;
    finish(items)
}

fn finish(items: Vec<Vec<Item>>) -> Result<Vec<Item>, DataErrors> {
    let items: Vec<Item> = items.into_iter().flatten().collect();
    if items.is_empty() { Err(DataErrors::one(Place::All, None, "holds no item")) } else { Ok(items) }
}

/// What items come to while they are read: a conversation in which every answer is learnt makes many of a few bytes.
struct Taken {
    limits: Limits,
    items: Cell<usize>,
    /// Of prompts that are beginnings of conversations.
    bytes: Cell<usize>,
}

impl Taken {
    /// Items may repeat each other's beginnings, but together they have at most so many times the bytes of a file.
    const REPEATED: usize = 4;
    /// What a message is counted for beside its text.
    const MESSAGE: usize = 64;

    fn new(limits: Limits) -> Self {
        Self { limits, items: Cell::default(), bytes: Cell::default() }
    }

    /// Counts items whose prompts are the first messages of a conversation, before they are made: `ends` are the numbers of messages.
    fn conversation(
        &self,
        lengths: &[usize],
        ends: impl Iterator<Item = usize>,
        place: Place,
    ) -> Result<(), DataError> {
        let until: Vec<usize> = std::iter::once(0)
            .chain(lengths.iter().scan(0usize, |sum, length| {
                *sum = sum.saturating_add(length + Self::MESSAGE);
                Some(*sum)
            }))
            .collect();
        for end in ends {
            self.items.set(self.items.get() + 1);
            self.bytes.set(self.bytes.get().saturating_add(until[end]));
        }
        let most = self.most_bytes();
        if self.bytes.get() > most {
            let message =
                format!("repeats its beginning for every answer: with it, the prompts have more than {most} bytes");
            return Err(DataError::new(place, Some("messages"), message));
        }
        self.check(place)
    }

    fn one(&self, place: Place) -> Result<(), DataError> {
        self.items.set(self.items.get() + 1);
        self.check(place)
    }

    fn check(&self, place: Place) -> Result<(), DataError> {
        let (items, most) = (self.items.get(), self.limits.items);
        if items <= most {
            return Ok(());
        }
        Err(DataError::new(place, None, format!("with it, the data holds {items} items; at most {most} are taken")))
    }

    fn most_bytes(&self) -> usize {
        self.limits.bytes.saturating_mul(Self::REPEATED)
    }

    /// There is no use in reading on.
    fn is_full(&self) -> bool {
        self.items.get() > self.limits.items || self.bytes.get() > self.most_bytes()
    }
}

/// serde_json counts lines within the one line it was given: the real number is already named.
fn without_line(message: &str) -> String {
    message.replace(" at line 1 column ", " at column ")
}

/// One object may hold several demonstrations (a conversation in which several answers are to be learnt): one item each, in order.
fn read_item(value: Value, place: Place, options: &ReadOptions<'_>, taken: &Taken) -> Result<Vec<Item>, DataError> {
    let Value::Object(object) = &value else {
        return Err(DataError::new(place, None, "must be a JSON object"));
    };
    let completion = optional_text(object, "completion", place)?;
    if let Some(messages) = object.get("messages").filter(|messages| !messages.is_null()) {
        let written = read_messages(messages, place)?;
        return read_conversation(&written, completion, value, place, options, taken);
    }
    let known = shapes::read(&value);
    let (known_prompt, known_completion) = known.map(|known| (known.prompt, known.completion)).unzip();
    let prompt = match options.prompt {
        Some(template) => {
            Some(template.render(&value).map_err(|error| DataError::new(place, Some("prompt"), error.to_string()))?)
        }
        None => optional_text(object, "prompt", place)?.map(Prompt::Text),
    };
    let Some(prompt) = prompt.or(known_prompt) else {
        return Err(DataError::new(place, Some("messages"), describe_missing_prompt(object)));
    };
    if matches!(&prompt, Prompt::Text(text) if text.is_empty()) {
        return Err(DataError::new(place, Some("prompt"), "must not be empty"));
    }
    let completion = completion.or(known_completion);
    if options.supervised && completion.is_none() {
        return Err(DataError::new(place, Some("completion"), "is missing: sft learns from demonstrations"));
    }
    taken.one(place)?;
    Ok(vec![Item { place, prompt, completion, fields: Arc::new(value) }])
}

fn describe_missing_prompt(object: &Map<String, Value>) -> String {
    let mut names: Vec<&str> = object.keys().map(String::as_str).take(8).collect();
    names.sort_unstable();
    format!("is missing, and so is `prompt`, and the job has no prompt template (the item has {})", names.join(", "))
}

fn read_conversation(
    written: &[WrittenMessage],
    completion: Option<String>,
    value: Value,
    place: Place,
    options: &ReadOptions<'_>,
    taken: &Taken,
) -> Result<Vec<Item>, DataError> {
    let fail = |message: &str| Err(DataError::new(place, Some("messages"), message));
    if written.iter().all(|message| message.message.role == Role::System) {
        return fail("holds no user's message");
    }
    let ends_with_assistant = written.last().is_some_and(|last| last.message.role == Role::Assistant);
    let fields = Arc::new(value);
    let item = |prompt: Vec<Message>, completion| Item {
        place,
        prompt: Prompt::Messages(prompt),
        completion,
        fields: fields.clone(),
    };
    let until = |end: usize| written[..end].iter().map(|written| written.message.clone()).collect::<Vec<_>>();
    if !options.supervised || completion.is_some() {
        if ends_with_assistant {
            return fail("ends with the assistant's message: the answer is the model's to give");
        }
        taken.one(place)?;
        return Ok(vec![item(until(written.len()), completion)]);
    }
    let is_learnt =
        |&(index, it): &(usize, &WrittenMessage)| it.message.role == Role::Assistant && it.learnt && index > 0;
    let learnt: Vec<(usize, &WrittenMessage)> = written.iter().enumerate().filter(is_learnt).collect();
    if learnt.is_empty() {
        return fail("holds no assistant's message to learn, and there is no `completion`");
    }
    if let Some((index, _)) = learnt.iter().find(|(_, it)| it.message.content.is_empty()) {
        return Err(DataError::new(place, Some(&format!("messages[{index}].content")), "must not be empty"));
    }
    let lengths: Vec<usize> = written.iter().map(|it| it.message.content.len()).collect();
    taken.conversation(&lengths, learnt.iter().map(|&(index, _)| index + 1), place)?;
    Ok(learnt.into_iter().map(|(index, it)| item(until(index), Some(it.message.content.clone()))).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn rl() -> ReadOptions<'static> {
        ReadOptions::default()
    }

    fn sft() -> ReadOptions<'static> {
        ReadOptions { supervised: true, ..ReadOptions::default() }
    }

    fn message(role: Role, content: &str) -> Message {
        Message { role, content: content.to_owned() }
    }

    fn error(data: &str, options: &ReadOptions<'_>) -> String {
        read_bytes(data.as_bytes(), options).unwrap_err().to_string()
    }

    #[test]
    fn lines_and_lists_are_read() {
        let lines = "\u{feff}{\"prompt\": \"a\", \"answer\": 1}\r\n\n{\"messages\": [{\"role\": \"developer\", \"content\": \"s\"}, {\"role\": \"user\", \"content\": [{\"type\": \"text\", \"text\": \"b\"}, {\"type\": \"text\", \"text\": \"c\"}]}]}";
        let items = read_bytes(lines.as_bytes(), &rl()).unwrap();
        assert_eq!(items[0].prompt, Prompt::Text("a".to_owned()));
        assert_eq!((items[0].place, items[1].place), (Place::Line(1), Place::Line(3)));
        assert_eq!(items[1].prompt, Prompt::Messages(vec![message(Role::System, "s"), message(Role::User, "b\nc")]));
        assert_eq!(*items[0].fields, json!({"prompt": "a", "answer": 1}));
        let list = read_bytes(b" [{\"prompt\": \"a\"},\n {\"prompt\": \"b\"}]", &rl()).unwrap();
        assert_eq!(list[1].place, Place::Item(2));
    }

    #[test]
    fn gsm8k_and_svamp_are_read_as_they_are() {
        let gsm =
            "{\"question\": \"Ann has 3 pens and buys 4. How many?\", \"answer\": \"3+4 = <<3+4=7>>7\\n#### 7\"}\n";
        for options in [rl(), sft()] {
            let items = read_bytes(gsm.as_bytes(), &options).unwrap();
            assert_eq!(
                items[0].prompt,
                Prompt::Messages(vec![message(Role::User, "Ann has 3 pens and buys 4. How many?")])
            );
            assert_eq!(items[0].completion.as_deref(), Some("3+4 = 7\n#### 7"));
        }
        let svamp = "[\n{\"ID\": \"x\", \"Body\": \"Each pack costs 76 dollars\", \"Question\": \"How much are two?\", \"Answer\": 152.0}]";
        let items = read_bytes(svamp.as_bytes(), &sft()).unwrap();
        assert_eq!(
            items[0].prompt,
            Prompt::Messages(vec![message(Role::User, "Each pack costs 76 dollars. How much are two?")])
        );
        assert_eq!(items[0].completion.as_deref(), Some("152"));
        let template = PromptTemplate::from_json(&json!("Q: {{item.question}} A:")).unwrap();
        let items = read_bytes(gsm.as_bytes(), &ReadOptions { prompt: Some(&template), ..sft() }).unwrap();
        assert_eq!(items[0].prompt, Prompt::Text("Q: Ann has 3 pens and buys 4. How many? A:".to_owned()));
        assert!(items[0].completion.is_some());
    }

    #[test]
    fn every_learnt_answer_of_a_conversation_is_an_item() {
        let line = json!({"messages": [
            {"role": "user", "content": "1"}, {"role": "assistant", "content": "one"},
            {"role": "user", "content": "2"}, {"role": "assistant", "content": "two", "weight": 0},
            {"role": "user", "content": "3"}, {"role": "assistant", "content": "three", "weight": 1},
        ]});
        let items = read_values(vec![line.clone()], &sft()).unwrap();
        let completions: Vec<_> = items.iter().map(|item| item.completion.clone().unwrap()).collect();
        assert_eq!(completions, ["one", "three"]);
        assert_eq!(items[0].prompt, Prompt::Messages(vec![message(Role::User, "1")]));
        assert!(matches!(&items[1].prompt, Prompt::Messages(messages) if messages.len() == 5));
        assert!(read_values(vec![line], &rl()).unwrap_err().to_string().contains("the answer is the model's"));
    }

    #[test]
    fn every_mistake_names_line_and_field() {
        let user = r#"{"messages": [{"role": "user", "content": "x"}]}"#;
        for (line, options, want) in [
            ("", rl(), "the data: holds no item"),
            ("\n \n", rl(), "the data: holds no item"),
            ("[]", rl(), "the data: holds no item"),
            ("{\"prompt\": \"a\"}\n{\"prompt\": 3}", rl(), "line 2, `prompt`: must be a string"),
            ("{\"prompt\": \"a\"}\n\nnonsense", rl(), "line 3: is not JSON: expected ident at column"),
            ("{\"prompt\": \"a\"}\n[1]", rl(), "line 2: must be a JSON object"),
            ("[{\"prompt\": \"a\"}, 3]", rl(), "item 2: must be a JSON object"),
            ("[{\"prompt\": \"a\"}, ", rl(), "line 1: is not JSON"),
            ("{\"prompt\": \"\"}", rl(), "line 1, `prompt`: must not be empty"),
            (
                "{\"prompt\": null, \"b\": 1, \"a\": 2}",
                rl(),
                "line 1, `messages`: is missing, and so is `prompt`, and the job has no prompt template (the item has a, b, prompt)",
            ),
            ("{\"prompt\": \"a\"}", sft(), "line 1, `completion`: is missing"),
            ("{\"prompt\": \"a\", \"completion\": 3}", sft(), "line 1, `completion`: must be a string"),
            (user, sft(), "line 1, `messages`: holds no assistant's message"),
            (r#"{"messages": 3}"#, rl(), "line 1, `messages`: must be a list"),
            (r#"{"messages": []}"#, rl(), "line 1, `messages`: must not be empty"),
            (r#"{"messages": ["x"]}"#, rl(), "line 1, `messages[0]`: must be an object"),
            (r#"{"messages": [{"content": "x"}]}"#, rl(), "line 1, `messages[0].role`: is missing"),
            (r#"{"messages": [{"role": "tool", "content": "x"}]}"#, rl(), "line 1, `messages[0].role`: must be system"),
            (r#"{"messages": [{"role": "user"}]}"#, rl(), "line 1, `messages[0].content`: is missing"),
            (
                r#"{"messages": [{"role": "user", "content": 3}]}"#,
                rl(),
                "line 1, `messages[0].content`: must be a string",
            ),
            (
                r#"{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}"#,
                rl(),
                "only parts of type text",
            ),
            (r#"{"messages": [{"role": "user", "content": "x", "weight": 1}]}"#, sft(), "line 1, `messages[0].weight`"),
            (
                r#"{"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}"#,
                sft(),
                "`messages[0].tool_calls`: is not supported",
            ),
            (r#"{"messages": [{"role": "system", "content": "x"}]}"#, rl(), "holds no user's message"),
        ] {
            let got = error(line, &options);
            assert!(got.contains(want), "{line}: {got}");
        }
        assert!(read_bytes(b"{\"prompt\": \"\xff\"}", &rl()).unwrap_err().to_string().contains("line 1: is not JSON"));
    }

    #[test]
    fn templates_with_unknown_names_are_refused() {
        let unknown = PromptTemplate::from_json(&json!("{{question}}")).unwrap_err().to_string();
        assert!(unknown.contains("unknown name `question`"), "{unknown}");
        for (wrong, want) in [
            (json!("{{sample.output_text}}"), "no completion yet"),
            (json!(""), "must not be empty"),
            (json!(3), "a string or a list"),
            (json!([{"role": "user"}]), "missing field"),
            (json!([{"role": "user", "content": "x", "colour": 1}]), "unknown field"),
        ] {
            assert!(PromptTemplate::from_json(&wrong).unwrap_err().to_string().contains(want), "{wrong}");
        }
        let template = PromptTemplate::from_json(&json!([{"role": "user", "content": "{{item.q}}?"}])).unwrap();
        let options = ReadOptions { prompt: Some(&template), ..rl() };
        assert_eq!(
            read_bytes(b"{\"q\": 3}", &options).unwrap()[0].prompt,
            Prompt::Messages(vec![message(Role::User, "3?")])
        );
        assert_eq!(error("{\"q\": 1}\n{\"p\": 1}", &options), "line 2, `prompt`: the item has no `item.q`");
    }

    #[test]
    fn sizes_are_limited_and_mistakes_counted() {
        let limits = Limits { bytes: 1000, line_bytes: 100, items: 5 };
        let options = ReadOptions { limits, ..rl() };
        assert!(error(&"x".repeat(1001), &options).contains("holds 1001 bytes; at most 1000"));
        let long = format!("{{\"prompt\": \"a\"}}\n{{\"prompt\": \"{}\"}}", "x".repeat(100));
        assert!(error(&long, &options).starts_with("line 2: holds 114 bytes"));
        assert!(error(&"{\"prompt\": \"a\"}\n".repeat(6), &options).contains("holds 6 items; at most 5"));
        assert!(
            error(&"{\"prompt\": \"a\"}\n".repeat(60), &options)
                .ends_with("line 6: with it, the data holds 6 items; at most 5 are taken")
        );
        let list = format!("[{{\"prompt\": \"a\"}},\n{{\"prompt\": \"{}\"}}]", "x".repeat(100));
        assert_eq!(error(&list, &options), "item 2: holds 115 bytes; an item has at most 100");
        let many = read_bytes("no\n".repeat(300).as_bytes(), &options).unwrap_err();
        assert_eq!(many.0.len(), DataErrors::MOST);
        assert!(many.to_string().ends_with("and perhaps more"));
    }

    #[test]
    fn answers_that_repeat_their_beginning_are_bounded() {
        let turn = [json!({"role": "user", "content": "1"}), json!({"role": "assistant", "content": "2"})];
        let turns: Vec<Value> = turn.iter().cycle().take(256).cloned().collect();
        let line = json!({"messages": turns}).to_string();
        let limits = |times: usize| Limits { bytes: times * line.len(), ..Limits::default() };
        let read = |times: usize| {
            let data = format!("{line}\n").repeat(times - 1);
            read_bytes(data.as_bytes(), &ReadOptions { limits: limits(times), ..sft() })
        };
        // 128 beginnings of 65 bytes a message, which are 1 MB of a line of 10 kB.
        let refused = read(10).unwrap_err();
        assert_eq!(refused.0.len(), 1, "{refused}");
        assert!(refused.to_string().starts_with("line 1, `messages`: repeats its beginning"), "{refused}");
        let shared = read_bytes(line.as_bytes(), &sft()).unwrap();
        assert_eq!(shared.len(), 128);
        assert!(Arc::ptr_eq(&shared[0].fields, &shared[127].fields));
    }

    /// Data of every form that is read.
    const FORMS: [&str; 6] = [
        r#"{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "1"}]}], "answer": 3}"#,
        "{\"messages\": [{\"role\": \"user\", \"content\": \"1\"}, {\"role\": \"assistant\", \"content\": \"2\", \"weight\": 0}, \
         {\"role\": \"user\", \"content\": \"3\"}, {\"role\": \"assistant\", \"content\": \"4\"}]}",
        "{\"prompt\": \"a\\u00e9\", \"completion\": \"b\"}\n\n{\"prompt\": \"c\", \"completion\": \"d\"}\r\n",
        r##"{"question": "3 and 4?", "answer": "3+4 = <<3+4=7>>7\n#### 7"}"##,
        "[\n{\"ID\": \"x\", \"Body\": \"Each costs 7\", \"Question\": \"And two?\", \"Answer\": 14.0}, {\"q\": [1, {\"a\": null}]}]",
        "\u{feff}{\"q\": \"1\", \"answer\": \"2\"}",
    ];

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(data in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = read_bytes(&data, &rl());
        }

        /// Data that is nearly right: bytes changed, pieces copied elsewhere, ends cut off.
        #[test]
        fn spoilt_data_is_read_or_refused(
            forms in prop::collection::vec(any::<prop::sample::Index>(), 1..4),
            bytes in prop::collection::vec((any::<prop::sample::Index>(), prop_oneof![any::<u8>(), Just(b'"'), Just(b'\\'), Just(b'{'), Just(b'['), Just(b'9')]), 0..4),
            copy in any::<Option<(prop::sample::Index, prop::sample::Index, u8)>>(),
            cut in any::<Option<prop::sample::Index>>(),
            supervised: bool, template: bool,
        ) {
            let mut data = forms.iter().map(|form| *form.get(&FORMS)).collect::<Vec<_>>().join("\n").into_bytes();
            for (at, byte) in bytes {
                let at = at.index(data.len());
                data[at] = byte;
            }
            if let Some((from, to, length)) = copy {
                let from = from.index(data.len());
                let piece = data[from..data.len().min(from + usize::from(length))].to_vec();
                let to = to.index(data.len());
                data.splice(to..to, piece);
            }
            if let Some(cut) = cut {
                data.truncate(cut.index(data.len()));
            }
            let template = template.then(|| PromptTemplate::from_json(&json!("{{item.q}}?")).unwrap());
            let options = ReadOptions { prompt: template.as_ref(), ..if supervised { sft() } else { rl() } };
            match read_bytes(&data, &options) {
                Ok(items) => prop_assert!(!items.is_empty() && items.iter().all(|item| !supervised || item.completion.is_some())),
                Err(errors) => prop_assert!(!errors.0.is_empty() && errors.to_string().len() < 100_000),
            }
        }
    }
}
