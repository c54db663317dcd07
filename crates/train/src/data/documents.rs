//! Texts as a stream of pieces, from files of several kinds: nothing is held whole but one piece.
//!
//! | name ends in | is read as | a document is |
//! |---|---|---|
//! | `.jsonl`, `.ndjson` | JSON lines | the text under `key` of one line |
//! | `.parquet` | Parquet | a row of the column `key` |
//! | `.arrow`, `.feather`, `.ipc` | Arrow IPC, file or stream | a row of the column `key` |
//! | anything else | text in UTF-8 | the file |
//!
//! A folder stands for all `.txt` files and tables below it, in the order of their paths.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use super::tables::Rows;
use super::text::last_cut;
use crate::recipe::Source;
use crate::{Recipe, Result, TrainError, files};

/// A text file is read in pieces of about this many bytes.
const PIECE_BYTES: usize = 1 << 20;

/// The longest line of JSON: more is no document but a mistake.
const LONGEST_LINE: u64 = 1 << 28;

/// What folders are searched for.
const EXTENSIONS: [&str; 7] = ["txt", "jsonl", "ndjson", "parquet", "arrow", "feather", "ipc"];

/// A document or a part of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Never empty.
    pub text: String,
    /// Whether the document ends here.
    pub is_last: bool,
}

/// The pieces of some sources, in their order.
pub struct Pieces {
    /// What is still to be read, the next one last.
    files: Vec<Input>,
    reading: Option<Reader>,
    /// Whether the file under way gave a piece.
    has_text: bool,
}

struct Input {
    path: PathBuf,
    key: String,
}

enum Reader {
    Text(TextFile),
    Lines(JsonLines),
    Rows(Box<Rows>),
}

impl Pieces {
    /// Looks the files up; reads none of them yet.
    ///
    /// # Errors
    /// A folder that cannot be read or holds nothing that could be.
    pub fn of(recipe: &Recipe, sources: &[Source]) -> Result<Self> {
        let mut files = Vec::new();
        for source in sources {
            let path = recipe.resolve(&source.path);
            let paths = if path.is_dir() { texts_in(&path)? } else { vec![path] };
            files.extend(paths.into_iter().map(|path| Input { path, key: source.key().to_owned() }));
        }
        files.reverse();
        Ok(Self { files, reading: None, has_text: false })
    }

    /// The bytes of all files, as far as their sizes are known: how much there is to read.
    pub fn file_bytes(&self) -> u64 {
        self.files.iter().filter_map(|input| std::fs::metadata(&input.path).ok()).map(|data| data.len()).sum()
    }

    fn next_piece(&mut self) -> Result<Option<Piece>> {
        loop {
            let Some(reader) = &mut self.reading else {
                match self.files.last() {
                    Some(input) => self.reading = Some(Reader::open(input)?),
                    None => return Ok(None),
                }
                self.has_text = false;
                continue;
            };
            let piece = match reader {
                Reader::Text(file) => file.next_piece()?,
                Reader::Lines(lines) => lines.next_text()?.map(|text| Piece { text, is_last: true }),
                Reader::Rows(rows) => rows.next_text()?.map(|text| Piece { text, is_last: true }),
            };
            match piece {
                Some(piece) if piece.text.is_empty() && !piece.is_last => {}
                // A row without text is no document.
                Some(piece) if piece.text.is_empty() && !matches!(reader, Reader::Text(_)) => {}
                Some(piece) => {
                    self.has_text = true;
                    return Ok(Some(piece));
                }
                None => {
                    let input = self.files.pop().expect("the file under way");
                    self.reading = None;
                    if !self.has_text {
                        let what = input.path.display().to_string();
                        return Err(TrainError::Data { what, message: "wanted text, found an empty file".to_owned() });
                    }
                }
            }
        }
    }
}

impl Iterator for Pieces {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        let piece = self.next_piece().transpose();
        if matches!(piece, Some(Err(_))) {
            // After an error there is nothing more.
            self.files.clear();
            self.reading = None;
        }
        piece
    }
}

impl Reader {
    fn open(input: &Input) -> Result<Self> {
        let extension = input.path.extension().map(|extension| extension.to_string_lossy().to_lowercase());
        Ok(match extension.as_deref().unwrap_or_default() {
            "jsonl" | "ndjson" => Self::Lines(JsonLines::open(&input.path, &input.key)?),
            "parquet" => Self::Rows(Box::new(Rows::open_parquet(&input.path, &input.key)?)),
            "arrow" | "feather" | "ipc" => Self::Rows(Box::new(Rows::open_arrow(&input.path, &input.key)?)),
            _ => Self::Text(TextFile::open(&input.path)?),
        })
    }
}

