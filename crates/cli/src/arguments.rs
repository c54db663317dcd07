//! The command line: every flag stands here, with the help that a user reads.

mod precision;

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use moebius_kernels::formats::Format;
use moebius_model::RunFormat;

pub use precision::{Dtype, RunPrecision};

const EXAMPLES: &str = "\
Examples:
  moebius run \"Once upon a\"                          write on with the model inside this binary
  moebius train recipes/tiny.toml --out runs/tiny   train a model in minutes
  moebius run --model runs/tiny/model \"The sea\"     and run it
  moebius eval --model runs/tiny/model --text FILE  measure it
  moebius chat --model DIR                          talk with a model that was trained to

`moebius COMMAND --help` explains each command. A failure prints one line and exits with 1, wrong usage with 2.";

/// Train and run sparse Mixture-of-Experts language models.
#[derive(Debug, Parser)]
#[command(name = "moebius", version, after_help = EXAMPLES, max_term_width = 120)]
pub struct Arguments {
    /// Threads to compute with [default: one a core]. The results do not depend on it.
    #[arg(long, global = true, value_name = "N")]
    pub threads: Option<NonZeroUsize>,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Write on from a prompt
    Run(RunArguments),
    /// Write a model as it runs: in 4 to 16 bits a weight, started without loading
    Pack(PackArguments),
    /// Talk with a model in the terminal
    Chat(ChatArguments),
    /// Train a model by a recipe
    Train(TrainArguments),
    /// Train several recipes on the same tokens over several seeds, and compare them
    Compare(CompareArguments),
    /// Measure loss, perplexity and bits a byte on a text
    Eval(EvalArguments),
    /// Measure speed, against what the machine can do
    Bench(BenchArguments),
    /// Serve a model over HTTP: OpenAI's interface, and a page that shows the experts
    Serve(Box<crate::commands::serve::arguments::ServeArguments>),
    /// Load a server with requests and measure what comes back
    Load(crate::commands::load::arguments::LoadArguments),
    /// Write a model as a GGUF file, which llama.cpp runs
    Export(ExportArguments),
    /// Tell what a model is made of: parameters, bytes, cache, FLOPs
    Info(crate::commands::info::InfoArguments),
    /// Write the logits of given tokens to a file
    Logits(LogitsArguments),
    /// Compare with golden folders: logits, routing, greedy tokens, losses, gradients
    Check(CheckArguments),
}

const RUN_EXAMPLES: &str = "\
Examples:
  moebius run \"Once upon a\"
  moebius run --temperature 0 --max-tokens 40 \"In the beginning\"
  echo \"The old man\" | moebius run --stop . --stop !
  moebius run --model runs/tiny/model --show-experts \"The sea\"

The text goes to standard output (on a terminal with the prompt before it), a line of figures to \
standard error. A sampling option that is not given is taken from the model's \
generation_config.json, or else from the default.";

/// `moebius run`.
#[derive(Debug, Args)]
#[command(after_help = RUN_EXAMPLES)]
pub struct RunArguments {
    /// The beginning of the text; absent or `-`: read from standard input, less one newline at its end
    pub prompt: Option<String>,

    /// A folder in Hugging Face's layout [default: the model inside this binary]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,

    /// How tokens are chosen
    #[command(flatten)]
    pub sampling: SamplingArguments,

    /// Stop after N tokens, at the latest when the model's context is full
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub max_tokens: usize,

    /// What it is run in
    #[command(flatten)]
    pub precision: RunPrecision,

    /// Print a line for each token (`>` marks the prompt): the experts that each layer chose for it, heaviest first
    #[arg(long)]
    pub show_experts: bool,
}

/// How tokens are chosen, and what ends the text.
#[derive(Debug, Args)]
pub struct SamplingArguments {
    /// Divides the logits: 0 always takes the likeliest token, above 1 is bolder [default: 0.8]
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f32>,

    /// Choose among the K likeliest tokens, 0 for all [default: 0]
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,

    /// Choose among the fewest tokens that together have probability P [default: 0.95]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f32>,

    /// Drop tokens less than P times as likely as the likeliest [default: 0]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub min_p: Option<f32>,

    /// Weaken tokens that have occurred, above 1 [default: 1]
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f32>,

    /// The same seed gives the same text
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,

    /// Stop before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
}

const CHAT_EXAMPLES: &str = "\
Examples:
  moebius chat --model DIR
  moebius chat --model DIR --system \"Answer in one sentence.\" --temperature 0.6
  echo \"Name three rivers.\" | moebius chat --model DIR

Each line is a message. /help lists the commands. Ctrl-C ends an answer, at the prompt it leaves. Without a \
terminal, lines come from standard input and the answers alone go to standard output.";

/// `moebius chat`.
#[derive(Debug, Args)]
#[command(after_help = CHAT_EXAMPLES)]
pub struct ChatArguments {
    /// A folder in Hugging Face's layout, of a model that was trained to chat
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,

    /// The instruction that stands before the conversation
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,

    /// A Jinja chat template to use instead of the model's
    #[arg(long, value_name = "FILE")]
    pub template: Option<PathBuf>,

