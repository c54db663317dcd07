//! Tiled attention against the definition, and against itself in other chunkings, threads and instruction sets.

use super::*;
use crate::testing::{assert_close, bits, numbers};
use proptest::prelude::*;

/// A batch with everything that the backward reads.
struct Batch {
    shape: AttentionShape,
    starts: Vec<usize>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    sinks: Option<Vec<f32>>,
    out: Vec<f32>,
    lse: Vec<f32>,
}

impl Batch {
    fn new([kv, group, head_dim]: [usize; 3], window: Option<usize>, lengths: &[usize]) -> Self {
        let scale = 2.0 / (head_dim as f32).sqrt();
        let shape = AttentionShape { window, ..AttentionShape::grouped([kv * group, kv, head_dim], scale) };
        Self::of_shape(shape, None, lengths)
    }

    fn of_shape(shape: AttentionShape, sinks: Option<Vec<f32>>, lengths: &[usize]) -> Self {
        let mut starts = vec![0];
        lengths.iter().for_each(|length| starts.push(starts[starts.len() - 1] + length));
        let tokens = starts[starts.len() - 1];
        Self {
            shape,
            starts,
            q: numbers(1, tokens * shape.query_width()).iter().map(|x| x * 3.0).collect(),
            k: numbers(2, tokens * shape.key_width()),
            v: numbers(3, tokens * shape.value_width()),
            sinks,
            out: vec![0.0; tokens * shape.out_width()],
            lse: vec![0.0; tokens * shape.n_heads],
        }
    }

    fn forward(mut self, isa: Isa) -> Self {
        let inputs = [&self.q[..], &self.k, &self.v];
        let sinks = self.sinks.as_deref();
        attention_forward_on(isa, &self.shape, inputs, sinks, &self.starts, [&mut self.out, &mut self.lse]);
        self
    }

    fn reference(mut self) -> Self {
        let inputs = [&self.q[..], &self.k, &self.v];
        let sinks = self.sinks.as_deref();
        attention_reference(&self.shape, inputs, sinks, &self.starts, &mut self.out, &mut self.lse);
        self
    }

    fn saved(&self) -> Saved<'_> {
        let Self { q, k, v, starts, out, lse, .. } = self;
        Saved { q, k, v, sequence_starts: starts, out, lse }
    }

    /// `dq`, `dk`, `dv`.
    fn backward(&self, isa: Isa, precision: Precision) -> [Vec<f32>; 3] {
        let dout = numbers(4, self.out.len());
        let mut gradients = [&self.q, &self.k, &self.v].map(|x| vec![f32::NAN; x.len()]);
        let [dq, dk, dv] = &mut gradients;
        attention_backward_on(isa, &self.shape, &self.saved(), precision, &dout, [dq, dk, dv]);
        gradients
    }

    fn backward_reference(&self) -> [Vec<f32>; 3] {
        let dout = numbers(4, self.out.len());
        let mut gradients = [&self.q, &self.k, &self.v].map(|x| vec![0.0; x.len()]);
        let [dq, dk, dv] = &mut gradients;
        attention_backward_reference(&self.shape, &self.saved(), self.sinks.as_deref(), &dout, [dq, dk, dv]);
        gradients
    }
}

/// As near as gradients with operands rounded to bf16 are: the error's length is a share of the whole's.
fn assert_near(found: &[f32], wanted: &[f32]) {
    let squares = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    let error = squares(&mut found.iter().zip(wanted).map(|(a, b)| a - b));
    let length = squares(&mut wanted.iter().copied());
    assert!(error <= length / 100.0 + 1e-6, "an error of {error} in {length}");
}

/// One suite for every shape: against the definition, on every instruction set, with 1, 2 and 3 threads.
fn check(heads: [usize; 3], window: Option<usize>, lengths: &[usize]) {
    check_batch(&|| Batch::new(heads, window, lengths));
}

