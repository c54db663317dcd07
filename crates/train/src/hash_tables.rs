//! Tables of hash routers that come of the data (Roller et al. 2021): counted on the training tokens, or clustered from the
//! embeddings of a model that is trained already.

use moebius_model::Model;
use moebius_moe::routers::{OptionValue, balanced_table, clustered_table, dispersed_table};
use moebius_tensor::Tensor;

use crate::data::corpus::Corpus;
use crate::recipe::RouterSection;
use crate::{Recipe, Result, TrainError, model_folder};

/// Rounds of k-means: clusters of a few thousand embeddings hardly move after these.
const ROUNDS: usize = 20;

/// Writes the table that the recipe's router asks for into a new model's layers; nothing if it asks for none.
///
/// # Errors
/// A model of embeddings that cannot be read or has another vocabulary.
pub(crate) fn fill(model: &mut Model, recipe: &Recipe, corpus: &Corpus) -> Result<()> {
    let Some(router) = &recipe.router else { return Ok(()) };
    let experts = recipe.model.experts.unwrap_or(1);
    let options = router.method().options;
    let table = match router.table() {
        Some("counted") => balanced_table(&frequencies(corpus), experts),
        Some(kind @ ("clustered" | "dispersed")) => {
            let seed = match options.get("seed") {
                Some(OptionValue::Number(seed)) => *seed as u64,
                _ => 42,
            };
            let clusters = clustered_table(&embeddings(router, recipe, corpus)?, experts, ROUNDS, seed);
            if kind == "clustered" { clusters } else { dispersed_table(&clusters, experts) }
        }
        _ => return Ok(()),
    };
    for param in model.params_mut().into_iter().filter(|param| param.name().ends_with(".moe.table")) {
        param.update(|weights| weights.iter_mut().zip(&table).for_each(|(weight, &expert)| *weight = expert as f32));
    }
    Ok(())
}

/// How often each id stands among the training tokens.
fn frequencies(corpus: &Corpus) -> Vec<u64> {
    let mut counts = vec![0; corpus.tokenizer.vocab_size()];
    for shard in &corpus.train {
        (0..shard.len()).for_each(|at| counts[shard.token(at) as usize] += 1);
    }
    counts
}

/// The embeddings of the model that the recipe names.
fn embeddings(router: &RouterSection, recipe: &Recipe, corpus: &Corpus) -> Result<Tensor> {
    let folder = recipe.resolve(router.embeddings().unwrap_or_default().as_ref());
    let model = model_folder::load(&folder)?;
    let (wanted, found) = (corpus.tokenizer.vocab_size(), model.config.vocab_size);
    if wanted != found {
        let message = format!("router.embeddings: wanted a model of {wanted} tokens as here, found {found}");
        return Err(TrainError::Data { what: folder.display().to_string(), message });
    }
    let params = model.params();
    let embedding = params.iter().find(|param| param.name() == "embedding").expect("every model has an embedding");
    Ok(embedding.value().clone())
}
