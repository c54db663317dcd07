//! Tensors whose numbers stand as codes beside scales: MXFP4 of gpt-oss, FP8 by blocks of DeepSeek-V3.

use super::{Checkpoint, Stored};
use crate::ModelError;
use crate::families::TensorMap;
use crate::safetensors::{Dtype, TensorView};
use moebius_kernels::formats::Format;
use std::borrow::Cow;

/// Numbers of an MXFP4 block.
const MX_BLOCK: usize = 32;

/// The tensors that hold one of the family's.
pub(super) enum Parts<'f> {
    /// MXFP4 blocks and their scales.
    Microscaled([TensorView<'f>; 2]),
    /// FP8 codes and their scales.
    Fp8([TensorView<'f>; 2]),
    /// Itself.
    Plain(TensorView<'f>),
}

impl<'f> Parts<'f> {
    /// The names that these tensors have in the file.
    pub(super) fn names(&self) -> Vec<&'f str> {
        match self {
            Self::Microscaled(parts) | Self::Fp8(parts) => parts.iter().map(|part| part.name).collect(),
            Self::Plain(view) => vec![view.name],
        }
    }
}

impl Checkpoint<'_> {
    /// A tensor by its name in the file.
    fn get(&self, name: &str) -> Option<TensorView<'_>> {
        self.files.iter().find_map(|file| file.get(name))
    }

    /// The tensors that hold one of the family's, if there are any.
    pub(super) fn parts(&self, map: &TensorMap) -> Option<Parts<'_>> {
        let name = &map.file_name;
        let Some(view) = self.get(name) else {
            return Some(Parts::Microscaled([
                self.get(&format!("{name}_blocks"))?,
                self.get(&format!("{name}_scales"))?,
            ]));
        };
        if view.dtype != Dtype::F8E4M3 || self.layout.fp8_blocks.is_none() {
            return Some(Parts::Plain(view));
        }
        Some(match self.get(&format!("{name}_scale_inv")) {
            Some(scales) => Parts::Fp8([view, scales]),
            None => Parts::Plain(view),
        })
    }

    /// Whether the tensors that hold one of the family's are of its shape and of a type that can be read.
    pub(super) fn check(&self, map: &TensorMap) -> Result<(), ModelError> {
        match self.parts(map) {
            Some(Parts::Microscaled(parts)) => check_microscaled(map, parts),
            Some(Parts::Fp8([codes, scales])) => {
                check_shape(map, &codes)?;
                self.check_fp8([codes, scales])
            }
            Some(Parts::Plain(view)) => {
                check_shape(map, &view)?;
                plain_format(&view).map(|_| ())
            }
            None => Err(self.missing(map)),
        }
    }

    pub(super) fn missing(&self, map: &TensorMap) -> ModelError {
        ModelError::tensor(&self.name, &map.file_name, format!("missing; wanted shape {:?}", map.file_shape))
    }

    fn check_fp8(&self, [codes, scales]: [TensorView<'_>; 2]) -> Result<(), ModelError> {
        let blocks = self.layout.fp8_blocks.unwrap_or_default();
        let &[height, width] = codes.shape else {
            let message = format!("wanted a matrix in FP8, found shape {:?}", codes.shape);
            return Err(ModelError::tensor(codes.file, codes.name, message));
        };
        let wanted = [height.div_ceil(blocks[0]), width.div_ceil(blocks[1])];
        if scales.shape != wanted {
            let message = format!("wanted shape {wanted:?} for blocks of {blocks:?}, found {:?}", scales.shape);
            return Err(ModelError::tensor(scales.file, scales.name, message));
        }
        plain_format(&scales).map(|_| ())
    }

    /// The numbers of a matrix in FP8: each code's times its block's scale, which f32 holds exactly if the scale is a power
    /// of two.
    pub(super) fn fp8(
        &self,
        map: &TensorMap,
        [codes, scales]: [TensorView<'_>; 2],
    ) -> Result<Stored<'static>, ModelError> {
        let numbers: [f32; 256] = std::array::from_fn(|code| e4m3(code as u8));
        let [block_height, block_width] = self.layout.fp8_blocks.unwrap_or([1, 1]);
        let (width, scales_width) = (codes.shape[1], scales.shape[1]);
        let scales = scales.to_f32()?;
        let mut bytes = Vec::with_capacity(size_of::<f32>() * map.rows.len() * map.cols);
        let scale = |row: usize, col: usize| scales[row / block_height * scales_width + col / block_width];
        for row in 0..map.rows.len() {
            let start = map.view.first + row * map.view.row_stride;
            let (file_row, first) = (start / width, start % width);
            if map.view.col_stride != 1 || first + map.cols > width {
                bytes.extend(map.places(row).flat_map(|place| {
                    (numbers[codes.bytes[place] as usize] * scale(place / width, place % width)).to_le_bytes()
                }));
                continue;
            }
            let mut col = first;
            while col < first + map.cols {
                let end = ((col / block_width + 1) * block_width).min(first + map.cols);
                let factor = scale(file_row, col);
                let part = &codes.bytes[file_row * width..][col..end];
                bytes.extend(part.iter().flat_map(|&code| (numbers[code as usize] * factor).to_le_bytes()));
                col = end;
            }
        }
        Ok(Stored { format: Format::F32, bytes: Cow::Owned(bytes) })
    }
}

/// A tensor `[experts, in, out]` that stands as blocks `[experts, out, in / 32, 16]` and scales, its numbers in another order
/// inside a block than ours.
pub(super) fn microscaled(map: &TensorMap, [blocks, scales]: [TensorView<'_>; 2]) -> Stored<'static> {
    let [_, inner, outer] = map.file_shape[..] else { unreachable!("looked at by check_microscaled") };
    let a_row = inner / MX_BLOCK;
    let (expert, first) = (map.view.first / (inner * outer), map.view.first % outer);
    let mut bytes = Vec::with_capacity(map.rows.len() * a_row * 17);
    for row in 0..map.rows.len() {
        let at = (expert * outer + first + row * map.view.row_stride) * a_row;
        for block in at..at + a_row {
            bytes.push(scales.bytes[block]);
            let pairs = &blocks.bytes[block * 16..(block + 1) * 16];
            // Theirs: neighbours in a byte. Ours: number i and number i + 16.
            let number = |i: usize| if i.is_multiple_of(2) { pairs[i / 2] & 15 } else { pairs[i / 2] >> 4 };
            bytes.extend((0..16).map(|i| number(i) | number(i + 16) << 4));
        }
    }
    Stored { format: Format::MXFP4, bytes: Cow::Owned(bytes) }
}

fn check_microscaled(map: &TensorMap, [blocks, scales]: [TensorView<'_>; 2]) -> Result<(), ModelError> {
    let wanted = match map.file_shape[..] {
        [experts, inner, outer] if inner.is_multiple_of(MX_BLOCK) => [experts, outer, inner / MX_BLOCK],
        _ => {
            let message = format!("wanted rows of whole blocks of {MX_BLOCK} for shape {:?}", map.file_shape);
            return Err(ModelError::tensor(blocks.file, blocks.name, message));
        }
    };
    for (view, wanted) in [(blocks, [&wanted[..], &[16]].concat()), (scales, wanted.to_vec())] {
        if view.shape != wanted || view.dtype != Dtype::U8 {
            let message = format!("wanted U8 of shape {wanted:?}, found {} of {:?}", view.dtype, view.shape);
            return Err(ModelError::tensor(view.file, view.name, message));
        }
    }
    Ok(())
}

fn check_shape(map: &TensorMap, view: &TensorView<'_>) -> Result<(), ModelError> {
    if view.shape == map.file_shape {
        return Ok(());
    }
    let message = format!("wanted shape {:?}, found {:?}", map.file_shape, view.shape);
    Err(ModelError::tensor(view.file, view.name, message))
}

pub(super) fn plain_format(view: &TensorView<'_>) -> Result<Format, ModelError> {
    match view.dtype {
        Dtype::F32 => Ok(Format::F32),
        Dtype::F16 => Ok(Format::F16),
        Dtype::BF16 => Ok(Format::Bf16),
        other => {
            let message = format!("wanted F32, F16 or BF16, or F8_E4M3 with weight_scale_inv, found {other}");
            Err(ModelError::tensor(view.file, view.name, message))
        }
    }
}

/// The number of a code: a sign, four bits of exponent with bias 7, three of mantissa; no infinity, all ones is no number
/// (Micikevicius et al. 2022, "FP8 formats for deep learning").
fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let size = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (8.0 + mantissa) * 2f32.powi(exponent - 10),
    };
    if code >> 7 == 1 { -size } else { size }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_on_paper() {
        let cases = [(0x00, 0.0), (0x01, 1.0 / 512.0), (0x08, 1.0 / 64.0), (0x38, 1.0), (0x3c, 1.5), (0x7e, 448.0)];
        for (code, number) in cases {
            assert_eq!((e4m3(code), e4m3(code | 0x80)), (number, -number), "{code:#x}");
        }
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
    }
}