fn check_batch(new: &(dyn Fn() -> Batch + Sync)) {
    let reference = new().reference();
    let reference_gradients = reference.backward_reference();
    let portable = new().forward(Isa::Portable);
    let gradients = portable.backward(Isa::Portable, Precision::F32);
    assert_close("out", &portable.out, &reference.out, 2e-6);
    assert_close("lse", &portable.lse, &reference.lse, 2e-6);
    for (found, wanted) in gradients.iter().zip(&reference_gradients) {
        assert_close("gradient", found, wanted, 2e-5);
    }
    for isa in Isa::available() {
        for threads in [1, 2, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let batch = new().forward(isa);
                assert_eq!(bits(&batch.out), bits(&portable.out), "{isa:?}, {threads} threads");
                assert_eq!(bits(&batch.lse), bits(&portable.lse), "{isa:?}, {threads} threads");
                for (found, wanted) in batch.backward(isa, Precision::F32).iter().zip(&gradients) {
                    assert_eq!(bits(found), bits(wanted), "{isa:?}, {threads} threads");
                }
                let rounded = batch.backward(isa, Precision::Bf16);
                for (found, wanted) in rounded.iter().zip(&gradients) {
                    assert_near(found, wanted);
                }
                assert_eq!(rounded, batch.backward(isa, Precision::Bf16), "the same bits every time");
            });
        }
    }
}

#[test]
fn training_shape() {
    check([2, 1, 32], None, &[256, 100]);
}

#[test]
fn lengths_around_the_blocks() {
    check([2, 2, 16], None, &[1, 63, 64, 65, 3, 129, 1]);
}

#[test]
fn head_dim_of_no_whole_vectors() {
    check([2, 3, 20], None, &[70, 9]);
    check([1, 1, 1], None, &[5]);
    check([1, 2, 80], Some(5), &[67]);
}

#[test]
fn windows() {
    for window in [1, 7, 63, 64, 65, 100, 1000] {
        check([1, 2, 32], Some(window), &[150, 2, 64]);
    }
}

#[test]
fn both_ways() {
    let check = |heads: [usize; 3], lengths: &[usize]| {
        check_batch(&|| {
            let mut batch = Batch::new(heads, None, lengths);
            batch.shape.bidirectional = true;
            batch
        });
    };
    check([2, 1, 32], &[50, 50, 49]);
    check([2, 2, 16], &[1, 63, 64, 65, 0, 3, 129, 200]);
    check([1, 3, 20], &[100, 300]);
}

#[test]
fn chunks_caps_sinks_and_narrower_values() {
    let plain = AttentionShape::grouped([6, 2, 24], 0.4);
    let sinks = || Some(numbers(5, 6).iter().map(|x| 2.0 * x).collect::<Vec<f32>>());
    for (shape, sinks) in [
        (AttentionShape { chunk: Some(7), ..plain }, None),
        (AttentionShape { chunk: Some(64), window: Some(100), ..plain }, None),
        (AttentionShape { chunk: Some(100), ..plain }, None),
        (AttentionShape { soft_cap: Some(1.5), ..plain }, None),
        (AttentionShape { soft_cap: Some(30.0), ..plain }, sinks()),
        (plain, sinks()),
        (AttentionShape { window: Some(5), ..plain }, sinks()),
        (AttentionShape { value_dim: 40, ..plain }, None),
        (AttentionShape { value_dim: 7, n_kv_heads: 1, ..plain }, sinks()),
    ] {
        check_batch(&|| Batch::of_shape(shape, sinks.clone(), &[150, 0, 2, 64]));
    }
}

