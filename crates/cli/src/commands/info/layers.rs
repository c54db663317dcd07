//! Layers in words: what mixes tokens, what computes on each.

use moebius_model::config::{Ffn, Mixer, ModelConfig, Reach};

/// What carries numbers from token to token.
pub fn mixer(mixer: &Mixer) -> String {
    match mixer {
        Mixer::Attention(attention) => {
            let (heads, dim, kv_heads) = (attention.n_heads, attention.head_dim, attention.n_kv_heads);
            let mut text = format!("attention, {heads} heads of {dim}, {kv_heads} of keys and values");
            match attention.reach {
                Reach::All => {}
                Reach::Window(window) => text += &format!(", window {window}"),
                Reach::Chunk(chunk) => text += &format!(", chunks of {chunk}"),
            }
            for (has, what) in [
                (attention.rope.is_none(), ", no positions"),
                (attention.sinks, ", sinks"),
                (attention.gated, ", gated"),
            ] {
                text += if has { what } else { "" };
            }
            text
        }
        Mixer::Latent(latent) => {
            format!("latent attention, {} heads, latents of {} + {}", latent.n_heads, latent.kv_rank, latent.rope_dim)
        }
        Mixer::HeadMixture(heads) => format!(
            "attention heads as experts, {} a token of {}, {} heads of {} each",
            heads.router.top_k, heads.n_experts, heads.n_kv_heads, heads.head_dim
        ),
        Mixer::DeltaNet(net) => format!(
            "gated delta rule, {} heads of values of {}, {} of keys of {}",
            net.value_heads, net.value_dim, net.key_heads, net.key_dim
        ),
        Mixer::ShortConvolution(convolution) => format!("convolution over {} tokens", convolution.taps),
        Mixer::Mamba(mamba) => format!("mamba, {} channels of {} states", mamba.width, mamba.states),
    }
}

/// What computes on each token by itself.
pub fn ffn(config: &ModelConfig, ffn: &Ffn) -> String {
    match ffn {
        Ffn::Dense(dense) => format!("dense {}", dense.width),
        Ffn::Moe(moe) => {
            let mut text = format!("{} experts of {}, {} a token", moe.n_experts, moe.width, moe.router.top_k);
            if let Some(method) = &config.routing {
                text += &format!(" by {}", method.name);
            }
            if let Some(shared) = moe.shared {
                text += &format!(", shared {}", shared.width);
            }
            text
        }
    }
}

/// Numbers of layers, rising, as people write them: `0-2, 4-6`, and how many there are if that grows long.
pub fn numbers(layers: &[usize]) -> String {
    const MOST: usize = 3;
    let mut ranges: Vec<[usize; 2]> = Vec::new();
    for &layer in layers {
        match ranges.last_mut() {
            Some([_, last]) if *last + 1 == layer => *last = layer,
            _ => ranges.push([layer, layer]),
        }
    }
    let shown = ranges.iter().take(MOST).map(|[first, last]| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    });
    let text = shown.collect::<Vec<_>>().join(", ");
    if ranges.len() > MOST { format!("{text}, ... ({} layers)", layers.len()) } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_that_follow_each_other_are_a_range() {
        assert_eq!(numbers(&[0]), "0");
        assert_eq!(numbers(&[3, 4, 5, 60]), "3-5, 60");
        let three_of_four: Vec<usize> = (0..48).filter(|layer| layer % 4 != 3).collect();
        assert_eq!(numbers(&three_of_four), "0-2, 4-6, 8-10, ... (36 layers)");
    }
}
