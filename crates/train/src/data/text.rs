//! Text files, read whole and checked to be UTF-8.

use std::path::{Path, PathBuf};

use crate::digest::Hasher;
use crate::{Recipe, Result, TrainError};

/// One text file: one document.
#[derive(Clone, Debug)]
pub struct Document {
    /// Where it was read.
    pub path: PathBuf,
    /// What it says.
    pub text: String,
}

/// `bytes` as text.
///
/// # Errors
/// Names the file and the offset of the first byte that is not UTF-8.
pub fn utf8(path: &Path, bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|error| {
        let offset = error.utf8_error().valid_up_to();
        TrainError::NotUtf8 { path: path.to_path_buf(), offset, byte: error.as_bytes()[offset] }
    })
}

/// Reads the texts that one part of `[data]` names: files as they stand, folders by their `*.txt` in the order of names.
///
/// # Errors
/// A path that is not there, a folder without texts, a text that is empty or not UTF-8.
pub fn read_documents(recipe: &Recipe, paths: &[PathBuf]) -> Result<Vec<Document>> {
    let mut documents = Vec::new();
    for path in paths.iter().map(|path| recipe.resolve(path)) {
        let files = if path.is_dir() { texts_in(&path)? } else { vec![path] };
        for path in files {
            let text = utf8(&path, std::fs::read(&path).map_err(TrainError::io("read", &path))?)?;
            if text.is_empty() {
                let what = path.display().to_string();
                return Err(TrainError::Data { what, message: "wanted text, found an empty file".to_owned() });
            }
            documents.push(Document { path, text });
        }
    }
    Ok(documents)
}

/// The `*.txt` files of a folder, sorted by name.
fn texts_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(TrainError::io("read", folder))? {
        let path = entry.map_err(TrainError::io("read", folder))?.path();
        if path.extension().is_some_and(|extension| extension == "txt") && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    if files.is_empty() {
        let what = folder.display().to_string();
        return Err(TrainError::Data { what, message: "wanted a folder with *.txt files, found none".to_owned() });
    }
    Ok(files)
}

/// Takes the texts, their lengths and their order, but not where they stand, into a fingerprint.
pub fn write_digest(documents: &[Document], hasher: &mut Hasher) {
    hasher.write_u64(documents.len() as u64);
    for document in documents {
        hasher.write_sized(document.text.as_bytes());
    }
}

/// Cuts a long text into pieces that can be tokenised apart with the same outcome as the whole.
///
/// Byte-level BPE splits text by a pattern before it merges; the pattern never reaches over a single line end that
/// stands between two characters that are not white space. Pieces end right after such a line end, once they are
/// `wanted` bytes long or longer.
pub fn pieces(text: &str, wanted: usize) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut start = 0;
    for (at, _) in text.match_indices('\n') {
        let next = at + 1;
        if next - start < wanted || next == text.len() {
            continue;
        }
        let blank = |character: Option<char>| character.is_none_or(char::is_whitespace);
        if !blank(text[..at].chars().next_back()) && !blank(text[next..].chars().next()) {
            pieces.push(&text[start..next]);
            start = next;
        }
    }
    pieces.push(&text[start..]);
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offset_of_the_first_bad_byte() {
        let error = utf8(Path::new("book.txt"), b"caf\xc3\xa9 \xe9t".to_vec()).unwrap_err();
        assert_eq!(error.to_string(), "book.txt: wanted UTF-8 text, found an invalid byte 0xe9 at byte offset 6");
        let cut = utf8(Path::new("book.txt"), b"caf\xc3".to_vec()).unwrap_err();
        assert!(cut.to_string().ends_with("0xc3 at byte offset 3"));
    }

    #[test]
    fn pieces_join_to_the_whole_and_end_between_lines() {
        let text = "one\ntwo\n\nthree\n four\nfive\n";
        for wanted in 0..30 {
            assert_eq!(pieces(text, wanted).concat(), text);
        }
        assert_eq!(pieces(text, 1), ["one\n", "two\n\nthree\n four\n", "five\n"]);
        assert_eq!(pieces("", 1), [""]);
    }
}