/// The readable files below a folder, sorted by path.
fn texts_in(folder: &Path) -> Result<Vec<PathBuf>> {
    fn collect(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
        for path in files::entries(folder)? {
            let extension = path.extension().map(|extension| extension.to_string_lossy().to_lowercase());
            if path.is_dir() && !path.is_symlink() {
                collect(&path, found)?;
            } else if path.is_file() && EXTENSIONS.contains(&extension.unwrap_or_default().as_str()) {
                found.push(path);
            }
        }
        Ok(())
    }
    let mut found = Vec::new();
    collect(folder, &mut found)?;
    if found.is_empty() {
        let what = folder.display().to_string();
        let message =
            format!("wanted a folder with files of {}, found none", EXTENSIONS.map(|e| format!("*.{e}")).join(" "));
        return Err(TrainError::Data { what, message });
    }
    Ok(found)
}

/// A text file that is read as it is needed.
struct TextFile {
    path: PathBuf,
    file: File,
    /// Bytes read and not yet given out; the file goes on after them unless `is_done`.
    buffer: Vec<u8>,
    /// Where the buffer begins in the file.
    offset: usize,
    is_done: bool,
}

impl TextFile {
    fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(TrainError::io("read", path))?;
        Ok(Self { path: path.to_path_buf(), file, buffer: Vec::new(), offset: 0, is_done: false })
    }

    /// The next piece: up to the last place where the text can be cut without changing a token.
    fn next_piece(&mut self) -> Result<Option<Piece>> {
        let mut wanted = PIECE_BYTES;
        loop {
            if self.is_done && self.buffer.is_empty() {
                return Ok(None);
            }
            self.read_up_to(wanted)?;
            let valid = self.valid_bytes()?;
            if self.is_done {
                let text = String::from_utf8(std::mem::take(&mut self.buffer)).expect("checked");
                return Ok((!text.is_empty()).then_some(Piece { text, is_last: true }));
            }
            let text = std::str::from_utf8(&self.buffer[..valid]).expect("checked");
            if let Some(cut) = last_cut(text) {
                let rest = self.buffer.split_off(cut);
                let text = String::from_utf8(std::mem::replace(&mut self.buffer, rest)).expect("checked");
                self.offset += cut;
                return Ok(Some(Piece { text, is_last: false }));
            }
            // No line ends there: look farther.
            wanted *= 2;
        }
    }

    fn read_up_to(&mut self, wanted: usize) -> Result<()> {
        let more = wanted.saturating_sub(self.buffer.len()).max(1) as u64;
        let read = (&mut self.file).take(more).read_to_end(&mut self.buffer);
        let read = read.map_err(TrainError::io("read", &self.path))?;
        self.is_done = (read as u64) < more;
        Ok(())
    }

    /// How much of the buffer is whole characters; less than all only where the file goes on.
    fn valid_bytes(&self) -> Result<usize> {
        match std::str::from_utf8(&self.buffer) {
            Ok(text) => Ok(text.len()),
            Err(error) if error.error_len().is_none() && !self.is_done => Ok(error.valid_up_to()),
            Err(error) => {
                let at = error.valid_up_to();
                Err(TrainError::NotUtf8 { path: self.path.clone(), offset: self.offset + at, byte: self.buffer[at] })
            }
        }
    }
}

/// A file of JSON objects, one a line.
struct JsonLines {
    path: PathBuf,
    key: String,
    file: BufReader<File>,
    number: usize,
}

impl JsonLines {
    fn open(path: &Path, key: &str) -> Result<Self> {
        let file = File::open(path).map_err(TrainError::io("read", path))?;
        Ok(Self { path: path.to_path_buf(), key: key.to_owned(), file: BufReader::new(file), number: 0 })
    }

    /// The next line's text; lines of white space are passed over.
    fn next_text(&mut self) -> Result<Option<String>> {
        loop {
            let mut line = Vec::new();
            let read = (&mut self.file).take(LONGEST_LINE).read_until(b'\n', &mut line);
            let read = read.map_err(TrainError::io("read", &self.path))?;
            self.number += 1;
            if read == 0 {
                return Ok(None);
            }
            if read as u64 == LONGEST_LINE {
                return Err(self.refuse(format!("wanted a line of less than {LONGEST_LINE} bytes, found a longer one")));
            }
            if !line.iter().all(u8::is_ascii_whitespace) {
                return self.text_of(&line).map(Some);
            }
        }
    }

    fn text_of(&self, line: &[u8]) -> Result<String> {
        let wanted = format!("wanted an object with a text under `{}`", self.key);
        let value: serde_json::Value =
            serde_json::from_slice(line).map_err(|error| self.refuse(format!("{wanted}, found no JSON: {error}")))?;
        let found = match value {
            serde_json::Value::Object(mut object) => match object.remove(&self.key) {
                Some(serde_json::Value::String(text)) => return Ok(text),
                Some(other) => format!("{} there", kind(&other)),
                None => {
                    let keys = object.keys().take(8).map(|key| format!("`{key}`")).collect::<Vec<_>>();
                    format!("the keys {}", keys.join(", "))
                }
            },
            other => kind(&other).to_owned(),
        };
        Err(self.refuse(format!("{wanted}, found {found}")))
    }

    fn refuse(&self, message: String) -> TrainError {
        TrainError::Data { what: format!("{}:{}", self.path.display(), self.number), message }
    }
}

