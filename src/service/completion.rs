//! A completion: from what the client asks for to engine requests, and from events to choices.

use std::{sync::Arc, time::Instant};

use futures::{Stream, StreamExt as _, stream};
use tracing::Span;

use super::{
    BaseInfo, Error, ErrorKind, Lease, Service,
    decoding::{Checked, Decoding},
    reader::{Delta, End, Prompt, Reader, Show, Stake, TokenScore},
    share::share_of,
    shed::Place,
};
use crate::{
    engine::{FinishReason, Priority, Request, SubmitError},
    telemetry::{Metrics, TokenLabels},
    tenant::{Admission, Caller, Charge},
    text::{StopStrings, TokenizerError},
    types::{Generation, TokenId},
};

/// Completion tokens of `/v1/completions` when none are asked for.
pub const DEFAULT_MAX_TOKENS: usize = 16;
/// At most so many alternatives in `/v1/completions`.
pub const MAX_LOGPROBS: u64 = 5;
/// At most so many sequences in one request, over all prompts.
pub(super) const MAX_SEQUENCES: usize = 4096;

/// What to complete.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompts {
    /// Texts.
    Texts(Vec<String>),
    /// Token ids.
    Tokens(Vec<Vec<u64>>),
}

/// `/v1/completions` in the service's words.
#[derive(Debug, Clone)]
pub struct CompletionRequest {
    /// What `model` and `adapter` say.
    pub target: super::Target,
    /// One or many.
    pub prompts: Prompts,
    /// How.
    pub decoding: Decoding,
    /// Sequences a prompt of which the n with the highest mean log-prob are returned.
    pub best_of: Option<u64>,
    /// The prompt before the completion.
    pub echo: bool,
    /// Log-probs with so many alternatives, 0..=5.
    pub logprobs: Option<u64>,
    /// The answer is a stream.
    pub stream: bool,
    /// Token ids beside the text.
    pub return_token_ids: bool,
}

/// What a finished request cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Each prompt once, whatever the number of choices.
    pub prompt_tokens: usize,
    /// Of all sequences, those that `best_of` dropped included.
    pub completion_tokens: usize,
    /// Of `prompt_tokens`, those whose KV came from the prefix cache.
    pub cached_tokens: usize,
}

/// A finished choice.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// The text, the prompt first under echo.
    pub text: String,
    /// Sampled tokens.
    pub tokens: Vec<TokenId>,
    /// Log-probs, the prompt's first under echo.
    pub scores: Vec<TokenScore>,
    /// How it ended.
    pub reason: FinishReason,
    /// The prompt it completes.
    pub prompt: Prompt,
}

/// Validated and encoded, not yet submitted.
pub(super) struct Plan {
    pub(super) prompts: Vec<Prompt>,
    pub(super) checked: Checked,
    /// Completion tokens when none are asked for; None: the rest of the context.
    pub(super) default_max_tokens: Option<usize>,
    /// The field that holds the prompt.
    pub(super) param: &'static str,
    /// Sequences a prompt.
    pub(super) best_of: usize,
    pub(super) logprobs: Option<usize>,
    pub(super) show: Show,
    pub(super) place: Place,
}

/// Sequences in the engine. Dropping it cancels them.
pub struct Completion {
    /// The adapter's generation; None for the bare base.
    pub generation: Option<Generation>,
    prompts: Vec<Prompt>,
    readers: Vec<Reader>,
    n: usize,
    best_of: usize,
    meter: Meter,
}

impl Service {
    /// Starts a completion. Everything that can be wrong with the request is found before the engine hears of it.
    pub async fn complete(
        &self,
        caller: &Caller,
        admission: Admission,
        request: CompletionRequest,
    ) -> Result<Completion, Error> {
        let started = Instant::now();
        let checked = request.decoding.check(&self.base)?;
        let best_of = best_of(&request, checked.n)?;
        if let Some(logprobs) = request.logprobs.filter(|&logprobs| logprobs > MAX_LOGPROBS) {
            let message = format!("'logprobs' must be between 0 and {MAX_LOGPROBS}; it is {logprobs}.");
            return Err(Error::invalid("logprobs", message));
        }
        self.policy.check_choices(checked.n, best_of)?;
        let sequences = check_count(&request.prompts, best_of, self.policy.sequences)?;
        let logprobs = request.logprobs.map(|logprobs| logprobs as usize);
        let show = Show {
            echo: request.echo,
            prompt_scores: request.echo && logprobs.is_some(),
            end_tokens: request.return_token_ids,
            adapted: false,
        };
        let lease = self.resolve(caller, &request.target).await?;
        let place = self.admit(caller, sequences)?;
        let base = self.base.clone();
        let prompts = blocking(move || encode_all(&base, request.prompts)).await?;
        self.policy.log(caller.tenant, &prompts);
        let default_max_tokens = Some(DEFAULT_MAX_TOKENS);
        let plan = Plan { prompts, checked, default_max_tokens, param: "prompt", best_of, logprobs, show, place };
        self.start(caller, plan, admission, lease, started)
    }

