//! Files written whole or not at all: beside their place, to the disk, then renamed.

use crate::ModelError;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// Writes a file whole or not at all: whoever reads `path`, even after a crash, finds the old content or the new.
///
/// # Errors
/// What the system says; the old file stands and nothing else is left behind.
pub fn atomic_write(path: &Path, bytes: &[u8]) -> Result<(), ModelError> {
    atomic_write_with(path, |out| out.write_all(bytes))
}

/// As [`atomic_write`], for content that is made while writing.
///
/// # Errors
/// What the system or `fill` says.
pub fn atomic_write_with(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> Result<(), ModelError> {
    Staged::new(path, fill)?.publish()
}

/// A file that is on the disk whole, but not yet in its place; gone when dropped. Several that belong together are all
/// staged before the first is published.
pub(crate) struct Staged {
    temporary: NamedTempFile,
    path: PathBuf,
}

impl Staged {
    /// Writes what `fill` gives beside `path`.
    pub(crate) fn new(
        path: &Path,
        fill: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
    ) -> Result<Self, ModelError> {
        let mut temporary = tempfile::Builder::new()
            .prefix(".unfinished-")
            .permissions(ordinary_permissions())
            .tempfile_in(folder_of(path))
            .map_err(ModelError::io(path))?;
        let write = |file: &mut File| -> std::io::Result<()> {
            let mut out = BufWriter::with_capacity(1 << 20, file);
            fill(&mut out)?;
            out.into_inner().map_err(|error| error.into_error())?.sync_all()
        };
        write(temporary.as_file_mut()).map_err(ModelError::io(path))?;
        Ok(Self { temporary, path: path.to_path_buf() })
    }

    /// Where it is until then.
    pub(crate) fn path(&self) -> &Path {
        self.temporary.path()
    }

    /// Puts it in its place, over what is there.
    pub(crate) fn publish(self) -> Result<(), ModelError> {
        let Self { temporary, path } = self;
        temporary.persist(&path).map_err(|error| ModelError::io(&path)(error.error))?;
        sync_folder(folder_of(&path)).map_err(ModelError::io(&path))
    }
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Brings a folder's list of names to the disk.
///
/// # Errors
/// What the system says.
pub fn sync_folder(folder: &Path) -> std::io::Result<()> {
    File::open(folder)?.sync_all()
}

/// What a file made in the usual way gets, less what the process's mask takes away.
#[cfg(unix)]
fn ordinary_permissions() -> std::fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(0o666)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        atomic_write(&path, b"old").unwrap();
        let failure = atomic_write_with(&path, |out| {
            out.write_all(b"half")?;
            Err(std::io::Error::other("no space"))
        });
        assert!(failure.unwrap_err().to_string().ends_with("f: no space"));
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
