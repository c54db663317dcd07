//! One file an interface.

pub mod chat;
pub mod completions;
pub mod embeddings;
pub mod messages;
pub mod models;
pub mod moebius;
pub mod openapi;
pub mod responses;
pub mod tokens;

/// Declares a request whose fields are known by name: those of sampling, those listed, and those that change nothing.
/// Every other field is refused, as OpenAI's API does it.
macro_rules! request {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $kind:ty,)* } ignored { $($ignored:ident,)* }) => {
        $(#[$doc])*
        #[derive(Debug, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $kind,)*
            /// See [`crate::parts::sampling::SamplingFields`].
            pub temperature: Option<f32>,
            /// As above.
            pub top_p: Option<f32>,
            /// As above.
            pub top_k: Option<usize>,
            /// As above.
            pub min_p: Option<f32>,
            /// As above.
            pub repetition_penalty: Option<f32>,
            /// As above.
            pub presence_penalty: Option<f32>,
            /// As above.
            pub frequency_penalty: Option<f32>,
            /// As above.
            pub logit_bias: Option<std::collections::BTreeMap<String, f32>>,
            /// As above.
            pub seed: Option<i64>,
            /// As above.
            pub stop: Option<crate::parts::sampling::OneOrMany>,
            /// As above.
            pub max_tokens: Option<usize>,
            /// As above.
            pub ignore_eos: Option<bool>,
            $(#[allow(dead_code)] $ignored: crate::parts::sampling::Ignored,)*
        }

        impl $name {
            fn sampling(&mut self) -> crate::parts::sampling::SamplingFields {
                crate::parts::sampling::SamplingFields {
                    temperature: self.temperature,
                    top_p: self.top_p,
                    top_k: self.top_k,
                    min_p: self.min_p,
                    repetition_penalty: self.repetition_penalty,
                    presence_penalty: self.presence_penalty,
                    frequency_penalty: self.frequency_penalty,
                    logit_bias: self.logit_bias.take(),
                    seed: self.seed,
                    stop: self.stop.take(),
                    max_tokens: self.max_tokens,
                    ignore_eos: self.ignore_eos,
                }
            }
        }
    };
}
pub(crate) use request;
