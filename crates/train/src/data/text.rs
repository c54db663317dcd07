//! Text as such: whether it is UTF-8, and where it can be cut.

use std::path::Path;

use crate::{Result, TrainError};

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

/// Cuts a long text into pieces that can be tokenised apart with the same outcome as the whole.
///
/// Byte-level BPE splits text by a pattern before it merges; the pattern never reaches over a single line end that
/// stands between two characters that are not white space. Pieces end right after such a line end, once they are
/// `wanted` bytes long or longer.
pub fn pieces(text: &str, wanted: usize) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut start = 0;
    for (at, _) in text.match_indices('\n') {
        if at + 1 - start >= wanted && is_cut(text, at) {
            pieces.push(&text[start..=at]);
            start = at + 1;
        }
    }
    pieces.push(&text[start..]);
    pieces
}

/// The last place where [`pieces`] may cut a text that goes on: the bytes before it. What stands behind the last line end
/// must be known.
pub fn last_cut(text: &str) -> Option<usize> {
    text.rmatch_indices('\n').find(|&(at, _)| is_cut(text, at)).map(|(at, _)| at + 1)
}

/// Whether the line end at `at` stands between two characters that are not white space.
fn is_cut(text: &str, at: usize) -> bool {
    let blank = |character: Option<char>| character.is_none_or(char::is_whitespace);
    !blank(text[..at].chars().next_back()) && !blank(text[at + 1..].chars().next())
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
        assert_eq!(last_cut(text), Some("one\ntwo\n\nthree\n four\n".len()));
        assert_eq!(last_cut("one\n"), None);
    }
}
