//! From pixels to rows of tokens, and from rows to one row an image.

use super::VisionConfig;
use crate::ModelError;
use moebius_kernels::memory::Buffer;
use moebius_tensor::{Graph, Param, Tensor, TensorError, Var};

/// Images cut into patches, row by row of patches; in a patch channel by channel, row by row of pixels.
///
/// # Shapes
/// pixels `[images, channels * height * width]`, result `[images * patches, channels * patch * patch]`.
pub(super) fn patches(config: &VisionConfig, pixels: &[f32]) -> Result<Tensor, ModelError> {
    let &VisionConfig { channels, height, width, patch, .. } = config;
    if !pixels.len().is_multiple_of(config.pixels()) {
        let (wanted, found) = (vec![channels, height, width], vec![pixels.len()]);
        return Err(TensorError::Shape { what: "pixels", wanted, found }.into());
    }
    let mut out = Buffer::scratch(pixels.len());
    let mut at = 0;
    for image in pixels.chunks_exact(config.pixels()) {
        for top in (0..height).step_by(patch) {
            for left in (0..width).step_by(patch) {
                for channel in 0..channels {
                    for row in top..top + patch {
                        let from = (channel * height + row) * width + left;
                        out[at..at + patch].copy_from_slice(&image[from..from + patch]);
                        at += patch;
                    }
                }
            }
        }
    }
    Ok(Tensor::new(&[pixels.len() / config.patch_len(), config.patch_len()], out))
}

/// Adds to each row the vector of its place in its image; `token`, if there is one, becomes each image's first row.
///
/// # Shapes
/// x `[images * patches, hidden]`, positions `[tokens, hidden]`, token `[1, hidden]`, result `[images * tokens, hidden]`.
pub(super) fn place<'p>(
    g: &Graph<'p>,
    x: &Var,
    positions: &'p Param,
    token: Option<&'p Param>,
) -> Result<Var, ModelError> {
    let [tokens, hidden] = positions.value().dims()?;
    let [rows, _] = x.dims()?;
    let own = usize::from(token.is_some());
    let images = rows / (tokens - own);
    let group = tokens * hidden;
    let mut y = Buffer::scratch(images * group);
    for (y, x) in y.chunks_exact_mut(group).zip(x.data().chunks_exact(group - own * hidden)) {
        y.copy_from_slice(positions.value().data());
        if let Some(token) = token {
            y.iter_mut().zip(token.value().data()).for_each(|(y, t)| *y += t);
        }
        y[own * hidden..].iter_mut().zip(x).for_each(|(y, x)| *y += x);
    }
    let to_x = x.place();
    Ok(g.record(Tensor::new(&[images * tokens, hidden], y), move |dy, back| {
        let sums = back.weight_sum(positions);
        for dy in dy.chunks_exact(group) {
            sums.iter_mut().zip(dy).for_each(|(sum, d)| *sum += d);
        }
        if let Some(token) = token {
            let sums = back.weight_sum(token);
            for dy in dy.chunks_exact(group) {
                sums.iter_mut().zip(dy).for_each(|(sum, d)| *sum += d);
            }
        }
        if back.wants(to_x) {
            let dx = dy.chunks_exact(group).flat_map(|dy| dy[own * hidden..].iter().copied());
            back.give(to_x, dx.collect::<Buffer<f32>>());
        }
    }))
}

/// The mean of each run of `tokens` rows.
///
/// # Shapes
/// x `[images * tokens, hidden]`, result `[images, hidden]`.
pub(super) fn mean_of_groups<'p>(g: &Graph<'p>, x: &Var, tokens: usize) -> Var {
    let &[rows, hidden] = x.shape() else { unreachable!("rows of tokens") };
    let (images, share) = (rows / tokens, 1.0 / tokens as f32);
    let mut y = Buffer::zeroed(images * hidden);
    for (y, x) in y.chunks_exact_mut(hidden).zip(x.data().chunks_exact(tokens * hidden)) {
        for row in x.chunks_exact(hidden) {
            y.iter_mut().zip(row).for_each(|(y, x)| *y += x);
        }
        y.iter_mut().for_each(|y| *y *= share);
    }
    let to_x = x.place();
    g.record_from(&[x], Tensor::new(&[images, hidden], y), move |dy, back| {
        let rows = dy.chunks_exact(hidden).flat_map(|dy| std::iter::repeat_n(dy, tokens).flatten());
        back.give(to_x, rows.map(|d| d * share).collect::<Buffer<f32>>());
    })
}

/// The first of each run of `tokens` rows.
///
/// # Shapes
/// As [`mean_of_groups`].
pub(super) fn first_of_groups<'p>(g: &Graph<'p>, x: &Var, tokens: usize) -> Var {
    let &[rows, hidden] = x.shape() else { unreachable!("rows of tokens") };
    let group = tokens * hidden;
    let y: Buffer<f32> = x.data().chunks_exact(group).flat_map(|x| x[..hidden].iter().copied()).collect();
    let to_x = x.place();
    g.record_from(&[x], Tensor::new(&[rows / tokens, hidden], y), move |dy, back| {
        let Some(dx) = back.sum_of(to_x) else { return };
        for (dx, dy) in dx.chunks_exact_mut(group).zip(dy.chunks_exact(hidden)) {
            dx.iter_mut().zip(dy).for_each(|(dx, dy)| *dx += dy);
        }
    })
}