/// Latents in f32 give the bits of the same rows as keys and values; in bf16, those of rounded rows.
#[test]
fn latents_are_keys_and_values() {
    let shape = AttentionShape { value_dim: 18, ..AttentionShape::grouped([3, 1, 25], 0.3) };
    let round = |x: &f32| half::bf16::from_f32(*x).to_f32();
    for (format, narrow) in [(CacheFormat::F32, (|x| *x) as fn(&f32) -> f32), (CacheFormat::Bf16, round)] {
        let latents = numbers(2, 150 * 25);
        let mut whole = Batch::of_shape(shape, None, &[150]);
        whole.k = latents.iter().map(narrow).collect();
        whole.v = whole.k.chunks_exact(25).flat_map(|row| row[..18].to_vec()).collect();
        for isa in Isa::available() {
            let whole = Batch { q: whole.q.clone(), k: whole.k.clone(), ..Batch::of_shape(shape, None, &[150]) };
            let whole = Batch { v: whole.k.chunks_exact(25).flat_map(|row| row[..18].to_vec()).collect(), ..whole };
            let whole = whole.forward(isa);
            let (mut cache, mut first) = (LatentCache::new(25, format), 0);
            let mut out = vec![0.0; whole.out.len()];
            for rows in [1, 2, 60, 5, 81, 1] {
                cache.push(&vec![f32::NAN; 70 * 25]);
                cache.truncate(first);
                cache.push(&latents[first * 25..(first + rows) * 25]);
                let sequence = CachedSequence { rows, cache: Cached::Latents(&cache) };
                let queries = &whole.q[first * 75..(first + rows) * 75];
                attention_cached_on(isa, &shape, queries, None, &[sequence], &mut out[first * 54..(first + rows) * 54]);
                first += rows;
            }
            assert_eq!(bits(&out), bits(&whole.out), "{isa:?}");
            let before = cache.clone();
            cache.truncate(70);
            cache.push(&latents[..25]);
            assert_eq!((before.len(), cache.len()), (150, 71));
        }
    }
}

#[test]
fn empty() {
    check([2, 2, 8], None, &[]);
    check([2, 2, 8], None, &[0, 4, 0]);
}

/// The rows of one sequence in chunks over a cache that held rubbish before.
fn chunked(isa: Isa, whole: &Batch, chunks: &[usize], rubbish: f32) -> Vec<f32> {
    let shape = &whole.shape;
    let mut cache = LayerCache::new(shape.n_kv_heads, shape.head_dim, CacheFormat::F32);
    let mut out = vec![0.0; whole.q.len()];
    let mut first = 0;
    for &rows in chunks {
        let spoiled = vec![rubbish; 70 * shape.key_width()];
        cache.push(&spoiled, &spoiled);
        cache.truncate(first);
        let fresh = first * shape.key_width()..(first + rows) * shape.key_width();
        cache.push(&whole.k[fresh.clone()], &whole.v[fresh]);
        let part = first * shape.query_width()..(first + rows) * shape.query_width();
        let sequence = CachedSequence { rows, cache: Cached::KeysValues(&cache) };
        attention_cached_on(isa, shape, &whole.q[part.clone()], None, &[sequence], &mut out[part]);
        first += rows;
    }
    out
}

#[test]
fn a_cache_in_bf16_is_attention_over_rounded_keys_and_values() {
    let round = |x: &f32| half::bf16::from_f32(*x).to_f32();
    for isa in Isa::available() {
        let mut batch = Batch::new([2, 3, 24], None, &[150]);
        let mut cache = LayerCache::new(2, 24, CacheFormat::Bf16);
        cache.push(&batch.k, &batch.v);
        (batch.k, batch.v) = (batch.k.iter().map(round).collect(), batch.v.iter().map(round).collect());
        let rounded = batch.forward(isa);
        let mut out = vec![0.0; rounded.q.len()];
        let sequence = CachedSequence { rows: 150, cache: Cached::KeysValues(&cache) };
        attention_cached_on(isa, &rounded.shape, &rounded.q, None, &[sequence], &mut out);
        assert_eq!(bits(&out), bits(&rounded.out), "{isa:?}");
    }
}

#[test]
fn a_cache_in_bytes_is_attention_over_rounded_keys_and_values() {
    let (n_kv_heads, head_dim) = (2, 24);
    let round = |rows: &[f32]| -> Vec<f32> {
        let scale = |row: &[f32]| row.iter().fold(0.0f32, |most, x| most.max(x.abs())) / 127.0;
        let rounded = |row: &[f32]| row.iter().map(|x| (x / scale(row)).round_ties_even() * scale(row)).collect();
        rows.chunks_exact(head_dim).flat_map(|row| -> Vec<f32> { rounded(row) }).collect()
    };
    let exact = Batch::new([n_kv_heads, 3, head_dim], None, &[150]);
    let mut cache = LayerCache::new(n_kv_heads, head_dim, CacheFormat::Q8);
    cache.push(&exact.k, &exact.v);
    let mut rounded = Batch::new([n_kv_heads, 3, head_dim], None, &[150]);
    (rounded.k, rounded.v) = (round(&exact.k), round(&exact.v));
    assert!(rounded.k.iter().zip(&exact.k).all(|(a, b)| (a - b).abs() < 0.02));
    let wanted = rounded.reference();
    let mut bits_of = Vec::new();
    for isa in Isa::available() {
        let mut out = vec![0.0; wanted.q.len()];
        let sequence = CachedSequence { rows: 150, cache: Cached::KeysValues(&cache) };
        attention_cached_on(isa, &wanted.shape, &wanted.q, None, &[sequence], &mut out);
        let difference = out.iter().zip(&wanted.out).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(difference < 2e-6, "{isa:?}: {difference}");
        bits_of.push(bits(&out));
    }
    assert!(bits_of.iter().all(|found| *found == bits_of[0]), "one answer on every instruction set");
}

