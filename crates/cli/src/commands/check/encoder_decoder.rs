//! An encoder-decoder against what it must give: its cases have `X.decoder_input_ids` beside `X.input_ids`.

use anyhow::Context;
use moebius_kernels::gemm::Precision;
use moebius_kernels::select::argmax;
use moebius_model::encoder_decoder::{Encoded, EncoderDecoder, EncoderDecoderConfig};
use moebius_model::{Batch, Observer, Silent};
use moebius_moe::Routing;
use moebius_tensor::{Gradients, Graph, Var};
use std::path::Path;

use super::golden::{Case, Golden};
use super::report::{Report, Worst};

/// Checks a folder.
///
/// # Errors
/// A golden that cannot be read, or whatever the model reports.
pub fn check(folder: &Path, tolerance: f64) -> anyhow::Result<Report> {
    let model = EncoderDecoder::load(folder)?;
    let golden = Golden::open(folder)?;
    let mut report = Report::new(tolerance);
    older_spelling(&model, folder, &mut report)?;
    for case in golden.cases(model.config.vocab_size)? {
        let targets = golden.token_rows(&format!("{}.decoder_input_ids", case.name), model.config.vocab_size)?;
        forward(&model, &golden, &case, &targets, &mut report)?;
        greedy(&model, &golden, &case, &mut report)?;
        backward(&model, &golden, &case, &targets, &mut report)?;
    }
    Ok(report)
}

/// `config.v4.json` must mean the same model.
fn older_spelling(model: &EncoderDecoder, folder: &Path, report: &mut Report) -> anyhow::Result<()> {
    let path = folder.join("config.v4.json");
    if path.exists() {
        let name = path.display().to_string();
        let config = EncoderDecoderConfig::read(&std::fs::read(&path).with_context(|| name.clone())?, &name)?;
        let mut worst = Worst::default();
        worst.compare_equal(config == model.config, || format!("wanted {:?}, found {config:?}", model.config));
        report.exact("config.v4", &worst);
    }
    Ok(())
}

#[derive(Default)]
struct Seen {
    hidden: Vec<Var>,
    routing: Vec<(usize, Routing)>,
}

impl Observer for Seen {
    fn hidden(&mut self, _: usize, hidden: &Var) {
        self.hidden.push(hidden.clone());
    }

    fn routing(&mut self, layer: usize, routing: &Routing) {
        self.routing.push((layer, routing.clone()));
    }
}

/// The encoder's answer, hidden states of the decoder, logits, routing of both.
fn forward(
    model: &EncoderDecoder,
    golden: &Golden,
    case: &Case,
    targets: &[Vec<u32>],
    report: &mut Report,
) -> anyhow::Result<()> {
    let (g, name) = (Graph::inference(Precision::F32), |quantity: &str| format!("{}.{quantity}", case.name));
    let (mut encoder, mut decoder) = (Seen::default(), Seen::default());
    let encoded = model.encode(&g, &Batch::of_sequences(&case.sequences), &mut encoder)?;
    let hidden = model.decode(&g, &encoded, &Batch::of_sequences(targets), &mut decoder)?;
    let mut quantity = |what: &str, found: &[(String, &[f32])]| -> anyhow::Result<()> {
        let mut worst = Worst::default();
        for (name, found) in found {
            worst.compare_known(name, golden.floats(name)?.as_deref(), found);
        }
        report.quantity(&name(what), &worst);
        Ok(())
    };
    quantity("encoder", &[(name("encoder_last_hidden"), encoded.hidden.data())])?;
    let states = decoder.hidden.iter().enumerate().map(|(i, x)| (name(&format!("hidden.{i}")), x.data()));
    quantity("hidden", &states.collect::<Vec<_>>())?;
    quantity("logits", &[(name("logits"), model.logits(&g, &hidden).data())])?;
    for (stack, seen) in [("enc", &encoder), ("dec", &decoder)] {
        let (mut logits, mut experts, mut weights) = (Worst::default(), Worst::default(), Worst::default());
        for (layer, routing) in &seen.routing {
            let name = |quantity: &str| format!("{}.{quantity}.{stack}.{layer}", case.name);
            logits.compare_known(
                &name("router_logits"),
                golden.floats(&name("router_logits"))?.as_deref(),
                routing.logits.data(),
            );
            // Dropped tokens have no expert: -1.
            let found =
                routing.topk_index.iter().map(|&expert| if expert == u32::MAX { -1 } else { i64::from(expert) });
            let wanted = golden.integers(&name("topk_index"))?.unwrap_or_default();
            experts.compare_count(&name("topk_index"), wanted.len(), routing.topk_index.len());
            for (token, (wanted, found)) in wanted.into_iter().zip(found).enumerate() {
                experts.compare_equal(wanted == found, || {
                    format!("{}[{token}]: wanted {wanted}, found {found}", name("topk_index"))
                });
            }
            weights.compare_known(
                &name("topk_weight"),
                golden.floats(&name("topk_weight"))?.as_deref(),
                routing.topk_weight.data(),
            );
        }
        report.quantity(&format!("{}.router.{stack}", case.name), &logits);
        report.exact(&format!("{}.experts.{stack}", case.name), &experts);
        report.quantity(&format!("{}.weights.{stack}", case.name), &weights);
    }
    Ok(())
}

