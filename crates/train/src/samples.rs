//! Texts that the model writes while it learns.
//!
//! How text is written is the engine's business, which this crate does not know: whoever starts a run lends it a
//! [`SampleWriter`]. Samples have seeds of their own and leave the run's bits alone.

use moebius_model::Model;

use crate::data::tokenizer::TextTokenizer;
use crate::recipe::SampleSection;

/// Writes a text with a model.
pub trait SampleWriter {
    /// Goes on from `prompt`, as `settings` say; gives what comes after it.
    ///
    /// # Errors
    /// Why it cannot, in a line.
    fn write(
        &mut self,
        model: &Model,
        tokenizer: &TextTokenizer,
        prompt: &str,
        settings: &SampleSection,
    ) -> Result<String, String>;
}
