//! Models whose tensors are spread otherwise than they are written: over several files, an expert at a time.

mod common;

use common::{Metadata, Tensors, contents, weights, write_contents};
use moebius_kernels::formats::Format;
use moebius_model::gguf::{ExportSettings, GgufFile, ValueToWrite, write_model};
use moebius_model::{Checkpoint, Ffn, Model, RunFormat, Survey, UniformDecoder};
use std::path::{Path, PathBuf};

const PARTS: usize = 3;

fn mixtral() -> Model {
    let decoder = UniformDecoder { family: "mixtral", ffn: Ffn::moe_of(3, 2, 32, true), ..UniformDecoder::default() };
    Model::new(&decoder.config(), 5).unwrap()
}

fn export(path: &Path, model: &Model) -> (Metadata, Tensors) {
    let settings = ExportSettings { format: Format::F32, name: None, tokenizer: None, chat_template: None };
    write_model(path, model, &settings).unwrap();
    contents(path)
}

/// Where llama.cpp looks for a part of `m`, counted from one.
fn part(folder: &Path, number: usize) -> PathBuf {
    folder.join(format!("m-0000{number}-of-0000{PARTS}.gguf"))
}

/// Writes the parts of a model: the metadata in the first, tensors dealt out in turns.
fn split(folder: &Path, model: &Model) -> Vec<(Metadata, Tensors)> {
    let (metadata, tensors) = export(&folder.join("whole.gguf"), model);
    let parts: Vec<(Metadata, Tensors)> = (0..PARTS)
        .map(|at| {
            let mut metadata = if at == 0 { metadata.clone() } else { Metadata::new() };
            let says = [("no", at), ("count", PARTS), ("tensors.count", tensors.len())];
            metadata.extend(says.map(|(key, number)| (format!("split.{key}"), ValueToWrite::U32(number as u32))));
            let own = tensors.clone().into_iter().skip(at).step_by(PARTS).collect();
            write_contents(&part(folder, at + 1), &metadata, &own);
            (metadata, own)
        })
        .collect();
    parts
}

fn error(path: &Path) -> String {
    Checkpoint::open(path).err().map(|error| error.to_string()).unwrap_or_default()
}

#[test]
fn any_part_stands_for_the_whole_model() {
    let (folder, model) = (tempfile::tempdir().unwrap(), mixtral());
    split(folder.path(), &model);
    for number in 1..=PARTS {
        let path = part(folder.path(), number);
        let again = Model::load(&Checkpoint::open(&path).unwrap()).unwrap();
        assert_eq!(weights(&again), weights(&model), "from part {number}");
        let file = GgufFile::open(&path).unwrap();
        assert_eq!((file.n_parts(), file.name()), (PARTS, part(folder.path(), 1).to_str().unwrap()));
        let stored = Survey::open(&path).unwrap().stored.unwrap();
        assert_eq!((stored.files, stored.bytes()), (PARTS, 4 * model.count_params().total as u64));
    }
}

#[test]
fn a_single_part_is_a_whole_model() {
    let (folder, model) = (tempfile::tempdir().unwrap(), mixtral());
    let path = folder.path().join("any name");
    let (mut metadata, tensors) = export(&path, &model);
    metadata.insert("split.count".into(), ValueToWrite::U32(1));
    write_contents(&path, &metadata, &tensors);
    assert_eq!(weights(&Model::load(&Checkpoint::open(&path).unwrap()).unwrap()), weights(&model));
}

#[test]
fn parts_that_do_not_fit_are_named() {
    let (folder, model) = (tempfile::tempdir().unwrap(), mixtral());
    let parts = split(folder.path(), &model);
    let [first, second, third] = [1, 2, 3].map(|number| part(folder.path(), number));
    let number = |key: &str, number: u32| (format!("split.{key}"), ValueToWrite::U32(number));
    let name = |path: &Path| path.display().to_string();
    // Each time the second part is another, and the first is opened.
    let says = |key: &str, wrong: u32| {
        let (mut metadata, tensors) = parts[1].clone();
        metadata.extend([number(key, wrong)]);
        write_contents(&second, &metadata, &tensors);
        error(&first)
    };
    let total = parts.iter().map(|(_, tensors)| tensors.len()).sum::<usize>();
    let beside = format!("beside {}", name(&first));
    for (key, wrong, wanted) in [
        ("no", 2, format!("wanted 1, {beside}, found 2")),
        ("count", 4, format!("wanted 3, {beside}, found 4")),
        ("count", 1, format!("wanted 3, {beside}, found 1")),
        ("tensors.count", 7, format!("wanted 7 tensors in 3 parts, found {total}")),
    ] {
        assert_eq!(says(key, wrong), format!("{}: `split.{key}`: {wanted}", name(&second)));
    }
    let (mut metadata, tensors) = parts[1].clone();
    metadata.remove("split.no");
    write_contents(&second, &metadata, &tensors);
    let nothing = "`split.no`: wanted a whole number of 32 bits, found nothing";
    assert_eq!(error(&first), format!("{}: {nothing}", name(&second)));
    assert_eq!(error(&second), format!("{}: {nothing}", name(&second)));

    let (metadata, mut tensors) = parts[1].clone();
    tensors.pop_last();
    let (twice, values) = parts[0].1.first_key_value().unwrap();
    tensors.insert(twice.clone(), values.clone());
    write_contents(&second, &metadata, &tensors);
    assert_eq!(error(&third), format!("{}: tensor `{twice}`: stands in {} too", name(&second), name(&first)));

    std::fs::remove_file(&second).unwrap();
    let missing =
        format!("{}: no such file; wanted a part of the model that {} is one of", name(&second), name(&third));
    assert_eq!(error(&third), missing);
}

