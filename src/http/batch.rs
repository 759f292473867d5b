//! `POST /adapters/batch`: a line in, a line out, in order, while both go on.
//!
//! Two tasks stand between the request and the answer. One cuts the body into lines and gathers groups; the other stores a
//! group in one transaction and answers its lines after the commit. Memory is bounded: by the bytes of a line and of a group, by the room for
//! bodies that are not small ([`super::incoming`]), and by that for answers that are not read yet ([`super::unread`]). Before each group the key is asked about again: an upload may take long.

use std::sync::Arc;

use axum::{
    body::{Body, BodyDataStream},
    extract::{Request, State},
    http::header,
    response::{IntoResponse, Response},
};
use bytes::{Bytes, BytesMut};
use futures::{FutureExt as _, StreamExt as _};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tracing::Instrument as _;
use utoipa::ToSchema;

use super::{
    auth::Shown,
    error::{ApiError, ApiResult, BodyErrors, CommonErrors, ErrorObject},
    extract::{parse_json, require_media_type, unreadable},
    incoming::{BATCH, Incoming, PIECE, Room, refuse_announced, too_large},
    metered::Metered,
    state::AppState,
    unread::Answers,
    upload::AdapterUpload,
};
use crate::{
    service::{Error, Service, Upload},
    tenant::{Admission, Caller},
    types::{Generation, TenantId},
};

/// Lines of a group. A power of two, as the store's largest statement.
const GROUP_LINES: usize = 1024;
/// Bytes of a group.
const GROUP_BYTES: usize = 4 << 20;
/// Bytes of a line: more than any adapter's numbers take.
const LINE_BYTES: usize = 4 << 20;
/// Of a name that is none, so much comes back.
const ECHO: usize = 64;
/// Of what is said of a line: a field of the wrong type is shown in it, whatever its length.
const WORDS: usize = 256;

/// The answer to a line: `generation` or `error`, never both.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct BatchLine {
    /// The line's name, null when it has none.
    #[schema(required = true)]
    name: Option<String>,
    /// It was stored.
    #[serde(skip_serializing_if = "Option::is_none")]
    generation: Option<String>,
    /// It was not.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<ErrorObject>,
}

/// A line that was read, and the name to answer it under.
struct Line {
    name: Option<String>,
    upload: Result<Upload, Error>,
}

fn is_ndjson(essence: &str) -> bool {
    matches!(essence, "application/x-ndjson" | "application/ndjson" | "application/jsonl" | "application/x-jsonlines")
}

/// Upload many adapters
///
/// A line of JSON each; a line of JSON back for each, in order, once it is stored. Both ways may stream. A line has 4 MiB at most. It takes no `Idempotency-Key`: lines that are sent again are answered `name_taken`, or with
/// `"on_conflict": "new_generation"` as the first time, since the same numbers are the same generation.
#[utoipa::path(
    post, path = "/adapters/batch", tag = "adapters", extensions(("x-metered" = json!(true))),
    request_body(content = AdapterUpload, content_type = "application/x-ndjson", description = "One object a line."),
    responses((status = 200, description = "One object a line.", body = BatchLine, content_type = "application/x-ndjson"), BodyErrors, CommonErrors),
)]
pub(super) async fn upload_batch(
    State(state): State<AppState>,
    Metered(caller, place): Metered,
    shown: Shown,
    request: Request,
) -> ApiResult<Response> {
    require_media_type(request.headers(), is_ndjson, "application/x-ndjson")?;
    let limits = state.limits;
    refuse_announced(request.headers(), limits.batch)?;
    let (groups, received) = mpsc::channel(1);
    let (answers, answered) = state.outgoing.unread.batch();
    let reader = Reader {
        lines: Lines::new(limits.body.min(LINE_BYTES)),
        left: limits.batch,
        limit: limits.batch,
        incoming: state.incoming,
        tenant: caller.tenant,
        room: Room::default(),
        groups,
    };
    tokio::spawn(reader.read(request.into_body().into_data_stream()).in_current_span());
    let writer = Writer { service: state.service, caller, shown, _place: place, answers };
    tokio::spawn(writer.write(received).in_current_span());
    let body = Body::from_stream(answered.map(Ok::<_, std::convert::Infallible>));
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}

