//! The one integration binary. Modules mirror the promises of ARCHITECTURE.md; all of them talk to a real server over HTTP.

mod contract;
mod errors;
mod golden;
mod many;
mod mixed;
mod rooms;
mod support;
mod tenants;
