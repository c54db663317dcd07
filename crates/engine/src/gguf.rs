//! What a GGUF file says beside its weights: tokenizer, chat template, the tokens that end a text.

use moebius_model::ModelError;
use moebius_model::gguf::{GgufFile, Metadata};

use crate::tokenizer::{TokenType, TokenizerParts};
use crate::{ChatTemplate, EngineError, GenerationDefaults, Tokenizer};

/// Keys of tokens that end a text or a turn.
const ENDS: [&str; 3] = ["eos_token_id", "eot_token_id", "eom_token_id"];

fn key(name: &str) -> String {
    format!("tokenizer.ggml.{name}")
}

/// The pieces of a file's tokenizer.
///
/// # Errors
/// [`EngineError::Model`]: the key that is missing or of another type.
pub fn tokenizer_parts(file: &GgufFile) -> Result<TokenizerParts, EngineError> {
    let metadata = file.metadata();
    let id = |name| metadata.optional_u32(&key(name));
    let flag = |name| metadata.optional_flag(&key(name));
    let text = |name| metadata.optional_text(&key(name)).map(|text| text.map(str::to_string));
    let texts = |name| -> Result<Vec<String>, ModelError> {
        let array = metadata.optional_array(&key(name))?;
        let texts = array.map_or(Ok(Vec::new()), |array| array.texts())?;
        Ok(texts.into_iter().map(str::to_string).collect())
    };
    let scores = metadata.optional_array(&key("scores"))?.map_or(Ok(Vec::new()), |array| array.f32s())?;
    Ok(TokenizerParts {
        model: metadata.text(&key("model"))?.to_string(),
        pre: text("pre")?,
        tokens: texts("tokens")?,
        scores,
        token_types: token_types(&metadata)?,
        merges: texts("merges")?,
        bos: id("bos_token_id")?,
        eos: id("eos_token_id")?,
        unknown: id("unknown_token_id")?,
        padding: id("padding_token_id")?,
        add_bos: flag("add_bos_token")?,
        add_eos: flag("add_eos_token")?,
        add_space_prefix: flag("add_space_prefix")?,
        remove_extra_whitespaces: flag("remove_extra_whitespaces")?.unwrap_or(false),
        character_map: Vec::new(),
        chat_template: metadata.optional_text("tokenizer.chat_template")?.map(str::to_string),
    })
}

fn token_types(metadata: &Metadata) -> Result<Vec<TokenType>, ModelError> {
    let name = key("token_type");
    let numbers = metadata.optional_array(&name)?.map_or(Ok(Vec::new()), |array| array.i32s())?;
    let of = |number: i32| {
        let known = TokenType::from_number(number.into());
        known.ok_or_else(|| metadata.error(&name, format!("wanted types 1 to 6, found {number}")))
    };
    numbers.into_iter().map(of).collect()
}

/// The file's tokenizer.
///
/// # Errors
/// [`EngineError`]: metadata that is missing, of another type, or that makes no tokenizer.
pub fn tokenizer(file: &GgufFile) -> Result<Tokenizer, EngineError> {
    tokenizer_parts(file)?.build(file.name())
}

/// The file's chat template with the special tokens that it may name; none if the file has none.
///
/// # Errors
/// [`EngineError`]: metadata of another type, a template that is no Jinja.
pub fn chat_template(file: &GgufFile) -> Result<Option<ChatTemplate>, EngineError> {
    let parts = tokenizer_parts(file)?;
    let Some(text) = &parts.chat_template else { return Ok(None) };
    let mut template = ChatTemplate::new(text, file.name())?;
    for (name, id) in [("bos_token", parts.bos), ("eos_token", parts.eos), ("unk_token", parts.unknown)] {
        if let Some(token) = id.and_then(|id| parts.tokens.get(id as usize)) {
            template = template.with_special(name, token);
        }
    }
    Ok(Some(template))
}

/// The tokens that end a text or a turn.
///
/// # Errors
/// [`EngineError::Model`]: metadata of another type.
pub fn generation_defaults(file: &GgufFile) -> Result<GenerationDefaults, EngineError> {
    let metadata = file.metadata();
    let mut end_tokens = Vec::new();
    for name in ENDS {
        end_tokens.extend(metadata.optional_u32(&key(name))?.filter(|id| !end_tokens.contains(id)));
    }
    Ok(GenerationDefaults { end_tokens, ..GenerationDefaults::default() })
}