#[test]
fn a_cache_in_bytes_is_the_same_however_it_is_filled() {
    let whole = Batch::new([2, 2, 40], Some(70), &[200]);
    let attended = |chunks: &[usize]| {
        let mut cache = LayerCache::new(2, 40, CacheFormat::Q8);
        // What is forgotten leaves nothing behind.
        cache.push(&[f32::NAN; 80 * 3], &[f32::INFINITY; 80 * 3]);
        cache.truncate(0);
        let (mut out, mut first) = (vec![0.0; whole.q.len()], 0);
        for &rows in chunks {
            let fresh = first * 80..(first + rows) * 80;
            cache.push(&whole.k[fresh.clone()], &whole.v[fresh]);
            let part = first * 160..(first + rows) * 160;
            let sequence = CachedSequence { rows, cache: Cached::KeysValues(&cache) };
            attention_cached_on(
                Isa::current(),
                &whole.shape,
                &whole.q[part.clone()],
                None,
                &[sequence],
                &mut out[part],
            );
            first += rows;
        }
        bits(&out)
    };
    let wanted = attended(&[200]);
    assert_eq!(attended(&[1; 200]), wanted);
    assert_eq!(attended(&[63, 2, 100, 35]), wanted);
}

#[test]
fn what_is_no_number_stays_none_in_bytes() {
    let mut rows = vec![1.0; 16];
    rows[3] = f32::NAN;
    let mut cache = LayerCache::new(1, 16, CacheFormat::Q8);
    cache.push(&rows, &[1.0; 16]);
    let shape = AttentionShape::grouped([1, 1, 16], 0.25);
    let mut out = vec![0.0; 16];
    attention_cached(
        &shape,
        &[1.0; 16],
        None,
        &[CachedSequence { rows: 1, cache: Cached::KeysValues(&cache) }],
        &mut out,
    );
    assert!(out[0].is_nan());
}

#[test]
fn sequences_over_their_own_caches_get_what_they_get_whole() {
    for isa in Isa::available() {
        let whole = Batch::new([2, 2, 16], Some(40), &[70, 3, 130]).forward(isa);
        let (shape, mut q, mut wanted) = (&whole.shape, Vec::new(), Vec::new());
        let (mut caches, mut counts) = (Vec::new(), Vec::new());
        // The last rows of each sequence, a different number of them.
        for (bounds, rows) in whole.starts.windows(2).zip([1, 2, 5]) {
            let queries = (bounds[1] - rows) * shape.query_width()..bounds[1] * shape.query_width();
            let keys = bounds[0] * shape.key_width()..bounds[1] * shape.key_width();
            q.extend_from_slice(&whole.q[queries.clone()]);
            wanted.extend_from_slice(&whole.out[queries]);
            let mut cache = LayerCache::new(shape.n_kv_heads, shape.head_dim, CacheFormat::F32);
            cache.push(&whole.k[keys.clone()], &whole.v[keys]);
            caches.push(cache);
            counts.push(rows);
        }
        let cached = caches.iter().zip(counts);
        let cached: Vec<_> =
            cached.map(|(cache, rows)| CachedSequence { rows, cache: Cached::KeysValues(cache) }).collect();
        let mut out = vec![0.0; q.len()];
        attention_cached_on(isa, shape, &q, None, &cached, &mut out);
        assert_eq!(bits(&out), bits(&wanted), "{isa:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_chunking_gives_the_same_bits(
        kv in 1usize..3, group in 1usize..4, head_dim in 1usize..40, length in 1usize..200,
        window in proptest::option::of(1usize..150), mut cuts in prop::collection::vec(0usize..200, 0..6),
        rubbish in prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY]),
    ) {
        let whole = Batch::new([kv, group, head_dim], window, &[length]).forward(Isa::current());
        cuts.push(length);
        cuts.sort_unstable();
        let mut before = 0;
        let chunks: Vec<usize> = cuts.iter().map(|&cut| cut.min(length)).map(|cut| {
            let rows = cut - before;
            before = cut;
            rows
        }).collect();
        let one_by_one = vec![1; length];
        for chunks in [&chunks, &one_by_one, &vec![length]] {
            prop_assert_eq!(bits(&chunked(Isa::current(), &whole, chunks, rubbish)), bits(&whole.out));
        }
    }
}

