//! The one integration binary: the router in-process over an engine whose model follows a script (`app`, `script`), and real servers over HTTP (`support`).
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod adapters;
mod app;
mod audit;
mod bench;
mod chat;
mod command_train;
mod completions;
mod contract;
mod door;
mod durability;
mod errors;
mod faults;
mod fuzz;
mod golden;
mod huge;
mod keys;
mod limits;
mod many;
mod mixed;
mod models;
mod refusals;
mod rooms;
mod script;
mod shutdown;
mod startup;
mod streams;
mod support;
mod system;
mod tenants;
mod toy;
mod training;
mod training_files;
mod training_model;
mod training_refusals;
mod training_restart;
