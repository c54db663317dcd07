//! Folders of images: one folder a class, PNG or JPEG files in it, brought to one size.

use std::path::Path;

use image::imageops::FilterType;
use image::{ImageReader, Limits};

use super::data::{ImageShape, Images};
use crate::{Result, TrainError, files};

/// Pixels that a side of an image may have.
const MOST_SIDE: u32 = 1 << 15;
/// Bytes that one image may unfold to.
const MOST_BYTES: u64 = 1 << 29;
/// Images that a folder may have.
const MOST_IMAGES: usize = 1 << 24;

/// The classes of a folder: its subfolders in the order of their names.
pub(super) fn classes(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for path in files::entries(folder)?.iter().filter(|path| path.is_dir()) {
        names.push(path.file_name().unwrap_or_default().to_string_lossy().into_owned());
    }
    if names.is_empty() {
        let message = "wanted a folder for each class, found none".to_owned();
        return Err(TrainError::Data { what: folder.display().to_string(), message });
    }
    Ok(names)
}

/// The images of `folder`, whose classes must be among `classes`, in the order of classes and file names.
pub(super) fn read(folder: &Path, classes: &[String], shape: ImageShape) -> Result<Images> {
    let mut images = Images { shape, pixels: Vec::new(), labels: Vec::new() };
    for class in self::classes(folder)? {
        let Some(label) = classes.iter().position(|known| *known == class) else {
            let message = format!("wanted classes of data.train ({}), found {class}", classes.join(", "));
            return Err(TrainError::Data { what: folder.display().to_string(), message });
        };
        for path in files::entries(&folder.join(&class))?.into_iter().filter(|path| is_image(path)) {
            read_image(&path, shape, &mut images.pixels)?;
            images.labels.push(label as u32);
            if images.labels.len() > MOST_IMAGES {
                let message = format!("wanted at most {MOST_IMAGES} images");
                return Err(TrainError::Data { what: folder.display().to_string(), message });
            }
        }
    }
    Ok(images)
}

fn is_image(path: &Path) -> bool {
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    path.is_file() && ["png", "jpg", "jpeg"].contains(&&extension[..])
}

/// Appends an image's pixels, channel by channel.
fn read_image(path: &Path, shape: ImageShape, pixels: &mut Vec<u8>) -> Result<()> {
    let refuse =
        |message: String| TrainError::Data { what: path.display().to_string(), message: message.replace('\n', " ") };
    let mut limits = Limits::default();
    (limits.max_image_width, limits.max_image_height) = (Some(MOST_SIDE), Some(MOST_SIDE));
    limits.max_alloc = Some(MOST_BYTES);
    let mut reader =
        ImageReader::open(path).and_then(ImageReader::with_guessed_format).map_err(TrainError::io("open", path))?;
    reader.limits(limits);
    let image = reader.decode().map_err(|error| refuse(format!("wanted a PNG or JPEG image, found: {error}")))?;
    let (height, width) = (shape.height as u32, shape.width as u32);
    let image = if (image.height(), image.width()) == (height, width) {
        image
    } else {
        image.resize_exact(width, height, FilterType::Triangle)
    };
    if shape.channels == 1 {
        pixels.extend_from_slice(image.to_luma8().as_raw());
    } else {
        let interleaved = image.to_rgb8();
        for channel in 0..3 {
            pixels.extend(interleaved.as_raw().iter().skip(channel).step_by(3));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{GrayImage, RgbImage};

    #[test]
    fn images_by_class_in_one_size() {
        let root = tempfile::tempdir().unwrap();
        for class in ["cat", "ant"] {
            std::fs::create_dir(root.path().join(class)).unwrap();
        }
        GrayImage::from_raw(2, 1, vec![0, 200]).unwrap().save(root.path().join("cat/b.png")).unwrap();
        RgbImage::from_pixel(4, 2, image::Rgb([10, 20, 30])).save(root.path().join("ant/a.png")).unwrap();
        std::fs::write(root.path().join("ant/notes.txt"), "no image").unwrap();
        let names = classes(root.path()).unwrap();
        assert_eq!(names, ["ant", "cat"]);
        let colour = read(root.path(), &names, ImageShape { channels: 3, height: 1, width: 2 }).unwrap();
        assert_eq!(colour.labels, [0, 1]);
        assert_eq!(colour.pixels, [10, 10, 20, 20, 30, 30, 0, 200, 0, 200, 0, 200]);
        let grey = read(root.path(), &names, ImageShape { channels: 1, height: 1, width: 2 }).unwrap();
        assert_eq!(grey.pixels[2..], [0, 200]);
    }

    #[test]
    fn what_is_no_image_is_named() {
        let root = tempfile::tempdir().unwrap();
        assert!(classes(root.path()).unwrap_err().to_string().contains("a folder for each class, found none"));
        std::fs::create_dir(root.path().join("cat")).unwrap();
        std::fs::write(root.path().join("cat/x.png"), "nothing of the kind").unwrap();
        let shape = ImageShape { channels: 1, height: 1, width: 2 };
        let error = read(root.path(), &["cat".into()], shape).unwrap_err().to_string();
        assert!(error.contains("cat/x.png: wanted a PNG or JPEG image, found: "), "{error}");
        let error = read(root.path(), &["dog".into()], shape).unwrap_err().to_string();
        assert!(error.contains("wanted classes of data.train (dog), found cat"), "{error}");
        // A head that promises a huge image: refused, not allocated.
        let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\x7f\xff\xff\xff\x7f\xff\xff\xff\x08\0\0\0\0".to_vec();
        png.extend([0; 16]);
        std::fs::write(root.path().join("cat/x.png"), png).unwrap();
        assert!(read(root.path(), &["cat".into()], shape).is_err());
    }
}
