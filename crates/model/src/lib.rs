//! Configurations, families, checkpoints, the decoder and its cache.
#![forbid(unsafe_code)]