/// Cuts a body into groups of lines.
struct Reader {
    lines: Lines,
    /// Bytes that the body may still have.
    left: usize,
    limit: usize,
    incoming: Arc<Incoming>,
    tenant: TenantId,
    room: Room,
    groups: mpsc::Sender<Vec<Line>>,
}

impl Reader {
    /// Until the body's end, its limit, or the client's leaving. A group that is not full goes when the body makes a pause.
    async fn read(mut self, mut body: BodyDataStream) {
        let mut group = Vec::new();
        let mut bytes = 0;
        loop {
            let chunk = match body.next().now_or_never() {
                Some(chunk) => chunk,
                None => {
                    if !self.flush(&mut group).await {
                        return;
                    }
                    bytes = 0;
                    body.next().await
                }
            };
            let last = match chunk {
                Some(Ok(chunk)) if chunk.len() <= self.left => {
                    self.left -= chunk.len();
                    self.lines.push(&chunk);
                    self.make_room().await.err().map(Err)
                }
                Some(Ok(_)) => Some(Err(too_large("The request body", self.limit))),
                Some(Err(error)) => Some(Err(unreadable(&error))),
                None => Some(Ok(())),
            };
            while let Some(line) = self.lines.next(last.is_some()) {
                bytes += line.as_ref().map_or(0, |line| line.len());
                group.extend(self.read_line(line).await);
                if (group.len() >= GROUP_LINES || bytes >= GROUP_BYTES) && !self.flush(&mut group).await {
                    return;
                }
                if group.is_empty() {
                    bytes = 0;
                }
            }
            if let Some(end) = last {
                group.extend(end.err().map(|error| Line { name: None, upload: Err(error) }));
                self.flush(&mut group).await;
                return;
            }
        }
    }

    /// Room for a body that is no longer small.
    async fn make_room(&mut self) -> Result<(), Error> {
        if self.limit - self.left <= PIECE {
            return Ok(());
        }
        self.incoming.widen(&mut self.room, self.tenant, BATCH).await
    }

    /// None for an empty line.
    async fn read_line(&self, line: Result<Bytes, Error>) -> Option<Line> {
        let refused = |error| Some(Line { name: None, upload: Err(error) });
        match line {
            Ok(line) => {
                let read = self.incoming.aside(self.tenant, line.len(), move || read_line(&line)).await;
                read.unwrap_or_else(refused)
            }
            Err(error) => refused(error),
        }
    }

    /// False when nobody listens any more.
    async fn flush(&self, group: &mut Vec<Line>) -> bool {
        group.is_empty() || self.groups.send(std::mem::take(group)).await.is_ok()
    }
}

/// A body's bytes that are not a whole line yet.
struct Lines {
    pending: BytesMut,
    /// Bytes of `pending` that hold no line end.
    searched: usize,
    /// The longest line.
    limit: usize,
    /// Within a line that was too long: its rest is dropped.
    dropping: bool,
}

impl Lines {
    fn new(limit: usize) -> Self {
        Self { pending: BytesMut::new(), searched: 0, limit, dropping: false }
    }

    fn push(&mut self, chunk: &[u8]) {
        self.pending.extend_from_slice(chunk);
    }

    /// The next whole line without its end; at the end of the body, what is left. A line that is too long is told of once.
    fn next(&mut self, ended: bool) -> Option<Result<Bytes, Error>> {
        loop {
            let found = self.pending[self.searched..].iter().position(|&byte| byte == b'\n');
            let end = match found {
                Some(at) => self.searched + at + 1,
                None if ended || self.dropping || self.pending.len() > self.limit => self.pending.len(),
                None => {
                    self.searched = self.pending.len();
                    return None;
                }
            };
            self.searched = 0;
            if end == 0 {
                return None;
            }
            let mut line = self.pending.split_to(end);
            if found.is_some() {
                line.truncate(end - 1);
            }
            // A piece without an end: what follows up to the next end belongs to it.
            if std::mem::replace(&mut self.dropping, found.is_none()) {
                continue;
            }
            return Some(if line.len() > self.limit {
                Err(too_large("The line", self.limit))
            } else {
                Ok(line.freeze())
            });
        }
    }
}

