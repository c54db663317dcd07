//! Good recipes are read, bad ones are refused on the right line.

use std::path::Path;

use proptest::prelude::*;

use super::*;

const GOOD: &str = "\
[model]
hidden = 32
layers = 2
heads = 4
kv_heads = 2
ffn = 48
experts = 4
experts_per_token = 2
context = 64

[tokenizer]
vocab_size = 300

[data]
train = ['a.txt']
valid = ['b.txt']

[train]
seed = 1
steps = 100
sequence_length = 32
sequences = 4
validate_every = 10
validate_batches = 2
save_every = 20

[optimizer]
learning_rate = 1e-3
minimum_learning_rate = 1e-4
warmup_steps = 10
clip_norm = 1

[balance]
load_balancing = 0.01
";

fn parse(text: &str) -> Result<Recipe> {
    Recipe::parse("recipes/x.toml", Path::new("recipes"), text)
}

#[test]
fn a_good_recipe_with_its_defaults() {
    let recipe = parse(GOOD).unwrap();
    assert_eq!(recipe.tokens_per_step(), 128);
    assert_eq!((recipe.train.accumulation, recipe.train.keep), (1, 2));
    assert_eq!(recipe.train.precision, RecipePrecision::Bf16);
    assert_eq!((recipe.optimizer.clip_norm, recipe.balance.z), (1.0, 0.0));
    assert_eq!(recipe.resolve(Path::new("a.txt")), Path::new("recipes/a.txt"));
}

/// The recipes that come with the project can be read.
#[test]
fn shipped_recipes_are_sound() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes");
    let (mut texts, mut images) = (0, 0);
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap().to_string_lossy().starts_with("vision") {
            crate::vision::VisionRecipe::load(&path).unwrap_or_else(|error| panic!("{error}"));
            images += 1;
        } else {
            Recipe::load(&path).unwrap_or_else(|error| panic!("{error}"));
            texts += 1;
        }
    }
    assert!(texts >= 17 && images >= 4, "{texts} {images}");
}

