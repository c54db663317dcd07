//! Folders written whole or not at all: temporary name, fsync, rename, fsync of the folder above.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::{Result, TrainError};

/// Stands in the name of everything that is not finished, files (of `moebius_model::atomic_write`) and folders alike;
/// whatever bears it may be deleted at any time.
const UNFINISHED: &str = ".unfinished";

fn is_unfinished(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().contains(UNFINISHED))
}

/// `path` with [`UNFINISHED`] behind its name.
pub fn unfinished(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(UNFINISHED);
    PathBuf::from(name)
}

/// Writes a file so that at every instant its name stands for the old content or for all of the new.
///
/// # Errors
/// The system's; nothing half-written stays.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    Ok(moebius_model::atomic_write(path, bytes)?)
}

/// Makes a folder so that its name exists only once all that `fill` puts into it is on the disk.
///
/// `fill` gets the temporary folder's path. An older folder of that name is replaced.
///
/// # Errors
/// The system's or `fill`'s; nothing half-written stays.
pub fn write_folder_whole(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let temporary = unfinished(path);
    remove_folder(&temporary)?;
    let parent = path.parent().unwrap_or(Path::new("."));
    create_folder(&temporary)?;
    let filled = fill(&temporary).and_then(|()| sync_tree(&temporary)).and_then(|()| {
        if path.exists() {
            remove_folder(path)?;
        }
        fs::rename(&temporary, path).map_err(TrainError::io("rename", path))
    });
    if let Err(error) = filled {
        fs::remove_dir_all(&temporary).ok();
        return Err(error);
    }
    sync_folder(parent)
}

/// Makes a folder and those above it.
pub fn create_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(TrainError::io("create", path))
}

/// Deletes a folder, if it is there, in such a way that a half-deleted one does not bear its name.
pub fn remove_folder(path: &Path) -> Result<()> {
    let mut doomed = path.to_path_buf();
    if !is_unfinished(path) && path.exists() {
        doomed = unfinished(&path.with_added_extension("old"));
        remove_folder(&doomed)?;
        fs::rename(path, &doomed).map_err(TrainError::io("rename", path))?;
    }
    match fs::remove_dir_all(&doomed) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(TrainError::Io { action: "delete", path: doomed, source })
        }
        _ => Ok(()),
    }
}

/// Deletes what interrupted writes left in `folder`.
pub fn sweep(folder: &Path) -> Result<()> {
    for path in entries(folder)? {
        if is_unfinished(&path) {
            let gone = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            gone.map_err(TrainError::io("delete", &path))?;
        }
    }
    Ok(())
}

/// What stands in `folder`, sorted; nothing if there is no such folder.
pub fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let listing = match fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        listing => listing.map_err(TrainError::io("read", folder))?,
    };
    let paths = listing.map(|entry| entry.map(|entry| entry.path()).map_err(TrainError::io("read", folder)));
    let mut paths = paths.collect::<Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

/// Fsyncs every file below `folder`, then the folders.
fn sync_tree(folder: &Path) -> Result<()> {
    for path in entries(folder)? {
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            File::open(&path).and_then(|file| file.sync_all()).map_err(TrainError::io("sync", &path))?;
        }
    }
    sync_folder(folder)
}

/// Fsyncs the folder itself: the names in it.
pub fn sync_folder(folder: &Path) -> Result<()> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    File::open(folder).and_then(|file| file.sync_all()).map_err(TrainError::io("sync", folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_fill_leaves_the_old_folder() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("step-1");
        write_folder_whole(&path, |folder| write_whole(&folder.join("a"), b"old")).unwrap();
        let failed = write_folder_whole(&path, |folder| {
            write_whole(&folder.join("a"), b"new")?;
            Err(TrainError::Tokenizer("stop".to_owned()))
        });
        assert!(failed.is_err());
        assert_eq!(fs::read(path.join("a")).unwrap(), b"old");
        assert_eq!(entries(root.path()).unwrap(), std::slice::from_ref(&path));
        write_folder_whole(&path, |folder| write_whole(&folder.join("b"), b"new")).unwrap();
        assert_eq!(entries(&path).unwrap(), [path.join("b")]);
    }

    #[test]
    fn sweep_deletes_only_the_unfinished() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("whole"), "1").unwrap();
        fs::write(root.path().join(".unfinished-x1"), "1").unwrap();
        fs::create_dir_all(root.path().join("step-3.unfinished/x")).unwrap();
        sweep(root.path()).unwrap();
        assert_eq!(entries(root.path()).unwrap(), [root.path().join("whole")]);
        sweep(&root.path().join("absent")).unwrap();
    }
}
