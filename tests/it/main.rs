//! One binary for all integration tests: the router in-process, over an engine whose model follows a script.

mod app;
mod chat;
mod completions;
mod errors;
mod script;
mod streams;
mod system;