/// Each line: what is replaced, by what, and the whole error.
#[test]
fn bad_recipes_name_line_and_key() {
    let cases = [
        // Unknown keys and sections.
        ("steps = 100", "steps = 100\nstep = 5", "21: train.step: unknown key; wanted one of "),
        ("[balance]", "[ballance]", "33: ballance: unknown key; wanted one of `model`, `tokenizer`, "),
        ("experts = 4", "expert = 4", "7: model.expert: unknown key; wanted one of "),
        // Missing ones.
        ("steps = 100\n", "", "18: train.steps: missing"),
        ("hidden = 32\n", "", "1: model.hidden: missing"),
        ("[tokenizer]\nvocab_size = 300\n", "", "1: tokenizer.vocab_size: missing"),
        ("learning_rate = 1e-3\n", "", "27: optimizer.learning_rate: missing"),
        // Types.
        ("steps = 100", "steps = 'ten'", "20: train.steps: wanted a whole number from 0, found string \"ten\""),
        ("steps = 100", "steps = -1", "20: train.steps: wanted a whole number from 0, found integer `-1`"),
        ("steps = 100", "steps = 1.5", "20: train.steps: wanted a whole number from 0, found floating point `1.5`"),
        (
            "learning_rate = 1e-3",
            "learning_rate = true",
            "28: optimizer.learning_rate: wanted a number, found boolean `true`",
        ),
        ("train = ['a.txt']", "train = 'a.txt'", "15: data.train: wanted a list, found string \"a.txt\""),
        (
            "train = ['a.txt']",
            "train = ['a.txt',\n 7]",
            "16: data.train: wanted a path or a table with a path, found integer `7`",
        ),
        ("seed = 1", "seed = 1\nprecision = 'f16'", "20: train.precision: wanted `f32` or `bf16`, found `f16`"),
        (
            "seed = 1",
            "seed = 1\nrouter_precision = 'f16'",
            "20: train.router_precision: wanted `f32` or `bf16`, found `f16`",
        ),
        ("[balance]\nload_balancing = 0.01", "balance = 3", "optimizer.balance: unknown key"),
        // Ranges.
        ("hidden = 32", "hidden = 0", "2: model.hidden: wanted 2 to 65536, found 0"),
        ("vocab_size = 300", "vocab_size = 256", "12: tokenizer.vocab_size: wanted 257 to 1048576, found 256"),
        (
            "warmup_steps = 10",
            "warmup_steps = 10\nbeta2 = 1.5",
            "31: optimizer.beta2: wanted 0 to 0.99999999, found 1.5",
        ),
        ("warmup_steps = 10", "warmup_steps = 10\nbeta1 = nan", "31: optimizer.beta1: wanted 0 to 0.99999, found NaN"),
        ("steps = 100", "steps = 0", "20: train.steps: wanted 1 to 1099511627776, found 0"),
        ("train = ['a.txt']", "train = []", "15: data.train: wanted at least one text, found none"),
        ("seed = 1", "seed = 9223372036854775808", "19: "),
        ("seed = 1", "seed = 1\nexpert_dropout = 1", "20: train.expert_dropout: wanted 0 to 0.99, found 1"),
        (
            "[balance]",
            "[balance]\nover = 'layer'",
            "34: balance.over: wanted one of `micro_batch`, `so_far`, `step`, found `layer`",
        ),
        (
            "ffn = 48",
            "ffn = 48\ndense_activation = 'gelu'",
            "7: model.dense_activation: wanted no such key without dense layers",
        ),
        // Contradictions.
        (
            "heads = 4\nkv",
            "heads = 5\nkv",
            "4: model.heads: wanted a number of heads that divides model.hidden into even parts, found 5 for model.hidden = 32",
        ),
        (
            "heads = 4\nkv",
            "heads = 32\nkv",
            "4: model.heads: wanted a number of heads that divides model.hidden into even parts, found 32",
        ),
        ("kv_heads = 2", "kv_heads = 3", "5: model.kv_heads: wanted a divisor of model.heads = 4, found 3"),
        (
            "experts_per_token = 2",
            "experts_per_token = 5",
            "8: model.experts_per_token: wanted 2 to model.experts = 4 ",
        ),
        (
            "experts_per_token = 2",
            "experts_per_token = 1",
            "8: model.experts_per_token: wanted 2 to model.experts = 4 ",
        ),
        ("experts_per_token = 2\n", "", "1: model.experts_per_token: wanted 2 to model.experts = 4 "),
        (
            "experts = 4\n",
            "",
            "7: model.experts_per_token: wanted no such key in a dense model (no model.experts), found 2",
        ),
        ("experts = 4\nexperts_per_token = 2\n", "", "32: balance.load_balancing: wanted no such key in a dense model"),
        (
            "sequence_length = 32",
            "sequence_length = 65",
            "21: train.sequence_length: wanted at most model.context = 64, found 65",
        ),
        (
            "minimum_learning_rate = 1e-4",
            "minimum_learning_rate = 1e-2",
            "29: optimizer.minimum_learning_rate: wanted at most optimizer.learning_rate = 0.001, found 0.01",
        ),
        (
            "warmup_steps = 10",
            "warmup_steps = 100",
            "30: optimizer.warmup_steps: wanted fewer than train.steps = 100, found 100",
        ),
        (
            "valid = ['b.txt']",
            "valid = ['a.txt']",
            "16: data.valid: wanted texts that are not in data.train, found a.txt",
        ),
        ("hidden = 32", "preset = 'moe-huge'", "2: model.preset: wanted one of dense-nano, moe-nano, "),
        ("clip_norm = 1", "momentum = 0.9", "31: optimizer.momentum: wanted no such key with kind = \"adamw\""),
        ("clip_norm = 1", "kind = 'sgd'\nbeta1 = 0.5", "32: optimizer.beta1: wanted no such key with kind = \"sgd\""),
        ("clip_norm = 1", "kind = 'lion'", "31: optimizer.kind: wanted one of `adamw`, `muon`, `sgd`, found `lion`"),
        ("clip_norm = 1", "decay_steps = 9", "31: optimizer.decay_steps: wanted no such key without schedule"),
        (
            "clip_norm = 1",
            "schedule = 'wsd'\ndecay_steps = 101",
            "32: optimizer.decay_steps: wanted 1 to train.steps = 100, found 101",
        ),
        (
            "[balance]",
            "[optimizer.groups.router]\nweight_decay = -1\n[balance]",
            "34: optimizer.groups.router.weight_decay: wanted 0 to 10, found -1",
        ),
        (
            "[balance]",
            "[optimizer.groups.routers]\nweight_decay = 1\n[balance]",
            "33: optimizer.groups.routers: unknown key; wanted one of `embedding`, ",
        ),
        ("[balance]", "[spikes]\nwindow = 2\n[balance]", "34: spikes.window: wanted 8 to 65536, found 2"),
        (
            "[balance]",
            "[samples]\nevery = 5\nprompts = ['']\n[balance]",
            "35: samples.prompts: wanted at least one text",
        ),
        (
            "[train]",
            "[data.eval]\nprose = ['a.txt']\n[train]",
            "19: data.eval.prose: wanted texts that are not in data.train",
        ),
        ("[train]", "[data.eval]\n'a/b' = ['c.txt']\n[train]", "19: data.eval.a/b: wanted a name of letters, digits"),
        (
            "['a.txt']",
            "[{ path = 'a', weight = 1 }, 'b']",
            "15: data.train: wanted a weight of every source or of none",
        ),
        (
            "['a.txt']",
            "[{ path = 'a', weight = 0 }]",
            "15: data.train: wanted weights of 0.000001 to 1000000, found 0 of a",
        ),
        (
            "['a.txt']",
            "[{ path = 'a', wight = 1 }]",
            "15: data.train: unknown key; wanted one of `path`, `key`, `weight`",
        ),
        ("['a.txt']", "[{ key = 'a' }]", "missing"),
        (
            "['b.txt']",
            "[{ path = 'b', weight = 1 }]",
            "16: data.valid: wanted no weights: all of it is looked at, found",
        ),
        ("['b.txt']", "['b.txt']\ndocuments = 'cut'", "17: data.documents: wanted `joined` or `apart`, found `cut`"),
        ("seed = 1", "average = 1", "19: train.average: wanted 0 to 0.999999, found 1"),
        ("seed = 1", "export = 'average'", "19: train.export: wanted \"average\" only with train.average, found none"),
        // Not TOML.
        ("hidden = 32", "hidden = ", "2: not valid TOML: "),
        ("layers = 2", "hidden = 2", "3: not valid TOML: duplicate key"),
    ];
    let mut wrong = Vec::new();
    for (old, new, wanted) in cases {
        assert!(GOOD.contains(old), "{old}");
        let error = parse(&GOOD.replacen(old, new, 1)).expect_err(wanted).to_string();
        let rest = error.strip_prefix("recipes/x.toml:").expect("the file comes first");
        let matches =
            if wanted.starts_with(char::is_numeric) { rest.starts_with(wanted) } else { rest.contains(wanted) };
        if !matches || error.contains('\n') {
            wrong.push(format!("{new}\n wanted {wanted}\n found  {rest}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn only_how_long_and_how_often_may_change() {
    let old = parse(GOOD).unwrap();
    let free = GOOD.replace("steps = 100", "steps = 200").replace("save_every = 20", "save_every = 5\nkeep = 9");
    assert_eq!(old.difference(&parse(&free).unwrap()), None);
    for (from, to, wanted) in [
        ("hidden = 32", "hidden = 64", ("model.hidden", "32", "64")),
        ("kv_heads = 2\n", "", ("model.kv_heads", "2", "absent")),
        ("learning_rate = 1e-3", "learning_rate = 2e-3", ("optimizer.learning_rate", "0.001", "0.002")),
        ("seed = 1", "seed = 2", ("train.seed", "1", "2")),
        ("['a.txt']", "['c.txt']", ("data.train", "[\"a.txt\"]", "[\"c.txt\"]")),
    ] {
        let (key, was, now) = wanted;
        let found = old.difference(&parse(&GOOD.replacen(from, to, 1)).unwrap());
        assert_eq!(found, Some((key.to_owned(), was.to_owned(), now.to_owned())));
    }
}

/// A preset fills what the file leaves out, and nothing else; every other key has a default.
#[test]
fn presets_fill_the_gaps() {
    let short =
        |model: &str| format!("[model]\n{model}\n[data]\ntrain = ['a.txt']\nvalid = ['b.txt']\n[train]\nsteps = 500\n");
    for preset in presets::PRESETS {
        let recipe = parse(&short(&format!("preset = '{}'", preset.name))).unwrap();
        let model = &recipe.model;
        assert_eq!((model.hidden, model.ffn, model.experts), (preset.hidden, preset.ffn, preset.experts.map(|e| e[0])));
        assert_eq!(recipe.tokenizer, TokenizerSection { vocab_size: preset.vocab_size, min_frequency: 2 });
        assert_eq!(recipe.train.sequence_length, preset.context);
        assert_eq!((recipe.train.validate_every, recipe.train.save_every, recipe.train.seed), (50, 50, 1));
        assert_eq!(recipe.optimizer.warmup_steps, 50);
        assert_eq!(recipe.optimizer.minimum_learning_rate, preset.learning_rate / 10.0);
        assert_eq!(recipe.balance.load_balancing, if preset.experts.is_some() { 0.01 } else { 0.0 });
        // The same active size within a family: experts a token times their width.
        let active = preset.ffn * preset.experts.map_or(1, |e| e[1]);
        assert_eq!(active, 4 * preset.hidden, "{}", preset.name);
    }
    let recipe = parse(&short("preset = 'moe-tiny'\nexperts = 16\nhidden = 64")).unwrap();
    assert_eq!((recipe.model.experts, recipe.model.experts_per_token), (Some(16), Some(2)));
    assert_eq!((recipe.model.hidden, recipe.model.layers), (64, 4));
    // A run that began with a preset goes on with its values written out.
    let written = "hidden = 64\nlayers = 4\nheads = 4\nffn = 256\nexperts = 16\nexperts_per_token = 2\ncontext = 128";
    let rest = "[tokenizer]\nvocab_size = 1024\n[optimizer]\nlearning_rate = 4e-3\n[balance]\nload_balancing = 0.01\nz = 0.001\n";
    assert_eq!(recipe.difference(&parse(&(short(written) + rest)).unwrap()), None);
}

/// What a checkpoint stores is the recipe, to the last digit.
#[test]
fn json_and_back() {
    let sources = "['a.txt', { path = 'c.jsonl', key = 'story' }]\ndocuments = 'apart'";
    let mut recipe = parse(&GOOD.replacen("['a.txt']", sources, 1)).unwrap();
    assert_eq!((recipe.data.train[0].key(), recipe.data.train[1].key()), ("text", "story"));
    recipe.optimizer.learning_rate = 0.1 + 0.2;
    let mut back: Recipe = serde_json::from_str(&serde_json::to_string(&recipe).unwrap()).unwrap();
    (back.folder, back.text) = (recipe.folder.clone(), recipe.text.clone());
    assert_eq!(back, recipe);
}

proptest! {
    /// Some of a good recipe cut out and something put in its place: a recipe or one line of complaint, never a panic.
    #[test]
    fn any_edit(at: prop::sample::Index, cut in 0..30_usize, put in "[a-z0-9=.\\[\\]'\"#{},\\n é-]{0,12}") {
        let start = at.index(GOOD.len());
        let end = (start + cut).min(GOOD.len());
        let text = [&GOOD[..start], &put, &GOOD[end..]].concat();
        if let Err(error) = parse(&text) {
            let message = error.to_string();
            prop_assert!(message.starts_with("recipes/x.toml:") && !message.contains('\n'), "{}", message);
        }
    }
}
