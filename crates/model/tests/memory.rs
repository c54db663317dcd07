//! Memory that a long context takes: in proportion to its length, not to its square.
//!
//! One test alone, for what is measured belongs to the whole process.

use moebius_kernels::attention::CacheFormat;
use moebius_kernels::gemm::Precision;
use moebius_kernels::memory::statistics;
use moebius_model::{Batch, Ffn, KvCache, Model, Silent, UniformDecoder};
use moebius_tensor::Graph;

/// The most memory that buffers have taken when so many tokens were read at once and one behind them.
fn peak(model: &Model, format: CacheFormat, tokens: usize) -> usize {
    let (g, mut cache) = (Graph::inference(Precision::F32), KvCache::new(&model.config, format));
    let prompt: Vec<u32> = (0..tokens as u32).map(|token| token * 31 % 40).collect();
    for (part, first) in [(&prompt[..], 0), (&[7], tokens)] {
        model.forward(&g, &Batch::continuing(part, first), Some(&mut [&mut cache]), &mut Silent).unwrap();
    }
    statistics().peak_used
}

#[test]
fn a_long_context_takes_memory_in_proportion_to_its_length() {
    let decoder = UniformDecoder {
        family: "llama",
        vocab_size: 40,
        hidden: 32,
        n_layers: 1,
        n_heads: 4,
        n_kv_heads: 2,
        head_dim: 8,
        max_positions: 8200,
        ffn: Ffn::dense(32),
        ..UniformDecoder::default()
    };
    let model = Model::new(&decoder.config(), 1).unwrap();
    let peaks = |tokens| [CacheFormat::F32, CacheFormat::Bf16, CacheFormat::Q8].map(|f| peak(&model, f, tokens));
    // The most there ever was, so that short contexts come first.
    let (short, long) = (peaks(2048)[2], peaks(8192)[2]);
    assert!(long > short && long < 6 * short, "{short} bytes for 2048 tokens, {long} for 8192");
    // A single head's scores would be more.
    assert!(long < 8192 * 8192 * size_of::<f32>() / 4, "{long}");
}
