//! Mote

pub mod adapter;
pub mod engine;
pub mod http;
pub mod kernel;
pub mod model;
pub mod service;
pub mod telemetry;
pub mod tenant;
pub mod text;
pub mod types;
