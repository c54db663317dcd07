//! Arithmetic on slices: the only SIMD, the only thread-parallel loops. Knows no tensor, no model.

