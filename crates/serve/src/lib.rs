//! The HTTP server.
#![forbid(unsafe_code)]

pub mod page;