#[test]
fn parts_are_found_by_their_names() {
    let (folder, model) = (tempfile::tempdir().unwrap(), mixtral());
    let parts = split(folder.path(), &model);
    let path = folder.path().join("m-00002-of-00004.gguf");
    std::fs::copy(part(folder.path(), 2), &path).unwrap();
    let wanted = "1 of 3 parts wants a name that ends in `-00002-of-00003.gguf`, for so the others are found";
    assert_eq!(error(&path), format!("{}: `split.no`: {wanted}", path.display()));
    let bytes = std::fs::read(&path).unwrap();
    let found = GgufFile::from_bytes("m", bytes).err().unwrap().to_string();
    assert_eq!(found, "m: `split.count`: wanted a whole model, found one of 3 parts in memory");
    let (mut metadata, tensors) = parts[1].clone();
    metadata.insert("split.no".into(), ValueToWrite::U32(u32::MAX));
    write_contents(&path, &metadata, &tensors);
    assert_eq!(error(&path), format!("{}: `split.no`: wanted 0 to 2, found {}", path.display(), u32::MAX));
    // As many parts as anyone may claim: the second is missing, and nothing else is looked at.
    metadata.extend(["no", "count"].map(|key| (format!("split.{key}"), ValueToWrite::U32(u32::MAX))));
    metadata.insert("split.no".into(), ValueToWrite::U32(0));
    let path = folder.path().join("m-00001-of-4294967295.gguf");
    write_contents(&path, &metadata, &tensors);
    let found = error(&path);
    assert!(found.contains("m-00002-of-4294967295.gguf: no such file"), "{found}");
}

#[test]
fn experts_may_be_tensors_of_their_own() {
    let (folder, model) = (tempfile::tempdir().unwrap(), mixtral());
    let path = folder.path().join("m.gguf");
    let (metadata, mut tensors) = export(&path, &model);
    for layer in 0..model.config.n_layers() {
        for kind in ["gate", "up", "down"] {
            let (shape, values) = tensors.remove(&format!("blk.{layer}.ffn_{kind}_exps.weight")).unwrap();
            for (expert, values) in values.chunks(shape[1] * shape[2]).enumerate() {
                let name = format!("blk.{layer}.ffn_{kind}.{expert}.weight");
                tensors.insert(name, (shape[1..].to_vec(), values.to_vec()));
            }
        }
    }
    write_contents(&path, &metadata, &tensors);
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(weights(&Model::load(&checkpoint).unwrap()), weights(&model));
    assert!(Model::load_to_run(&checkpoint, RunFormat::Block(Format::Q8_0), &mut |_| ()).is_ok());
    drop(checkpoint);

    let last = tensors.remove("blk.1.ffn_up.2.weight").unwrap();
    write_contents(&path, &metadata, &tensors);
    let found = Model::load(&Checkpoint::open(&path).unwrap()).err().unwrap().to_string();
    assert!(found.ends_with("tensor `blk.1.ffn_up.2.weight`: missing; wanted shape [32, 64]"), "{found}");
    tensors.insert("blk.1.ffn_up.2.weight".into(), last.clone());
    tensors.insert("blk.1.ffn_up.3.weight".into(), last);
    write_contents(&path, &metadata, &tensors);
    let found = Model::load(&Checkpoint::open(&path).unwrap()).err().unwrap().to_string();
    assert!(found.ends_with("tensor `blk.1.ffn_up.3.weight`: the mixtral configuration has no such tensor"), "{found}");
}
