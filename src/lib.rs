//! Mote: one frozen language model, thousands of adapters of a few numbers, one mixed batch.
//!
//! The rooms, from the outside in: [`app`] puts them together; [`http`] speaks the API; [`service`] holds the use cases; [`tenant`] and [`store`] know who calls
//! and what survives; [`text`] turns text into tokens and back; [`engine`] turns requests into steps; [`model`] is the forward pass; [`adapter`] says what 26 bytes mean; [`kernel`] computes.
//! The kernel is a crate of its own: it is compiled for five instruction sets, which takes longer than all the rest.
//! ARCHITECTURE.md has the import table, the invariants and the path of a request.

pub mod adapter;
pub mod app;
pub mod config;
pub mod engine;
pub mod http;
pub mod model;
pub mod service;
pub mod store;
pub mod telemetry;
pub mod tenant;
pub mod text;
pub mod types;

pub use mote_kernel as kernel;
