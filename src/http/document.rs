//! The OpenAPI document: its head, and the headers of every answer, which no handler writes.

use utoipa::{
    Modify, OpenApi as _,
    openapi::{
        Header, Object, OpenApi, Ref, RefOr, Type,
        path::{Operation, PathItem},
        security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
    },
};

use super::metered::{METERED, RATE_HEADERS};

/// The head of the OpenAPI document; paths and schemas are added by `routes!`, together with the handlers.
#[derive(utoipa::OpenApi)]
#[openapi(
    info(title = "Mote", description = "Thousands of 26-byte adapters over one frozen language model, behind the OpenAI API."),
    security(("api_key" = [])),
    modifiers(&BearerScheme),
)]
struct Head;

struct BearerScheme;

impl Modify for BearerScheme {
    fn modify(&self, document: &mut OpenApi) {
        let scheme =
            HttpBuilder::new().scheme(HttpAuthScheme::Bearer).description(Some("A key of `mote keys create`."));
        let components = document.components.get_or_insert_default();
        components.add_security_scheme("api_key", SecurityScheme::Http(scheme.build()));
    }
}

/// The document without paths.
pub(super) fn head() -> OpenApi {
    Head::openapi()
}

/// On every answer: name, type, meaning.
const COMMON_HEADERS: [(&str, Type, &str); 2] = [
    (
        "x-request-id",
        Type::String,
        "Names the request in the server's log: the request's own if it is sane, else made.",
    ),
    ("openai-processing-ms", Type::Integer, "How long the server took, in milliseconds."),
];

/// Adds to every operation the headers that its answers have, refusals included.
pub(super) fn with_headers(mut document: OpenApi) -> OpenApi {
    let described = COMMON_HEADERS.iter().chain(&RATE_HEADERS);
    let headers = described.map(|(name, kind, words)| ((*name).to_owned(), header(kind, words).into()));
    document.components.get_or_insert_default().headers.extend(headers);
    document.paths.paths.values_mut().flat_map(operations).for_each(add_headers);
    document
}

fn header(kind: &Type, words: &str) -> Header {
    let mut header = Header::new(Object::with_type(kind.clone()));
    header.description = Some(words.to_owned());
    header
}

fn operations(path: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    let PathItem { get, put, post, delete, patch, .. } = path;
    [get, put, post, delete, patch].into_iter().flatten()
}

fn add_headers(operation: &mut Operation) {
    let metered = operation.extensions.as_ref().is_some_and(|marks| marks.contains_key(METERED));
    let rates = if metered { &RATE_HEADERS[..] } else { &[] };
    for response in operation.responses.responses.values_mut() {
        let RefOr::T(response) = response else { continue };
        for (name, ..) in COMMON_HEADERS.iter().chain(rates) {
            let reference = Ref::new(format!("#/components/headers/{name}"));
            response.headers.insert((*name).to_owned(), RefOr::Ref(reference));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;
    use crate::http::openapi;

    #[test]
    fn every_metered_handler_is_marked_and_says_what_is_left() {
        let mut document = openapi();
        let all: Vec<&mut Operation> = document.paths.paths.values_mut().flat_map(operations).collect();
        let with = |header: &str| {
            let has = |operation: &&&mut Operation| {
                operation.responses.responses.values().all(|response| match response {
                    RefOr::T(response) => response.headers.contains_key(header),
                    RefOr::Ref(_) => false,
                })
            };
            all.iter().filter(has).count()
        };
        assert_eq!((with("x-request-id"), with("openai-processing-ms")), (all.len(), all.len()));
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/http");
        let sources = fs::read_dir(folder).unwrap().filter_map(|file| fs::read_to_string(file.unwrap().path()).ok());
        let argument = ["): ", "Metered,"].concat(); // in pieces, so as not to count itself
        let handlers: usize = sources.map(|source| source.matches(&argument).count()).sum();
        assert!(handlers > 9);
        assert_eq!(with("x-ratelimit-reset-tokens"), handlers);
    }
}
