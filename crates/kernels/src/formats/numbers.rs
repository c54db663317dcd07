//! Numbers of two bytes and of eight bits, without branches so that loops over them become vectors.

/// The largest finite f16.
pub(super) const F16_LARGEST: f32 = 65_504.0;

/// The f32 that the bits of an f16 mean; a NaN keeps its payload.
#[inline(always)]
pub(super) fn f16_to_f32(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff) << 13;
    // The exponent's bias differs by 112; the product is exact, for subnormal numbers too.
    let finite = f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23);
    let value = if magnitude >= 0x7c00 << 13 { magnitude | 0x7f80_0000 } else { finite.to_bits() };
    f32::from_bits(value | u32::from(bits & 0x8000) << 16)
}

/// The bits of the nearest f16, ties to even, of a number that is at most 65504 when rounded.
#[inline(always)]
pub(super) fn f32_to_f16(value: f32) -> u16 {
    let (magnitude, sign) = (value.to_bits() & 0x7fff_ffff, (value.to_bits() >> 16 & 0x8000) as u16);
    // Subnormal: beside 0.5 the last place of an f32 is that of a subnormal f16, so that the sum rounds as wanted.
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let odd = magnitude >> 13 & 1;
    let normal = magnitude.wrapping_sub(112 << 23).wrapping_add(0xfff + odd) >> 13;
    let rounded = if magnitude < (127 - 14) << 23 { subnormal } else { normal };
    rounded as u16 | sign
}

/// The bits of the finite f16 nearest to `value`.
#[inline(always)]
pub(super) fn nearest_f16(value: f32) -> u16 {
    f32_to_f16(value.clamp(-F16_LARGEST, F16_LARGEST))
}

/// The number nearest to `value` that an f16 can hold.
#[inline(always)]
pub(super) fn round_to_f16(value: f32) -> f32 {
    f16_to_f32(nearest_f16(value))
}

/// As [`nearest_f16`], but zero only for zero: with the least scale there is, more codes than none can be told apart.
#[inline(always)]
pub(super) fn nearest_scale(value: f32) -> u16 {
    let bits = nearest_f16(value);
    if bits & 0x7fff == 0 && value != 0.0 { bits | 1 } else { bits }
}

/// The bits of the nearest bf16, ties to even, of a finite number.
#[inline(always)]
pub(super) fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// Half of the power of two that eight bits of exponent mean (OCP Microscaling Formats 1.0, E8M0).
#[inline(always)]
pub(crate) fn half_e8m0(exponent: u8) -> f32 {
    f32::from_bits(if exponent < 2 { 0x0020_0000 << exponent } else { u32::from(exponent - 1) << 23 })
}

/// The little-endian u16 at byte `at`.
#[inline(always)]
pub(super) fn u16_at(block: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([block[at], block[at + 1]])
}

/// The f16 at byte `at`.
#[inline(always)]
pub(super) fn f16_at(block: &[u8], at: usize) -> f32 {
    f16_to_f32(u16_at(block, at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::numbers;
    use half::{bf16, f16};

    #[test]
    fn every_f16_is_read_and_written() {
        for bits in 0..=u16::MAX {
            let (found, wanted) = (f16_to_f32(bits), f16::from_bits(bits).to_f32());
            assert!(found.to_bits() == wanted.to_bits() || found.is_nan() && wanted.is_nan(), "{bits:#x}");
            if wanted.is_finite() {
                assert_eq!(f32_to_f16(wanted), bits);
            }
        }
    }

    #[test]
    fn rounding_goes_to_the_nearest_and_to_even() {
        // Each f16, half-way to the next, and the f32s beside that.
        for bits in 0..0x7bff {
            let (low, high) = (f16_to_f32(bits), f16_to_f32(bits + 1));
            let middle = (low + high) / 2.0;
            for value in [middle, middle.next_up(), middle.next_down(), -middle, -middle.next_up()] {
                assert_eq!(f32_to_f16(value), f16::from_f32(value).to_bits(), "{value}");
            }
        }
        assert_eq!(f32_to_f16(65_519.996), 0x7bff);
        assert_eq!([round_to_f16(1e9), round_to_f16(-1e9)], [65_504.0, -65_504.0]);
        for x in numbers(1, 10_000) {
            for value in [x, x * 1e38, x * 1e-38, x * 1e-44] {
                assert_eq!(f32_to_bf16(value), bf16::from_f32(value).to_bits(), "{value}");
            }
        }
    }

    #[test]
    fn exponents_are_powers_of_two() {
        for exponent in 0..=254 {
            assert_eq!(f64::from(half_e8m0(exponent)), 2f64.powi(i32::from(exponent) - 128), "{exponent}");
        }
    }
}