fn kind(value: &serde_json::Value) -> &'static str {
    match value {
        serde_json::Value::Null => "null",
        serde_json::Value::Bool(_) => "true or false",
        serde_json::Value::Number(_) => "a number",
        serde_json::Value::String(_) => "a text",
        serde_json::Value::Array(_) => "a list",
        serde_json::Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pieces_of(root: &Path, sources: &[&str]) -> Result<Vec<Piece>> {
        let list = sources.join(", ");
        let text =
            format!("[model]\npreset = 'dense-nano'\n[data]\ntrain = [{list}]\nvalid = ['v']\n[train]\nsteps = 9\n");
        let recipe = Recipe::parse("x.toml", root, &text).unwrap();
        Pieces::of(&recipe, &recipe.data.train)?.collect()
    }

    fn whole(text: &str) -> Piece {
        Piece { text: text.to_owned(), is_last: true }
    }

    #[test]
    fn folders_lines_and_texts_in_order() {
        let root = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("folder/b.txt", "second");
        write("folder/a/first.txt", "first");
        write("folder/c.jsonl", "{\"text\": \"third\"}\n\n {\"text\": \"\", \"n\": 1}\n{\"text\":\"fo\\u00fcrth\"}");
        write("folder/ignored.bin", "x");
        write("notes.md", "fifth");
        write("story.jsonl", "{\"story\": \"sixth\"}\r\n");
        let found =
            pieces_of(root.path(), &["'folder'", "'notes.md'", "{ path = 'story.jsonl', key = 'story' }"]).unwrap();
        assert_eq!(found, ["first", "second", "third", "foürth", "fifth", "sixth"].map(whole));

        write("bad.jsonl", "{\"text\": \"x\"}\n{\"body\": 1, \"id\": 2}\n");
        write("list.jsonl", "[1]\n");
        write("broken.jsonl", "{\"text\": \n");
        write("number.jsonl", "{\"text\": 7}\n");
        write("blank.jsonl", "\n\n");
        write("empty.txt", "");
        std::fs::create_dir(root.path().join("nothing")).unwrap();
        for (source, wanted) in [
            ("bad.jsonl", "bad.jsonl:2: wanted an object with a text under `text`, found the keys `body`, `id`"),
            ("list.jsonl", "list.jsonl:1: wanted an object with a text under `text`, found a list"),
            ("broken.jsonl", "broken.jsonl:1: wanted an object with a text under `text`, found no JSON: EOF"),
            ("number.jsonl", "number.jsonl:1: wanted an object with a text under `text`, found a number there"),
            ("blank.jsonl", "blank.jsonl: wanted text, found an empty file"),
            ("empty.txt", "empty.txt: wanted text, found an empty file"),
            ("nothing", "nothing: wanted a folder with files of *.txt *.jsonl"),
            ("gone.txt", "gone.txt: cannot read: "),
        ] {
            let error = pieces_of(root.path(), &[&format!("'{source}'")]).expect_err(source).to_string();
            assert!(error.contains(wanted), "{error}");
        }
    }

    /// A long text comes in pieces that join to it, cut only where no token is; a character on the border of two reads is
    /// whole, a bad byte is placed in the file.
    #[test]
    fn long_texts_come_in_pieces() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("long.txt");
        let text = "ein schöner Tag\nund noch einer\n\n  eingerückt\n".repeat(60_000);
        std::fs::write(&path, &text).unwrap();
        let found = pieces_of(root.path(), &["'long.txt'"]).unwrap();
        assert!(found.len() > 2, "{} pieces", found.len());
        assert_eq!(found.iter().map(|piece| piece.text.as_str()).collect::<String>(), text);
        let ends_a_line = |text: &str| text.ends_with("Tag\n") || text.ends_with("eingerückt\n");
        assert!(found.iter().rev().skip(1).all(|piece| !piece.is_last && ends_a_line(&piece.text)));
        assert!(found.last().unwrap().is_last);

        let mut bytes = text.into_bytes();
        bytes[2_000_000] = 0xff;
        std::fs::write(&path, &bytes).unwrap();
        let error = pieces_of(root.path(), &["'long.txt'"]).unwrap_err().to_string();
        assert!(error.contains("found an invalid byte 0xff at byte offset 2000000"), "{error}");

        let line = "x".repeat(3 * PIECE_BYTES);
        std::fs::write(&path, &line).unwrap();
        assert_eq!(pieces_of(root.path(), &["'long.txt'"]).unwrap(), [whole(&line)]);
    }

    proptest! {
        /// Whatever the bytes: pieces or one line of complaint, never a panic.
        #[test]
        fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..300), extension in prop::sample::select(vec!["txt", "jsonl", "parquet", "arrow"])) {
            let root = tempfile::tempdir().unwrap();
            let name = format!("data.{extension}");
            std::fs::write(root.path().join(&name), bytes).unwrap();
            if let Err(error) = pieces_of(root.path(), &[&format!("'{name}'")]) {
                let message = error.to_string();
                prop_assert!(message.contains(&name) && !message.contains('\n'), "{}", message);
            }
        }
    }
}