/// Greedy tokens with carried states, and by writing the whole sequence anew for each token.
fn greedy(model: &EncoderDecoder, golden: &Golden, case: &Case, report: &mut Report) -> anyhow::Result<()> {
    let g = Graph::inference(Precision::F32);
    for (quantity, cached) in [("greedy", true), ("greedy_nocache", false)] {
        let name = format!("{}.{quantity}", case.name);
        let mut worst = Worst::default();
        let wanted = golden.integers(&name)?.unwrap_or_default();
        let length = wanted.len() / case.sequences.len();
        for (row, (prompt, wanted)) in case.sequences.iter().zip(wanted.chunks(length.max(1))).enumerate() {
            let encoded = model.encode(&g, &Batch::of_sequences(&[prompt]), &mut Silent)?;
            let found = if cached { model.generate(&g, prompt, length)? } else { anew(model, &g, &encoded, length)? };
            for (at, (&wanted, &found)) in wanted.iter().zip(&found).enumerate() {
                let place = || format!("{name}[{row}, {at}]: wanted {wanted}, found {found}");
                worst.compare_equal(wanted == i64::from(found), place);
            }
        }
        report.exact(&name, &worst);
    }
    Ok(())
}

fn anew(model: &EncoderDecoder, g: &Graph<'_>, encoded: &Encoded, length: usize) -> anyhow::Result<Vec<u32>> {
    let mut tokens = vec![model.config.start_token];
    let inference = Graph::inference(g.precision());
    while tokens.len() <= length {
        let hidden = model.decode(&inference, encoded, &Batch::of_sequences(&[&tokens]), &mut Silent)?;
        let logits = model.logits(&inference, &hidden);
        let last = &logits.data()[logits.data().len() - model.config.vocab_size..];
        tokens.push(argmax(last).context("a vocabulary")? as u32);
    }
    Ok(tokens.split_off(1))
}

/// The loss, and for case `a` the gradients.
fn backward(
    model: &EncoderDecoder,
    golden: &Golden,
    case: &Case,
    targets: &[Vec<u32>],
    report: &mut Report,
) -> anyhow::Result<()> {
    let g = Graph::training(Precision::F32);
    let next: Vec<u32> = targets.iter().flat_map(|row| [&row[1..], &[u32::MAX]].concat()).collect();
    let (loss, _) = model.loss(&g, &Batch::of_sequences(&case.sequences), &Batch::of_sequences(targets), &next)?;
    let name = |quantity: &str| format!("{}.{quantity}", case.name);
    let mut worst = Worst::default();
    worst.compare_known(&name("loss"), golden.floats(&name("loss"))?.as_deref(), loss.data());
    report.quantity(&name("loss"), &worst);
    let Some(wanted) = golden.gradients()?.filter(|_| case.name == "a") else { return Ok(()) };
    let (mut gradients, mut worst) = (Gradients::new(), Worst::default());
    g.backward(&loss, &mut gradients);
    let found = model.named_tensors(|param| gradients.get(param.id()));
    for found in &found {
        worst.compare(&found.name, &wanted.tensor(&found.name)?.to_f32()?, &found.data);
    }
    worst.compare_count("gradients of tensors", wanted.tensors().count(), found.len());
    report.quantity(&name("gradients"), &worst);
    Ok(())
}
