//! Writes the samples of a training run: the engine on the weights as they stand.

use std::ops::ControlFlow;

use moebius_engine::{Event, GenerationOptions, Generator, SamplingOptions, Tokenizer};
use moebius_kernels::gemm::Precision;
use moebius_model::Model;
use moebius_train::data::tokenizer::{END_OF_TEXT_ID, TextTokenizer};
use moebius_train::recipe::SampleSection;
use moebius_train::samples::SampleWriter;

/// The engine, lent to a trainer.
pub struct EngineWriter {
    precision: Precision,
    /// Made at the first sample: a run has one tokenizer.
    tokenizer: Option<Tokenizer>,
}

impl EngineWriter {
    /// A writer whose products are computed as the run's.
    pub fn new(precision: Precision) -> Self {
        Self { precision, tokenizer: None }
    }
}

impl SampleWriter for EngineWriter {
    fn write(
        &mut self,
        model: &Model,
        tokenizer: &TextTokenizer,
        prompt: &str,
        settings: &SampleSection,
    ) -> Result<String, String> {
        let tokenizer = match &mut self.tokenizer {
            Some(tokenizer) => tokenizer,
            empty => {
                let read = Tokenizer::from_bytes(tokenizer.json().as_bytes(), "the run's tokenizer.json");
                empty.insert(read.map_err(|error| error.to_string())?)
            }
        };
        let temperature = settings.temperature as f32;
        let options = GenerationOptions {
            sampling: SamplingOptions { temperature, seed: settings.seed, ..SamplingOptions::greedy() },
            max_tokens: settings.tokens,
            end_tokens: vec![END_OF_TEXT_ID],
            ..GenerationOptions::default()
        };
        let mut text = String::new();
        let generator = Generator::new(model, tokenizer, self.precision);
        generator
            .generate(prompt, &options, &mut |event| {
                if let Event::Text(piece) = event {
                    text.push_str(&piece);
                }
                ControlFlow::Continue(())
            })
            .map_err(|error| error.to_string())?;
        Ok(text)
    }
}
