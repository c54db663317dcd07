//! Tensors, the tape, and operations with forward and backward side by side.
#![forbid(unsafe_code)]