#[test]
fn cache_rubbish_and_chunks_on_every_instruction_set() {
    let whole = Batch::new([1, 3, 24], Some(90), &[140]).forward(Isa::Portable);
    for isa in Isa::available() {
        assert_eq!(bits(&chunked(isa, &whole, &[1, 2, 60, 5, 71, 1], f32::NAN)), bits(&whole.out), "{isa:?}");
    }
}

#[test]
fn a_later_token_does_not_touch_an_earlier_one() {
    let shape = [1, 1, 16];
    let clean = Batch::new(shape, None, &[80]).forward(Isa::current());
    let mut spoiled = Batch::new(shape, None, &[80]);
    spoiled.k[70 * 16..].fill(f32::NAN);
    spoiled.v[70 * 16..].fill(f32::INFINITY);
    let spoiled = spoiled.forward(Isa::current());
    assert_eq!(bits(&spoiled.out[..70 * 16]), bits(&clean.out[..70 * 16]));
}

#[test]
fn gradients_are_the_slopes() {
    let batch = Batch::new([1, 2, 5], Some(6), &[9, 3]).forward(Isa::current());
    let dout = numbers(4, batch.q.len());
    let loss = |batch: Batch| -> f64 {
        batch.reference().out.iter().zip(&dout).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
    };
    let gradients = batch.backward(Isa::current(), Precision::F32);
    let step = 1.0 / 64.0;
    for (which, gradient) in gradients.iter().enumerate() {
        for i in (0..gradient.len()).step_by(7) {
            let moved = |by: f32| {
                let mut batch = Batch::new([1, 2, 5], Some(6), &[9, 3]);
                [&mut batch.q, &mut batch.k, &mut batch.v][which][i] += by;
                loss(batch)
            };
            let slope = (moved(step) - moved(-step)) / (2.0 * f64::from(step));
            assert!((slope - f64::from(gradient[i])).abs() < 3e-3 * (1.0 + slope.abs()), "{which}[{i}]");
        }
    }
}

#[test]
fn a_clone_shares_blocks_and_goes_its_own_way() {
    let rows = numbers(9, 200 * 16);
    let other = numbers(10, 200 * 16);
    for format in [CacheFormat::F32, CacheFormat::Bf16, CacheFormat::Q8] {
        let mut origin = LayerCache::new(1, 16, format);
        origin.push(&rows[..100 * 16], &rows[..100 * 16]);
        let mut clone = origin.clone();
        clone.truncate(90);
        clone.push(&other[..60 * 16], &other[..60 * 16]);
        origin.push(&rows[100 * 16..130 * 16], &rows[100 * 16..130 * 16]);
        let alone = |parts: &[&[f32]]| {
            let mut cache = LayerCache::new(1, 16, format);
            parts.iter().for_each(|part| cache.push(part, part));
            cache
        };
        let shape = AttentionShape::grouped([1, 1, 16], 0.25);
        let attended = |cache: &LayerCache| {
            let mut out = vec![0.0; 16];
            attention_cached(
                &shape,
                &other[..16],
                None,
                &[CachedSequence { rows: 1, cache: Cached::KeysValues(cache) }],
                &mut out,
            );
            bits(&out)
        };
        assert_eq!(attended(&origin), attended(&alone(&[&rows[..130 * 16]])), "{format:?}");
        assert_eq!(attended(&clone), attended(&alone(&[&rows[..90 * 16], &other[..60 * 16]])), "{format:?}");
    }
}
