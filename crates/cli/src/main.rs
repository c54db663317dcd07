//! The `moebius` command: parse, call, print.
#![forbid(unsafe_code)]
fn main() {}
