//! The house's rules, read off the source: arrows point down, files and functions stay short, rooms are labelled, unsafe
//! stays in its crate. Each rule is also shown a snippet that breaks it.

use std::path::{Path, PathBuf};

/// Crates, bottom to top: each may use those before it. `testkit` is for tests only.
const ORDER: [&str; 8] = ["kernels", "tensor", "moe", "model", "train", "engine", "serve", "cli"];
/// Crates that stand side by side: neither may use the other.
const APART: [(&str, &str); 1] = [("train", "engine")];
const FILE_LINES: usize = 500;
const FUNCTION_LINES: usize = 70;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// All files below `folder` with one of the extensions, build output and fetched data left out.
fn files(folder: &Path, extensions: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            if !["target", "runs", "fetched"].contains(&&name[..]) && !name.starts_with('.') {
                found.extend(files(&path, extensions));
            }
        } else if path.extension().is_some_and(|e| extensions.contains(&&*e.to_string_lossy())) {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// The files below `folder`, each with its complaints.
fn complaints(folder: &str, extensions: &[&str], rule: impl Fn(&Path, &str) -> Vec<String>) {
    let mut all = Vec::new();
    let paths = files(&root().join(folder), extensions);
    assert!(!paths.is_empty());
    for path in paths {
        let text = std::fs::read_to_string(&path).unwrap();
        let name = path.strip_prefix(root()).unwrap().display().to_string();
        all.extend(rule(&path, &text).into_iter().map(|complaint| format!("{name}: {complaint}")));
    }
    assert!(all.is_empty(), "\n{}", all.join("\n"));
}

/// The source with the insides of comments, strings and characters blanked, line breaks kept.
fn code_only(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    let blank = |out: &mut Vec<u8>, from: usize, to: usize| {
        out.extend(bytes[from..to].iter().map(|&b| if b == b'\n' { b } else { b' ' }));
    };
    while i < bytes.len() {
        let rest = &bytes[i..];
        let end = if rest.starts_with(b"//") {
            i + rest.iter().position(|&b| b == b'\n').unwrap_or(rest.len())
        } else if rest.starts_with(b"/*") {
            i + text[i..].find("*/").map_or(rest.len(), |at| at + 2)
        } else if let Some(hashes) = raw_string(rest) {
            let close = format!("\"{}", "#".repeat(hashes));
            let open = i + hashes + 2;
            open + text[open..].find(&close).map_or(text.len() - open, |at| at + close.len())
        } else if rest[0] == b'"' {
            i + 1 + string_end(&rest[1..], b'"')
        } else if rest[0] == b'\'' && (rest.get(1) == Some(&b'\\') || rest.get(2) == Some(&b'\'')) {
            i + 1 + string_end(&rest[1..], b'\'')
        } else {
            i
        };
        if end > i {
            blank(&mut out, i, end);
            i = end;
        } else {
            out.push(bytes[i]);
            i += 1;
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn raw_string(rest: &[u8]) -> Option<usize> {
    let hashes = rest.strip_prefix(b"r")?.iter().take_while(|&&b| b == b'#').count();
    (rest.get(1 + hashes) == Some(&b'"')).then_some(hashes)
}

fn string_end(rest: &[u8], quote: u8) -> usize {
    let mut i = 0;
    while i < rest.len() && rest[i] != quote {
        i += if rest[i] == b'\\' { 2 } else { 1 };
    }
    (i + 1).min(rest.len())
}

fn long_file(text: &str) -> Vec<String> {
    let lines = text.lines().take_while(|line| !line.starts_with("#[cfg(test)]")).count();
    if lines > FILE_LINES { vec![format!("{lines} lines before its tests, {FILE_LINES} are enough")] } else { vec![] }
}

fn long_functions(text: &str) -> Vec<String> {
    let code = code_only(text);
    let lines: Vec<&str> = code.lines().collect();
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let Some((before, after)) = line.split_once("fn ") else { continue };
        let starts_function = before.chars().all(|c| c.is_ascii_lowercase() || " ()\"_".contains(c));
        let name: String = after.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        if !starts_function || name.is_empty() {
            continue;
        }
        let (mut depth, mut opened) = (0i32, false);
        for (end, line) in lines.iter().enumerate().skip(start) {
            depth += line.matches('{').count() as i32 - line.matches('}').count() as i32;
            opened |= line.contains('{');
            if (!opened && line.trim_end().ends_with(';')) || (opened && depth <= 0) {
                let length = end + 1 - start;
                if length > FUNCTION_LINES {
                    found.push(format!("fn {name} has {length} lines, {FUNCTION_LINES} are enough"));
                }
                break;
            }
        }
    }
    found
}

fn unlabelled(text: &str) -> Vec<String> {
    if text.starts_with("//!") {
        vec![]
    } else {
        vec!["does not open with a line `//!` that says what it is for".into()]
    }
}

fn unfinished(text: &str) -> Vec<String> {
    let marks = ["to", "unimplement", "FIX", "XX"].iter().zip(["do!(", "ed!(", "ME", "X"]);
    let marks: Vec<String> = marks.map(|(a, b)| format!("{a}{b}")).chain(["#[ignore".to_string()]).collect();
    let found =
        marks.iter().filter(|mark| code_only(text).contains(&mark[..]) || text.contains(&mark[..]) && mark.len() == 5);
    found.map(|mark| format!("unfinished: {mark}")).collect()
}

fn loose_unsafe(path: &Path, text: &str) -> Vec<String> {
    let in_kernels = path.starts_with(root().join("crates/kernels"));
    let mut found = Vec::new();
    if !in_kernels && code_only(text).contains("unsafe ") {
        found.push("unsafe outside kernels".into());
    }
    let is_root = path.ends_with("src/lib.rs") || path.ends_with("src/main.rs");
    if is_root && !in_kernels && !text.contains("#![forbid(unsafe_code)]") {
        found.push("a crate's root without #![forbid(unsafe_code)]".into());
    }
    found
}

/// Our crates that a manifest's section names.
fn uses(manifest: &str, section: &str) -> Vec<String> {
    let start = manifest.find(&format!("[{section}]")).map_or(manifest.len(), |at| at + section.len() + 2);
    let body = manifest[start..].split("\n[").next().unwrap_or_default();
    body.lines()
        .filter_map(|line| line.strip_prefix("moebius-")?.split(['.', ' ', '=']).next().map(Into::into))
        .collect()
}

fn upward_arrows(name: &str, manifest: &str) -> Vec<String> {
    let place = |name: &str| ORDER.iter().position(|&other| other == name);
    let mut found = Vec::new();
    for used in uses(manifest, "dependencies") {
        let apart = APART.iter().any(|&(a, b)| (a, b) == (name, &used[..]) || (b, a) == (name, &used[..]));
        if apart || place(&used) >= place(name) || place(&used).is_none() {
            found.push(format!("{name} may not use {used}"));
        }
    }
    found
}

fn broken_links(path: &Path, text: &str) -> Vec<String> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
    let local = targets.filter(|target| !target.is_empty() && !target.contains("://"));
    local.filter(|target| !path.parent().unwrap().join(target).exists()).map(|t| format!("no such file: {t}")).collect()
}

#[test]
fn arrows_point_down() {
    complaints("crates", &["toml"], |path, text| {
        let name = path.parent().unwrap().file_name().unwrap().to_string_lossy();
        if name == "testkit" || !path.ends_with("Cargo.toml") { vec![] } else { upward_arrows(&name, text) }
    });
    assert_eq!(upward_arrows("moe", "[dependencies]\nmoebius-tensor.workspace = true\n"), [""; 0]);
    assert_eq!(upward_arrows("moe", "[dependencies]\nmoebius-model.workspace = true\n"), ["moe may not use model"]);
    assert_eq!(upward_arrows("train", "[dependencies]\nmoebius-engine.workspace = true\n").len(), 1);
    assert_eq!(upward_arrows("moe", "[dependencies]\nmoebius-testkit.workspace = true\n").len(), 1);
}

#[test]
fn files_are_short() {
    complaints("crates", &["rs"], |_, text| long_file(text));
    assert_eq!(long_file(&"\n".repeat(501)).len(), 1);
    assert!(long_file(&format!("{}#[cfg(test)]\n{}", "\n".repeat(400), "\n".repeat(400))).is_empty());
}

#[test]
fn functions_are_short() {
    // A test may be one long table.
    let is_test = |path: &Path| path.ends_with("tests.rs") || path.components().any(|part| part.as_os_str() == "tests");
    complaints("crates", &["rs"], |path, text| if is_test(path) { vec![] } else { long_functions(text) });
    let long = format!("pub(crate) fn f(x: u8) {{\n{}}}\nfn g() {{}}\n", "    let a = \"}\"; // }\n".repeat(70));
    assert_eq!(long_functions(&long), ["fn f has 72 lines, 70 are enough"]);
}

#[test]
fn rooms_are_labelled_and_finished() {
    complaints("crates", &["rs"], |_, text| unlabelled(text));
    complaints("crates", &["rs"], |_, text| unfinished(text));
    assert_eq!(unlabelled("use std::fmt;\n").len(), 1);
    assert_eq!(unfinished(concat!("fn f() { to", "do!() }\n")).len(), 1);
}

#[test]
fn unsafe_stays_in_kernels() {
    complaints("crates", &["rs"], loose_unsafe);
    assert_eq!(loose_unsafe(&root().join("crates/moe/src/lib.rs"), "fn f() { unsafe { g() } }").len(), 2);
}

#[test]
fn links_lead_somewhere() {
    complaints(".", &["md"], broken_links);
    assert_eq!(
        broken_links(&root().join("README.md"), "[a](nowhere.md) [b](https://example.org)"),
        ["no such file: nowhere.md"]
    );
}

#[test]
fn no_tracked_file_is_large() {
    // The shipped model is the one exception, and has a limit of its own.
    for path in files(&root(), &["safetensors", "txt", "json", "csv", "bin", "png", "svg"]) {
        let size = path.metadata().unwrap().len();
        let limit = if path.starts_with(root().join("models")) { 8 << 20 } else { 1_000_000 };
        assert!(size <= limit, "{}: {size} bytes", path.display());
    }
}
