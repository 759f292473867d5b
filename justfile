# The everyday commands; each is one line that also works without just.

# serve SmolLM2-135M-Instruct on 127.0.0.1:8080 without keys
serve *ARGS:
    cargo run -- serve --no-auth {{ARGS}}

# all tests: format, lints, Rust, real clients
test:
    bash scripts/test

# only the Rust tests
unit *ARGS:
    cargo nextest run --workspace {{ARGS}}

# format and lint
lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings

# write openapi/openapi.json from the code
openapi:
    cargo run -- openapi > openapi/openapi.json

# licences, bans and sources of the dependencies
deny:
    cargo deny check bans licenses sources