    /// A place for a request, unless it would wait too long for its turn.
    pub(super) fn admit(&self, caller: &Caller, sequences: usize) -> Result<Place, Error> {
        self.shedder.admit(&self.engine, caller.tenant, sequences).inspect_err(|_| {
            self.metrics.shed.inc();
        })
    }

    /// Submits all sequences of a plan or none, when its tenant has the tokens for it.
    pub(super) fn start(
        &self,
        caller: &Caller,
        plan: Plan,
        admission: Admission,
        lease: Lease,
        started: Instant,
    ) -> Result<Completion, Error> {
        let Plan { prompts, checked, default_max_tokens, param, best_of, logprobs, show, place } = plan;
        let limits = self.engine.config();
        let (count, most) = (prompts.len() * best_of, limits.max_batch + limits.max_queue);
        if count > most {
            let param = if prompts.len() > most { param } else { "n" };
            let message = format!("The request makes {count} choices; this server holds at most {most} at once.");
            return Err(Error::invalid(param, message));
        }
        let show = Show { adapted: lease.cores.is_some(), ..show };
        let share = share_of(caller.tenant, &admission.limits());
        let deadline = self.request_timeout.and_then(|timeout| started.checked_add(timeout));
        let span = Span::current();
        let mut requests = Vec::with_capacity(count);
        let mut budgets = Vec::with_capacity(prompts.len());
        for prompt in &prompts {
            let budget = checked.budget(&self.base, prompt.tokens.len(), default_max_tokens, param)?;
            budgets.push(budget);
            for k in 0..best_of {
                requests.push(Request {
                    prompt: prompt.tokens.to_vec(),
                    max_tokens: budget.max_tokens,
                    min_tokens: budget.min_tokens,
                    stop_tokens: checked.stop_tokens.clone(),
                    sampling: checked.sampling(k)?,
                    // Without log-probs there is no best.
                    logprobs: logprobs.or((best_of > checked.n).then_some(0)),
                    prompt_logprobs: logprobs.filter(|_| show.prompt_scores),
                    scaled_logprobs: false,
                    capture_logits: false,
                    cores: lease.cores.clone(),
                    salt: lease.salt,
                    use_cache: lease.cacheable,
                    priority: Priority::Interactive,
                    share,
                    deadline,
                    span: span.clone(),
                });
            }
        }
        let prompt_tokens: usize = prompts.iter().map(|prompt| prompt.tokens.len()).sum();
        // Of requests that fit the context: the sums are far from overflowing.
        let most: usize = requests.iter().map(|request| request.max_tokens).sum();
        let mut charge = admission.reserve(prompt_tokens as u64, most as u64)?;
        let events = self.engine.submit_many(requests).map_err(refused)?;
        place.submitted();
        charge.begin();
        let charge = Arc::new(charge);
        let reader = |(choice, events)| {
            let prompt = choice / best_of;
            let stops = StopStrings::new(checked.stop.iter().cloned());
            let stake = Stake { charge: charge.clone(), budget: budgets[prompt] };
            Reader::new(choice, self.base.clone(), prompts[prompt].clone(), events, show, stops, stake)
        };
        let readers = events.into_iter().enumerate().map(reader).collect();
        let meter = Meter::new(self.metrics.clone(), prompt_tokens, best_of, started, (place, charge));
        Ok(Completion { generation: lease.generation, prompts, readers, n: checked.n, best_of, meter })
    }
}

impl Completion {
    /// The prompt of a choice.
    pub fn prompt(&self, choice: usize) -> &Prompt {
        &self.prompts[choice / self.best_of]
    }

