//! Tolerances, finite differences, tiny models, golden readers. Unpublished: for tests only.
#![forbid(unsafe_code)]
