//! Data, optimiser, schedule, trainer, checkpoint and resume.
#![forbid(unsafe_code)]