    /// How many choices there will be.
    pub fn choices(&self) -> usize {
        self.prompts.len() * self.n
    }

    /// Pieces of all choices as they come, each choice's in order; what has been used so far comes with each. Ends after the first error.
    pub fn into_stream(self) -> impl Stream<Item = Result<(Delta, Usage), Error>> + Send {
        let pieces = |reader| {
            stream::unfold(reader, |mut reader: Reader| async { reader.next().await.map(|next| (next, reader)) })
        };
        let all = stream::select_all(self.readers.into_iter().map(|reader| Box::pin(pieces(reader))));
        stream::unfold((all, Some(self.meter)), |(mut all, meter)| async {
            let mut meter = meter?;
            let next = all.next().await?;
            Some(match next {
                Ok(delta) => {
                    meter.count(&delta);
                    (Ok((delta, meter.usage)), (all, Some(meter)))
                }
                Err(error) => (Err(error), (all, None)),
            })
        })
    }

    /// Waits for all choices and keeps the best n of each prompt.
    pub async fn collect(mut self) -> Result<(Vec<Choice>, Usage), Error> {
        self.readers.iter_mut().for_each(Reader::hold_until_end);
        let (n, best_of, prompts) = (self.n, self.best_of, self.prompts.clone());
        let mut drafts: Vec<Draft> = (0..prompts.len() * best_of).map(|_| Draft::default()).collect();
        let mut used = Usage::default();
        let mut pieces = std::pin::pin!(self.into_stream());
        while let Some(piece) = pieces.next().await {
            let (delta, usage) = piece?;
            used = usage;
            drafts[delta.choice].add(delta);
        }
        let mut choices = Vec::with_capacity(prompts.len() * n);
        let mut drafts = drafts.into_iter();
        for prompt in prompts {
            let mut group: Vec<Draft> = drafts.by_ref().take(best_of).collect();
            if best_of > n {
                group.sort_by(|a, b| b.mean_logprob().total_cmp(&a.mean_logprob()));
                group.truncate(n);
            }
            choices.extend(group.into_iter().map(|draft| draft.finish(prompt.clone())));
        }
        Ok((choices, used))
    }
}

/// A choice being put together.
#[derive(Default)]
struct Draft {
    text: String,
    tokens: Vec<TokenId>,
    scores: Vec<TokenScore>,
    end: Option<End>,
}

impl Draft {
    fn add(&mut self, delta: Delta) {
        self.text += &delta.text;
        self.tokens.extend(delta.tokens);
        self.scores.extend(delta.scores);
        self.end = self.end.or(delta.end);
    }

    fn mean_logprob(&self) -> f64 {
        self.end.map_or(f64::NEG_INFINITY, |end| end.logprob_sum / (end.completion_tokens.max(1) as f64))
    }

    fn finish(self, prompt: Prompt) -> Choice {
        let Self { text, tokens, scores, end } = self;
        let reason = end.map_or(FinishReason::Length, |end| end.reason);
        Choice { text, tokens, scores, reason, prompt }
    }
}

/// Counts what a request uses, for the client and for /metrics.
struct Meter {
    metrics: Arc<Metrics>,
    started: Instant,
    best_of: usize,
    usage: Usage,
    prompt_counted: bool,
    first: bool,
    /// Kept until the last choice has ended: then the tenant has the rest of its tokens back, and its places.
    _held: (Place, Arc<Charge>),
}

impl Meter {
    fn new(
        metrics: Arc<Metrics>,
        prompt_tokens: usize,
        best_of: usize,
        started: Instant,
        held: (Place, Arc<Charge>),
    ) -> Self {
        let usage = Usage { prompt_tokens, ..Usage::default() };
        Self { metrics, started, best_of, usage, prompt_counted: false, first: true, _held: held }
    }

    fn count(&mut self, delta: &Delta) {
        if std::mem::take(&mut self.first) {
            self.metrics.first_text_seconds.observe(self.started.elapsed().as_secs_f64());
        }
        let Some(end) = delta.end else { return };
        let tokens = |kind, count: usize| {
            self.metrics.tokens.get_or_create(&TokenLabels { kind }).inc_by(count as u64);
        };
        if !std::mem::replace(&mut self.prompt_counted, true) {
            tokens("prompt", self.usage.prompt_tokens);
        }
        tokens("completion", end.completion_tokens);
        self.usage.completion_tokens += end.completion_tokens;
        if delta.choice.is_multiple_of(self.best_of) {
            self.usage.cached_tokens += end.cached_tokens;
            self.metrics.cached_tokens.inc_by(end.cached_tokens as u64);
        }
    }
}

