//! Texts from Parquet and Arrow files: the rows of one column.
//!
//! Without the feature `tables` such files are refused with a line that says so.

use std::path::Path;

#[cfg(not(feature = "tables"))]
use crate::Result;
use crate::TrainError;

#[cfg(feature = "tables")]
pub use reading::Rows;

/// What is wrong with a table.
fn refuse(path: &Path, message: impl std::fmt::Display) -> TrainError {
    let message = message.to_string().replace('\n', " ");
    TrainError::Data { what: path.display().to_string(), message }
}

/// Stands for the rows of a table where tables cannot be read.
#[cfg(not(feature = "tables"))]
pub struct Rows(std::convert::Infallible);

#[cfg(not(feature = "tables"))]
impl Rows {
    /// # Errors
    /// Always.
    pub fn open_parquet(path: &Path, _: &str) -> Result<Self> {
        Err(refuse(
            path,
            "wanted text or JSON lines, found Parquet, which this binary was built without (feature tables)",
        ))
    }

    /// # Errors
    /// Always.
    pub fn open_arrow(path: &Path, _: &str) -> Result<Self> {
        Err(refuse(
            path,
            "wanted text or JSON lines, found Arrow, which this binary was built without (feature tables)",
        ))
    }

    /// # Errors
    /// Never: there are no rows.
    pub fn next_text(&mut self) -> Result<Option<String>> {
        match self.0 {}
    }
}

#[cfg(feature = "tables")]
mod reading {
    //! The readers themselves.

    use std::collections::VecDeque;
    use std::fs::File;
    use std::io::{BufReader, Read, Seek};
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::path::{Path, PathBuf};
    use std::sync::Arc;

    use arrow_array::cast::AsArray;
    use arrow_array::{Array, RecordBatch};
    use arrow_ipc::reader::{FileReader, StreamReader};
    use arrow_schema::{ArrowError, DataType, Schema};
    use parquet::basic::Type as Physical;
    use parquet::file::reader::{FileReader as _, SerializedFileReader};
    use parquet::record::Field;
    use parquet::record::reader::RowIter;
    use parquet::schema::types::Type;

    use super::refuse;
    use crate::{Result, TrainError};

    /// The texts of a table's column, row by row.
    pub struct Rows {
        path: PathBuf,
        key: String,
        table: Table,
        /// Texts of the batch under way.
        batch: VecDeque<String>,
    }

    enum Table {
        Parquet(RowIter<'static>),
        ArrowFile(FileReader<BufReader<File>>),
        ArrowStream(StreamReader<BufReader<File>>),
    }

    /// Runs a reader that was not made for hostile files: if it panics, that is an error of the file.
    fn guarded<T>(path: &Path, read: impl FnOnce() -> Result<T>) -> Result<T> {
        catch_unwind(AssertUnwindSafe(read))
            .unwrap_or_else(|_| Err(refuse(path, "wanted a sound table, found a damaged one")))
    }

    impl Rows {
        /// Opens a Parquet file.
        ///
        /// # Errors
        /// A damaged file, no such column, one that holds no text.
        pub fn open_parquet(path: &Path, key: &str) -> Result<Self> {
            let file = File::open(path).map_err(TrainError::io("read", path))?;
            let rows = guarded(path, || {
                let reader = SerializedFileReader::new(file).map_err(|error| refuse(path, error))?;
                let schema = reader.metadata().file_metadata().schema();
                let fields = schema.get_fields();
                let names = fields.iter().map(|field| field.name());
                let field = fields.iter().find(|field| field.name() == key);
                let field = field.ok_or_else(|| no_column(path, key, names))?;
                if !field.is_primitive() || field.get_physical_type() != Physical::BYTE_ARRAY {
                    return Err(refuse(path, format!("column `{key}`: wanted texts, found another type")));
                }
                let wanted = Type::group_type_builder(schema.name()).with_fields(vec![Arc::clone(field)]).build();
                let wanted = wanted.map_err(|error| refuse(path, error))?;
                RowIter::from_file_into(Box::new(reader)).project(Some(wanted)).map_err(|error| refuse(path, error))
            })?;
            Ok(Self::new(path, key, Table::Parquet(rows)))
        }

