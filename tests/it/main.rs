//! The one integration binary. Modules mirror the routes and the promises of ARCHITECTURE.md.

mod rooms;
