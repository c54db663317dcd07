//! Labelled images in memory, and batches of them.

use std::path::Path;

use super::recipe::{Format, VisionRecipe};
use super::{folders, idx};
use crate::digest::{Digest, Hasher};
use crate::{Result, TrainError};

/// Numbers a pixel has, pixels from top to bottom and from left to right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageShape {
    /// 1 or 3.
    pub channels: usize,
    /// From top to bottom.
    pub height: usize,
    /// From left to right.
    pub width: usize,
}

impl ImageShape {
    /// Numbers of an image.
    pub fn pixels(self) -> usize {
        self.channels * self.height * self.width
    }
}

/// Images with their classes.
#[derive(Clone, Debug)]
pub struct Images {
    /// Of each of them.
    pub shape: ImageShape,
    /// `[images, channels * height * width]`
    pub pixels: Vec<u8>,
    /// `[images]`
    pub labels: Vec<u32>,
}

impl Images {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Some images, their pixels from −1 to 1, and their classes.
    ///
    /// # Shapes
    /// pixels `[numbers, channels * height * width]`, labels `[numbers]`.
    pub fn batch(&self, numbers: impl IntoIterator<Item = usize>) -> (Vec<f32>, Vec<u32>) {
        let (mut pixels, mut labels) = (Vec::new(), Vec::new());
        let size = self.shape.pixels();
        for number in numbers {
            let image = &self.pixels[number * size..(number + 1) * size];
            pixels.extend(image.iter().map(|&byte| f32::from(byte) / 127.5 - 1.0));
            labels.push(self.labels[number]);
        }
        (pixels, labels)
    }
}

/// Images to learn from and images held back.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// To learn from.
    pub train: Images,
    /// Held back.
    pub valid: Images,
    /// The names of the classes, by label; numbers where the files name none.
    pub classes: Vec<String>,
}

impl Dataset {
    /// Reads what a recipe names.
    ///
    /// # Errors
    /// What is missing, broken or contradictory, by file.
    pub fn load(recipe: &VisionRecipe) -> Result<Self> {
        let data = &recipe.data;
        // The recipe's check has seen that each format has its keys.
        let path = |path: &Option<std::path::PathBuf>| recipe.resolve(path.as_deref().unwrap_or(Path::new("")));
        let dataset = match data.format {
            Format::Idx => {
                let train = read_idx(&path(&data.train_images), &path(&data.train_labels))?;
                let valid = read_idx(&path(&data.valid_images), &path(&data.valid_labels))?;
                let classes = train.labels.iter().max().map_or(0, |&last| last + 1);
                Self { train, valid, classes: (0..classes).map(|class| class.to_string()).collect() }
            }
            Format::Folders => {
                let (train, valid) = (path(&data.train), path(&data.valid));
                let shape = ImageShape {
                    channels: data.channels,
                    height: data.height.unwrap_or_default(),
                    width: data.width.unwrap_or_default(),
                };
                let classes = folders::classes(&train)?;
                let [train, valid] = [train, valid].map(|folder| folders::read(&folder, &classes, shape));
                Self { train: train?, valid: valid?, classes }
            }
        };
        dataset.check()?;
        Ok(dataset)
    }

    fn check(&self) -> Result<()> {
        let refuse = |what: &str, message: String| Err(TrainError::Data { what: what.to_owned(), message });
        for (what, images) in [("data.train", &self.train), ("data.valid", &self.valid)] {
            if images.is_empty() {
                return refuse(what, "wanted at least one image, found none".to_owned());
            }
            if images.len() > u32::MAX as usize {
                return refuse(what, format!("wanted fewer than 2^32 images, found {}", images.len()));
            }
        }
        let (train, valid) = (self.train.shape, self.valid.shape);
        if train != valid {
            return refuse("data.valid", format!("wanted images of {train:?} as in data.train, found {valid:?}"));
        }
        if let Some(label) = self.valid.labels.iter().find(|&&label| label as usize >= self.classes.len()) {
            return refuse(
                "data.valid",
                format!("wanted the {} classes of data.train, found {label}", self.classes.len()),
            );
        }
        Ok(())
    }

    /// A fingerprint of all images and labels.
    pub fn digest(&self) -> Digest {
        let mut hasher = Hasher::default();
        for images in [&self.train, &self.valid] {
            hasher.write_sized(&images.pixels);
            images.labels.iter().for_each(|&label| hasher.write_u64(u64::from(label)));
        }
        hasher.finish()
    }
}

fn read_idx(images: &Path, labels: &Path) -> Result<Images> {
    let (pixels, classes) = (idx::read(images)?, idx::read(labels)?);
    let refuse = |path: &Path, message: String| Err(TrainError::Data { what: path.display().to_string(), message });
    let (count, shape) = match pixels.dims[..] {
        [count, height, width] => (count, ImageShape { channels: 1, height, width }),
        [count, height, width, channels @ (1 | 3)] => (count, ImageShape { channels, height, width }),
        _ => {
            let wanted = "wanted dimensions [images, height, width] or [images, height, width, 1 or 3]";
            return refuse(images, format!("{wanted}, found {:?}", pixels.dims));
        }
    };
    if classes.dims != [count] {
        return refuse(labels, format!("wanted the labels of {count} images, found dimensions {:?}", classes.dims));
    }
    let bytes = if shape.channels == 3 { by_channel(&pixels.bytes, shape.height * shape.width) } else { pixels.bytes };
    Ok(Images { shape, pixels: bytes, labels: classes.bytes.into_iter().map(u32::from).collect() })
}

/// Images whose pixels hold red, green and blue side by side, channel by channel.
fn by_channel(interleaved: &[u8], pixels: usize) -> Vec<u8> {
    let images = interleaved.chunks_exact((3 * pixels).max(1));
    images.flat_map(|image| (0..3).flat_map(move |channel| image.iter().skip(channel).step_by(3).copied())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pixels_from_minus_one_to_one() {
        let shape = ImageShape { channels: 1, height: 1, width: 2 };
        let images = Images { shape, pixels: vec![0, 255, 51, 102], labels: vec![4, 7] };
        let (pixels, labels) = images.batch([1, 0]);
        assert_eq!(labels, [7, 4]);
        assert!(pixels.iter().zip([-0.6, -0.2, -1.0, 1.0]).all(|(found, wanted)| (found - wanted).abs() < 1e-6));
        assert_eq!(by_channel(&[1, 2, 3, 4, 5, 6], 2), [1, 4, 2, 5, 3, 6]);
    }
}