        /// Opens an Arrow IPC file, of either kind.
        ///
        /// # Errors
        /// As [`Rows::open_parquet`].
        pub fn open_arrow(path: &Path, key: &str) -> Result<Self> {
            let mut file = File::open(path).map_err(TrainError::io("read", path))?;
            let mut mark = [0; 6];
            let is_file = file.read_exact(&mut mark).is_ok() && &mark == b"ARROW1";
            file.rewind().map_err(TrainError::io("read", path))?;
            let file = BufReader::new(file);
            let table = guarded(path, || {
                let (table, schema) = if is_file {
                    let reader = FileReader::try_new(file, None).map_err(|error| refuse(path, error))?;
                    let schema = reader.schema();
                    (Table::ArrowFile(reader), schema)
                } else {
                    let reader = StreamReader::try_new(file, None).map_err(|error| refuse(path, error))?;
                    let schema = reader.schema();
                    (Table::ArrowStream(reader), schema)
                };
                check_column(path, key, &schema)?;
                Ok(table)
            })?;
            Ok(Self::new(path, key, table))
        }

        fn new(path: &Path, key: &str, table: Table) -> Self {
            Self { path: path.to_path_buf(), key: key.to_owned(), table, batch: VecDeque::new() }
        }

        /// The next row's text; empty for a row without one.
        ///
        /// # Errors
        /// A damaged file.
        pub fn next_text(&mut self) -> Result<Option<String>> {
            loop {
                if let Some(text) = self.batch.pop_front() {
                    return Ok(Some(text));
                }
                let Self { path, key, table, batch } = self;
                let more = guarded(path, || match table {
                    Table::Parquet(rows) => match rows.next() {
                        None => Ok(false),
                        Some(row) => {
                            let row = row.map_err(|error| refuse(path, error))?;
                            batch.push_back(text_of(path, row.get_column_iter().next().map(|(_, field)| field))?);
                            Ok(true)
                        }
                    },
                    Table::ArrowFile(reader) => take(path, key, reader.next(), batch),
                    Table::ArrowStream(reader) => take(path, key, reader.next(), batch),
                })?;
                if !more {
                    return Ok(None);
                }
            }
        }
    }

    fn no_column<'n>(path: &Path, key: &str, names: impl Iterator<Item = &'n str>) -> TrainError {
        let names = names.take(8).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        refuse(path, format!("wanted a column `{key}`, found {names}"))
    }

    fn text_of(path: &Path, field: Option<&Field>) -> Result<String> {
        match field {
            Some(Field::Str(text)) => Ok(text.clone()),
            // A column of bytes that does not call itself text.
            Some(Field::Bytes(bytes)) => {
                let text = std::str::from_utf8(bytes.data());
                text.map(str::to_owned).map_err(|_| refuse(path, "wanted texts in UTF-8, found other bytes"))
            }
            _ => Ok(String::new()),
        }
    }

    fn check_column(path: &Path, key: &str, schema: &Schema) -> Result<()> {
        let fields = schema.fields();
        let field = fields.iter().find(|field| field.name() == key);
        let field = field.ok_or_else(|| no_column(path, key, fields.iter().map(|field| field.name().as_str())))?;
        match field.data_type() {
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => Ok(()),
            other => Err(refuse(path, format!("column `{key}`: wanted texts, found {other}"))),
        }
    }

    /// Appends the texts of a batch; whether there was one.
    fn take(
        path: &Path,
        key: &str,
        batch: Option<std::result::Result<RecordBatch, ArrowError>>,
        texts: &mut VecDeque<String>,
    ) -> Result<bool> {
        let Some(batch) = batch else { return Ok(false) };
        let batch = batch.map_err(|error| refuse(path, error))?;
        let column = batch.column_by_name(key).ok_or_else(|| no_column(path, key, std::iter::empty()))?;
        let owned = |text: Option<&str>| text.unwrap_or_default().to_owned();
        match column.data_type() {
            DataType::Utf8 => texts.extend(column.as_string::<i32>().iter().map(owned)),
            DataType::LargeUtf8 => texts.extend(column.as_string::<i64>().iter().map(owned)),
            DataType::Utf8View => texts.extend(column.as_string_view().iter().map(owned)),
            other => return Err(refuse(path, format!("column `{key}`: wanted texts, found {other}"))),
        }
        Ok(true)
    }
}