    /// How tokens are chosen
    #[command(flatten)]
    pub sampling: SamplingArguments,

    /// End an answer after N tokens [default: when the model's context is full]
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<usize>,

    /// What it is run in
    #[command(flatten)]
    pub precision: RunPrecision,

    /// After each answer, print counts and speeds to standard error
    #[arg(long)]
    pub figures: bool,
}

const PACK_EXAMPLES: &str = "\
Examples:
  moebius pack runs/tiny/model --format q8_0 --out runs/tiny/packed
  moebius pack model.gguf --out packed       block formats keep their bits
  moebius run --model packed \"The sea\"

The folder holds the weights in the order in which they are read; running it maps the file into \
memory, so that it starts at once and several processes share it. It cannot be trained. The \
embedding and the head are held in at least six bits, matrices whose rows a format's blocks do not divide in bf16.";

/// `moebius pack`.
#[derive(Debug, Args)]
#[command(after_help = PACK_EXAMPLES)]
pub struct PackArguments {
    /// A folder in Hugging Face's layout, or a GGUF file
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,

    /// What the weights are held in: stored, f32, bf16, or a block format: q8_0, q4_0, q4_1, q5_0, q5_1,
    /// q2_k, q3_k, q4_k, q5_k, q6_k, iq4_nl, iq4_xs, mxfp4
    #[arg(long, value_name = "FORMAT", default_value_t = RunFormat::AsStored)]
    pub format: RunFormat,

    /// The folder to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,

    /// Write over a folder that holds something already
    #[arg(long)]
    pub force: bool,
}

const TRAIN_EXAMPLES: &str = "\
Examples:
  moebius train recipes/tiny.toml --out runs/tiny
  moebius train recipes/tiny.toml --out runs/tiny --resume   go on from the last checkpoint

DIR gets checkpoints/step-N/, metrics.jsonl, plot.svg and at the end model/, a folder in Hugging \
Face's layout. Ctrl-C ends with a checkpoint, a second ctrl-C at once. A resumed run gives the same bits as \
an unbroken one.";

/// `moebius train`.
#[derive(Debug, Args)]
#[command(after_help = TRAIN_EXAMPLES)]
pub struct TrainArguments {
    /// The recipe, a TOML file
    pub recipe: PathBuf,

    /// The folder for everything that the run writes
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,

    /// Go on from the last checkpoint in DIR
    #[arg(long, conflicts_with = "force")]
    pub resume: bool,

    /// Begin anew where DIR holds a run already, which is deleted
    #[arg(long)]
    pub force: bool,
}

const COMPARE_EXAMPLES: &str = "\
Examples:
  moebius compare dense.toml sparse.toml --out runs/comparison
  moebius compare dense.toml sparse.toml wide.toml --out runs/comparison --seeds 1,2,3,4,5 --json

All recipes must have the same [data], [tokenizer], sequence_length, tokens a step and sequences in a validation; the \
first is what the others are measured against. DIR gets runs/, compare.json and compare.html. A run is known by the \
content of its recipe and its seed: one that is there is not made again, one that was interrupted goes on.";

/// `moebius compare`.
#[derive(Debug, Args)]
#[command(after_help = COMPARE_EXAMPLES)]
pub struct CompareArguments {
    /// The recipes, two or more
    #[arg(required = true, value_name = "RECIPE")]
    pub recipes: Vec<PathBuf>,

    /// The folder for everything that the comparison writes
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,

    /// The seeds, instead of the recipes' own
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_values_t = [1, 2, 3])]
    pub seeds: Vec<u64>,

    /// Print one JSON object instead of tables
    #[arg(long)]
    pub json: bool,
}

const EVAL_EXAMPLES: &str = "\
Examples:
  moebius eval --text book.txt
  moebius eval --model runs/tiny/model --text book.txt --json

The text is read in windows of C tokens, each S tokens after the last. A window scores the tokens \
that no earlier one has scored, so every token but the first is scored once, with at least C - S \
tokens before it (where the text has them).

Bits a byte: the scored loss in bits over the bytes of the scored tokens; comparable between tokenizers.";

/// `moebius eval`.
#[derive(Debug, Args)]
#[command(after_help = EVAL_EXAMPLES)]
pub struct EvalArguments {
    /// A folder in Hugging Face's layout [default: the model inside this binary]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,

    /// The text, a file in UTF-8
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,

    /// Tokens in a window [default: the model's context, at most 4096]
    #[arg(long, value_name = "C")]
    pub context: Option<NonZeroUsize>,

    /// Tokens from one window to the next [default: half a window]
    #[arg(long, value_name = "S")]
    pub stride: Option<NonZeroUsize>,

    /// Precision of matrix products
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    pub dtype: Dtype,

    /// What the weights are held in: stored, f32, bf16, or a block format as q8_0, q4_k, q4_0, mxfp4 [default: f32; stored
    /// with --dtype bf16]
    #[arg(long, value_name = "FORMAT")]
    pub weights: Option<RunFormat>,

    /// Print one JSON object instead of lines
    #[arg(long)]
    pub json: bool,
}