/// None for an empty line.
fn read_line(line: &[u8]) -> Option<Line> {
    if line.iter().all(u8::is_ascii_whitespace) {
        return None;
    }
    Some(match parse_json::<AdapterUpload>(line) {
        Ok(body) => Line { name: body.name.as_deref().map(clip), upload: body.into_upload() },
        Err(ApiError(error)) => Line { name: name_of(line), upload: Err(error) },
    })
}

/// The name of a line that is no upload otherwise.
fn name_of(line: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Named {
        name: String,
    }
    serde_json::from_slice::<Named>(line).ok().map(|named| clip(&named.name))
}

fn clip(name: &str) -> String {
    name.chars().take(ECHO).collect()
}

/// Stores groups one after the other and answers each after its commit. The request has its place as long as this lives.
struct Writer {
    service: Arc<Service>,
    caller: Caller,
    shown: Shown,
    _place: Admission,
    answers: Answers,
}

impl Writer {
    /// Ends early when a group fails as a whole, or when the client is gone: what it was not told of may be stored or not.
    async fn write(self, mut groups: mpsc::Receiver<Vec<Line>>) {
        while let Some(group) = groups.recv().await {
            let (names, uploads): (Vec<_>, Vec<_>) = group.into_iter().map(|line| (line.name, line.upload)).unzip();
            let stored = self.store(uploads).await;
            let failed = stored.is_err();
            let results = stored.unwrap_or_else(|error| vec![Err(error); names.len()]);
            let mut lines = Vec::new();
            for (name, result) in names.into_iter().zip(results) {
                // A struct of strings: it can be written.
                let _ = serde_json::to_writer(&mut lines, &answer(name, result));
                lines.push(b'\n');
            }
            if !self.answers.put(lines.into()).await || failed {
                return;
            }
        }
    }

    /// A group, as long as the key is good.
    async fn store(&self, uploads: Vec<Result<Upload, Error>>) -> Result<Vec<Result<Generation, Error>>, Error> {
        self.shown.check(&self.service).await?;
        self.service.upload_many(&self.caller, uploads).await
    }
}

fn answer(name: Option<String>, result: Result<Generation, Error>) -> BatchLine {
    match result {
        Ok(generation) => BatchLine { name, generation: Some(generation.to_string()), error: None },
        Err(error) => {
            let mut error = ApiError(error).body().error;
            if let Some((end, _)) = error.message.char_indices().nth(WORDS) {
                error.message.truncate(end);
                error.message.push_str("...");
            }
            BatchLine { name, generation: None, error: Some(error) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every line of a body that comes in pieces, "!" for one that is too long.
    fn cut(pieces: &[&str], limit: usize) -> Vec<String> {
        let mut lines = Lines::new(limit);
        let mut found = Vec::new();
        for piece in pieces.iter().map(Some).chain([None]) {
            if let Some(piece) = piece {
                lines.push(piece.as_bytes());
            }
            while let Some(line) = lines.next(piece.is_none()) {
                found.push(line.map_or("!".into(), |line| String::from_utf8(line.to_vec()).unwrap()));
            }
        }
        found
    }

    #[test]
    fn lines_do_not_depend_on_the_pieces_of_the_body() {
        let text = "a\nbb\n\nccc\nlonger than ten\nd\nand another long one\n\ne";
        let expected = ["a", "bb", "", "ccc", "!", "d", "!", "", "e"];
        assert_eq!(cut(&[text], 10), expected);
        let letters: Vec<String> = text.chars().map(String::from).collect();
        let letters: Vec<&str> = letters.iter().map(String::as_str).collect();
        assert_eq!(cut(&letters, 10), expected);
        for at in 0..text.len() {
            assert_eq!(cut(&[&text[..at], &text[at..]], 10), expected, "cut at {at}");
        }
    }

    #[test]
    fn a_body_may_end_anywhere() {
        assert_eq!(cut(&[""], 5), [""; 0]);
        assert_eq!(cut(&["a"], 5), ["a"]);
        assert_eq!(cut(&["a\n"], 5), ["a"]);
        assert_eq!(cut(&["too long"], 5), ["!"]);
        assert_eq!(cut(&["too long", " still", "\n"], 5), ["!"]);
        assert_eq!(cut(&["too long", " still", " going"], 5), ["!"]);
        assert_eq!(cut(&["too long", " still", "\nx"], 5), ["!", "x"]);
    }
}
