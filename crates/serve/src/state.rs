//! What all requests share.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use moebius_engine::{ChatTemplate, GenerationDefaults, GrammarCompiler, Scheduler, Tokenizer};
use moebius_model::Model;
use serde::Serialize;

use crate::error::ApiError;
use crate::keys::Keys;
use crate::metrics::Metrics;
use crate::options::ServeOptions;
use crate::parts::calls::ToolFormat;

/// A model with what belongs to it.
pub struct ServedModel {
    /// The model.
    pub model: Model,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat template; without one, conversations are refused.
    pub template: Option<ChatTemplate>,
    /// What its makers advise.
    pub defaults: GenerationDefaults,
    /// What its weights are held in, in words.
    pub weights: String,
}

/// Facts about the model for those who ask.
#[derive(Clone, Debug, Serialize)]
pub struct ModelCard {
    /// The name towards clients.
    pub name: String,
    /// The family it belongs to.
    pub family: String,
    /// Layers.
    pub layers: usize,
    /// Those with experts.
    pub moe_layers: Vec<usize>,
    /// Experts in each; 0 without.
    pub n_experts: usize,
    /// Experts that a token is sent to.
    pub top_k: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// The longest sequence.
    pub context: usize,
    /// How many weights there are.
    pub parameters: Parameters,
    /// What the weights are held in.
    pub weights: String,
    /// Bytes of keys and values that a token takes.
    pub kv_bytes_per_token: usize,
    /// Whether it can hold a conversation.
    pub chat_template: bool,
}

/// How many weights a model has.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Parameters {
    /// All of them.
    pub total: usize,
    /// Those that take part in a token.
    pub active: usize,
}

/// The shared state; cheap to clone.
#[derive(Clone)]
pub struct App(Arc<Shared>);

/// See [`App`].
pub struct Shared {
    /// How the server is set up.
    pub options: ServeOptions,
    /// Takes requests.
    pub scheduler: Scheduler,
    /// Facts about the model.
    pub card: ModelCard,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// The bytes of each token.
    pub token_bytes: Vec<Vec<u8>>,
    /// Its chat template.
    pub template: Option<ChatTemplate>,
    /// What its makers advise, the template's end token among its end tokens.
    pub defaults: GenerationDefaults,
    /// Makes constraints.
    pub compiler: GrammarCompiler,
    /// How the model writes that it calls a tool.
    pub tool_format: ToolFormat,
    /// Who may ask.
    pub keys: Keys,
    /// What is counted of requests.
    pub metrics: Metrics,
    /// Seconds since 1970 at which the server began.
    pub created: u64,
    next_id: AtomicU64,
}

impl Deref for App {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl App {
    /// Joins the parts; the model itself stays with the thread that computes.
    ///
    /// # Errors
    /// A tokenizer that grammars cannot use.
    pub fn new(served: &ServedModel, tokenizer: Arc<Tokenizer>, options: ServeOptions) -> Result<Self, ApiError> {
        let scheduler = Scheduler::new(&served.model, options.scheduler.clone());
        let mut defaults = served.defaults.clone();
        let ends = served.template.iter().filter_map(|template| template.special("eos_token"));
        for end in ends.filter_map(|name| tokenizer.token_id(name)) {
            if !defaults.end_tokens.contains(&end) {
                defaults.end_tokens.push(end);
            }
        }
        let card = card(served, &options.model_name, scheduler.bytes_per_token());
        let compiler = GrammarCompiler::new(&tokenizer, card.vocab, &defaults.end_tokens)?;
        let tool_format = ToolFormat::of(served.template.as_ref());
        let metrics = Metrics::new();
        let keys = Keys::new(&options.api_keys);
        Ok(Self(Arc::new(Shared {
            scheduler,
            card,
            token_bytes: tokenizer.token_bytes(),
            tokenizer,
            template: served.template.clone(),
            defaults,
            compiler,
            tool_format,
            keys,
            metrics,
            created: now(),
            next_id: AtomicU64::new(rand::random()),
            options,
        })))
    }

    /// An id that no other answer of this server has.
    pub fn new_id(&self, prefix: &str) -> String {
        // Odd, so that every number comes once before one comes again.
        const SPREAD: u64 = 0x9E37_79B9_7F4A_7C15;
        let number = self.next_id.fetch_add(1, Ordering::Relaxed).wrapping_mul(SPREAD);
        format!("{prefix}{number:016x}")
    }
}

fn card(served: &ServedModel, name: &str, kv_bytes_per_token: usize) -> ModelCard {
    let (model, config) = (&served.model, &served.model.config);
    let count = model.count_params();
    let (top_k, n_experts) = model.experts().unwrap_or((0, 0));
    let moe_layers = moe_layers(model);
    ModelCard {
        name: name.to_string(),
        family: config.family.clone(),
        layers: config.layers.len(),
        moe_layers,
        n_experts,
        top_k,
        hidden: config.hidden,
        vocab: config.vocab_size,
        context: config.max_positions,
        parameters: Parameters { total: count.total, active: count.active },
        weights: served.weights.clone(),
        kv_bytes_per_token,
        chat_template: served.template.is_some(),
    }
}

/// The layers whose weights are stacked by expert.
fn moe_layers(model: &Model) -> Vec<usize> {
    let of = |name: &str| name.strip_prefix("layers.")?.split('.').next()?.parse().ok();
    let stacked = model.params().into_iter().filter(|param| param.shape().len() == 3);
    let mut layers: Vec<usize> = stacked.filter_map(|param| of(param.name())).collect();
    layers.sort_unstable();
    layers.dedup();
    layers
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}
