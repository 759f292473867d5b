//! Mote

pub mod adapter;
pub mod engine;
pub mod kernel;
pub mod model;
pub mod service;
pub mod store;
pub mod tenant;
pub mod types;