fn best_of(request: &CompletionRequest, n: usize) -> Result<usize, Error> {
    let Some(best_of) = request.best_of else { return Ok(n) };
    let invalid = |message: String| Err(Error::invalid("best_of", message));
    let most = super::decoding::MAX_CHOICES;
    if best_of < n as u64 || best_of > most {
        return invalid(format!("'best_of' must be between n ({n}) and {most}; it is {best_of}."));
    }
    if request.stream && best_of > n as u64 {
        return invalid("'best_of' above n cannot be streamed: which choices are best is known at the end.".into());
    }
    Ok(best_of as usize)
}

/// Sequences of the request.
fn check_count(prompts: &Prompts, best_of: usize, most: usize) -> Result<usize, Error> {
    let count = match prompts {
        Prompts::Texts(texts) => texts.len(),
        Prompts::Tokens(lists) => lists.len(),
    };
    if count == 0 {
        return Err(Error::invalid("prompt", "'prompt' must not be an empty list."));
    }
    let sequences = count.saturating_mul(best_of);
    if sequences > most {
        let message = format!("{count} prompts of {best_of} sequences are more than {most} in one request.");
        return Err(Error::invalid("prompt", message));
    }
    Ok(sequences)
}

fn encode_all(base: &BaseInfo, prompts: Prompts) -> Result<Vec<Prompt>, Error> {
    match prompts {
        Prompts::Texts(texts) => texts.into_iter().map(|text| encode(base, text, true, "prompt")).collect(),
        Prompts::Tokens(lists) => lists
            .iter()
            .map(|list| {
                if list.is_empty() {
                    return Err(empty("prompt"));
                }
                let tokens = list.iter().map(|&token| in_vocabulary(base, token)).collect::<Result<_, _>>()?;
                Ok(Prompt { tokens, text: None })
            })
            .collect(),
    }
}

fn in_vocabulary(base: &BaseInfo, token: u64) -> Result<TokenId, Error> {
    TokenId::try_from(token).ok().filter(|&id| (id as usize) < base.vocab).ok_or_else(|| {
        Error::invalid("prompt", format!("Token id {token} is out of range: this model has {} tokens.", base.vocab))
    })
}

/// Encodes a text. One that cannot fit the context, whatever its tokens, is refused before it is tokenized.
pub(super) fn encode(base: &BaseInfo, text: String, special: bool, param: &'static str) -> Result<Prompt, Error> {
    if base.tokenizer.fewest_tokens(&text) > base.max_model_len {
        let message = format!(
            "This model's maximum context length is {} tokens. The prompt has {} bytes, which are more. Please reduce the length.",
            base.max_model_len,
            text.len()
        );
        return Err(Error::invalid(param, message).with_code("context_length_exceeded"));
    }
    let refused = |error: TokenizerError| Error::invalid(param, format!("'{param}': {error}."));
    let tokens = base.tokenizer.encode(&text, special).map_err(refused)?;
    if tokens.is_empty() {
        return Err(empty(param));
    }
    Ok(Prompt { tokens: tokens.into(), text: Some(text.into()) })
}

fn empty(param: &str) -> Error {
    Error::invalid(param, format!("'{param}' must have at least one token."))
}

/// Runs what takes a processor for a while beside the threads that serve connections.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let span = Span::current();
    tokio::task::spawn_blocking(move || span.in_scope(work)).await.map_err(Error::internal)?
}

fn refused(error: SubmitError) -> Error {
    match error {
        SubmitError::QueueFull(_) => {
            let mut error = Error::new(ErrorKind::RateLimited, error.to_string()).with_code("queue_full");
            error.retry_after = Some(1);
            error
        }
        SubmitError::Invalid(message) => Error::new(ErrorKind::Invalid, message),
        SubmitError::Stopped => {
            let mut error = Error::new(ErrorKind::Unavailable, error.to_string()).with_code("draining");
            error.retry_after = Some(5);
            error
        }
    }
}
