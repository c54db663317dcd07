//! Operations: each file holds a forward, its backward and their test against finite differences.

mod arithmetic;
mod attention;
mod attention_biased;
mod bias;
mod columns;
mod cross_entropy;
mod embedding;
mod gate;
mod heads;
mod linear;
mod norm;
mod pointwise;
mod recurrent;
mod rope;
mod swiglu;

pub use arithmetic::{add, clamp, mean, scale, scale_rows_by, sum, weighted_sum};
pub use attention::{attention, attention_with_sinks};
pub use attention_biased::{BiasedShape, BucketBias, biased_attention};
pub use bias::add_bias;
pub use columns::{columns, concat_columns};
pub use cross_entropy::{cross_entropy, linear_cross_entropy, linear_cross_entropy_biased};
pub use embedding::embedding;
pub use gate::{scale_rows, sigmoid};
pub use heads::{join_heads, linear_by_head};
pub use linear::{linear, linear_f32, router_logits};
pub use norm::{l2_norm, layer_norm, rms_norm, rms_norm_plus, unit_rms_norm};
pub use pointwise::{Function, apply, minus_exp, multiply, multiply_rows};
pub use recurrent::{
    DeltaInputs, DeltaShape, ScanInputs, States, causal_convolution, gated_delta_rule, selective_scan,
};
pub use rope::rope;
pub use swiglu::{gated, swiglu};

use crate::{Tensor, TensorError, Var};

/// An error unless `x` has `cols` columns in two dimensions; gives its rows.
fn rows_of(what: &'static str, x: &Var, cols: usize) -> Result<usize, TensorError> {
    let [rows, found] = x.dims()?;
    if found == cols {
        Ok(rows)
    } else {
        Err(TensorError::Shape { what, wanted: vec![rows, cols], found: vec![rows, found] })
    }
}

/// An error unless `found` is `wanted`.
fn same_shape(what: &'static str, wanted: &Tensor, found: &Tensor) -> Result<(), TensorError> {
    if wanted.shape() == found.shape() {
        Ok(())
    } else {
        Err(TensorError::Shape { what, wanted: wanted.shape().to_vec(), found: found.shape().to_vec() })
    }
}

#[cfg(test)]
pub(crate) mod testing;
