//! IDX files, as MNIST and its successors are published (LeCun, Cortes, Burges): two zero bytes, the type (8: unsigned
//! bytes), the number of dimensions, each dimension in four bytes, most significant first, then the numbers. Plain or
//! gzipped.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use flate2::read::GzDecoder;

use crate::{Result, TrainError};

/// Bytes that one file may unfold to.
const MOST_BYTES: u64 = 1 << 32;

/// The content of an IDX file of unsigned bytes.
#[derive(Debug, PartialEq)]
pub(super) struct Idx {
    pub(super) dims: Vec<usize>,
    pub(super) bytes: Vec<u8>,
}

/// Reads a file of one to four dimensions.
///
/// # Errors
/// The system's; another type, more dimensions, fewer or more bytes than the dimensions say.
pub(super) fn read(path: &Path) -> Result<Idx> {
    let mut file = BufReader::new(File::open(path).map_err(TrainError::io("open", path))?);
    let gzipped = {
        use std::io::BufRead;
        file.fill_buf().map_err(TrainError::io("read", path))?.starts_with(&[0x1f, 0x8b])
    };
    if gzipped { parse(path, &mut GzDecoder::new(file)) } else { parse(path, &mut file) }
}

fn parse(path: &Path, input: &mut dyn Read) -> Result<Idx> {
    let refuse = |message: String| TrainError::Data { what: path.display().to_string(), message };
    let mut take = |bytes: &mut [u8], what: &str| {
        input.read_exact(bytes).map_err(|error| refuse(format!("IDX file: wanted {what}, found {error}")))
    };
    let mut head = [0; 4];
    take(&mut head, "four bytes of a head")?;
    if head[..3] != [0, 0, 8] || !(1..=4).contains(&head[3]) {
        return Err(refuse(format!("IDX file: wanted a head of 0, 0, 8 and 1 to 4 dimensions, found {head:?}")));
    }
    let mut dims = Vec::new();
    let mut total = 1_u64;
    for _ in 0..head[3] {
        let mut dim = [0; 4];
        take(&mut dim, "four bytes a dimension")?;
        let dim = u32::from_be_bytes(dim);
        // Each dimension fits 32 bits and the product so far too, so nothing overflows.
        total *= u64::from(dim);
        dims.push(dim as usize);
        if total > MOST_BYTES {
            return Err(refuse(format!("IDX file: wanted at most {MOST_BYTES} bytes, found dimensions {dims:?}")));
        }
    }
    // Grown as it is read: a head that promises more than there is takes no memory.
    let mut bytes = Vec::new();
    let read = input.take(total + 1).read_to_end(&mut bytes);
    read.map_err(|error| refuse(format!("IDX file: wanted {total} bytes, found {error}")))?;
    if bytes.len() as u64 != total {
        let found = if bytes.len() as u64 > total { "more".to_owned() } else { bytes.len().to_string() };
        return Err(refuse(format!("IDX file: wanted {total} bytes for dimensions {dims:?}, found {found}")));
    }
    Ok(Idx { dims, bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    const GOOD: [u8; 18] = [0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 10, 20, 30, 40, 50, 60];

    fn parse(mut bytes: &[u8]) -> Result<Idx> {
        super::parse(Path::new("x.idx"), &mut bytes)
    }

    #[test]
    fn on_paper_plain_and_gzipped() {
        let wanted = Idx { dims: vec![2, 3], bytes: vec![10, 20, 30, 40, 50, 60] };
        assert_eq!(parse(&GOOD).unwrap(), wanted);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.gz");
        let mut zip = flate2::write::GzEncoder::new(File::create(&path).unwrap(), flate2::Compression::fast());
        zip.write_all(&GOOD).unwrap();
        zip.finish().unwrap();
        assert_eq!(read(&path).unwrap(), wanted);
        std::fs::write(&path, GOOD).unwrap();
        assert_eq!(read(&path).unwrap(), wanted);
    }

    #[test]
    fn broken_files_are_named() {
        let message = |bytes: &[u8]| parse(bytes).unwrap_err().to_string();
        let mut other = GOOD;
        other[2] = 13;
        assert!(message(&other).starts_with("x.idx: IDX file: wanted a head of 0, 0, 8"), "{}", message(&other));
        assert!(message(&GOOD[..17]).contains("wanted 6 bytes for dimensions [2, 3], found 5"));
        assert!(message(&[&GOOD[..], &[1]].concat()).contains("found more"));
        assert!(message(&GOOD[..9]).contains("wanted four bytes a dimension"));
        let huge = [&[0, 0, 8, 4][..], &[255; 16]].concat();
        assert!(message(&huge).contains("wanted at most 4294967296 bytes"), "{}", message(&huge));
        let promise = [0, 0, 8, 1, 255, 255, 255, 255, 1];
        assert!(message(&promise).contains("wanted 4294967295 bytes for dimensions [4294967295], found 1"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            if let Ok(found) = parse(&bytes) {
                prop_assert_eq!(found.bytes.len(), found.dims.iter().product::<usize>());
            }
        }
    }
}