const BENCH_EXAMPLES: &str = "\
Examples:
  moebius bench
  moebius bench --model runs/tiny/model --prefill 128 --batch 16
  moebius bench --random-weights olmoe-1b-7b:2 --threads 2 --json
  moebius bench --random-weights mixtral-8x7b:1 --out mixtral-cut

Tokens are random. Bytes are those of the weights and the cache that the tokens need, each counted once a pass; the \
shares compare them with a streaming read of memory, and the arithmetic with multiply-adds in registers, both measured \
by the command itself with the same threads.

SHAPE is olmoe-1b-7b, qwen3-30b-a3b or mixtral-8x7b: random weights in the sizes of that model, `:4` behind it takes \
its first 4 layers only.";

/// `moebius bench`.
#[derive(Debug, Args)]
#[command(after_help = BENCH_EXAMPLES)]
pub struct BenchArguments {
    /// A model as `run` takes it [default: the model inside this binary]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,

    /// Random weights in a published model's sizes, instead of a model
    #[arg(long, value_name = "SHAPE", conflicts_with = "model")]
    pub random_weights: Option<String>,

    /// Write the random weights (bf16, Hugging Face's layout) to this folder and measure nothing
    #[arg(long, value_name = "DIR", requires = "random_weights")]
    pub out: Option<PathBuf>,

    /// Tokens of the prompt [default: 512, or as many as the model's context allows]
    #[arg(long, value_name = "N")]
    pub prefill: Option<NonZeroUsize>,

    /// Tokens read one by one after it
    #[arg(long, value_name = "N", default_value = "64")]
    pub decode: NonZeroUsize,

    /// Measure also N sequences decoding together
    #[arg(long, value_name = "N")]
    pub batch: Option<NonZeroUsize>,

    /// How often everything is measured
    #[arg(long, value_name = "N", default_value = "3")]
    pub rounds: NonZeroUsize,

    /// What it is run in
    #[command(flatten)]
    pub precision: RunPrecision,

    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

const EXPORT_EXAMPLES: &str = "\
Examples:
  moebius export --gguf shipped.gguf
  moebius export runs/tiny/model --gguf tiny.gguf --format q4_k

Formats: f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q2_k, q3_k, q4_k, q5_k, q6_k, iq4_nl, iq4_xs, mxfp4. \
Norms and routers stay f32; the head has six bits at least; matrices whose rows are no whole blocks of the \
format take q8_0, or else f32.";

/// `moebius export`.
#[derive(Debug, Args)]
#[command(after_help = EXPORT_EXAMPLES)]
pub struct ExportArguments {
    /// A folder in Hugging Face's layout [default: the model inside this binary]
    #[arg(value_name = "DIR")]
    pub model: Option<PathBuf>,

    /// The GGUF file to write: whole or not at all
    #[arg(long, value_name = "FILE")]
    pub gguf: PathBuf,

    /// The format of the matrices
    #[arg(long, value_name = "FORMAT", default_value = "q8_0", value_parser = crate::commands::export::parse_format)]
    pub format: Format,
}

const LOGITS_EXAMPLES: &str = "\
Example:
  moebius logits --tokens in.safetensors --key input_ids --out out.safetensors --routing

Writes `logits` [batch, sequence, vocab] in f32; with --routing, for each MoE layer L, \
`router_logits.L` [batch * sequence, experts], `topk_index.L` (i64) and `topk_weight.L` [batch * sequence, k], heaviest first.";

/// `moebius logits`.
#[derive(Debug, Args)]
#[command(after_help = LOGITS_EXAMPLES)]
pub struct LogitsArguments {
    /// A folder in Hugging Face's layout [default: the model inside this binary]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,

    /// A safetensors file with token ids
    #[arg(long, value_name = "FILE")]
    pub tokens: PathBuf,

    /// The tensor in it: [batch, sequence] of i64, i32 or u32
    #[arg(long, value_name = "NAME")]
    pub key: String,

    /// The safetensors file to write: whole or not at all
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,

    /// Precision of matrix products
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    pub dtype: Dtype,

    /// What the weights are held in: stored, f32, bf16, or a block format as q8_0, q4_k, q4_0, mxfp4 [default: f32; stored
    /// with --dtype bf16]
    #[arg(long, value_name = "FORMAT")]
    pub weights: Option<RunFormat>,

    /// Write also what the routers computed
    #[arg(long)]
    pub routing: bool,
}

const CHECK_EXAMPLES: &str = "\
Example:
  moebius check golden/mixtral

A golden folder holds a model and what it must give: expected.safetensors, and where they exist \
grads.safetensors (gradients of the loss), aux.json (balance loss) and config.v4.json (the same \
configuration in the older spelling). Everything is computed in f32. Exit status 0 only if every \
quantity of every folder is within the tolerance.";

/// `moebius check`.
#[derive(Debug, Args)]
#[command(after_help = CHECK_EXAMPLES)]
pub struct CheckArguments {
    /// Golden folders
    #[arg(required = true, value_name = "DIR")]
    pub folders: Vec<PathBuf>,

    /// The largest absolute difference allowed
    #[arg(long, value_name = "X", default_value_t = 1e-4)]
    pub tolerance: f64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Arguments::command().debug_assert();
    }
}
