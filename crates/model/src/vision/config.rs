//! [`VisionConfig`]: what a vision transformer is made of, and its `config.json`.

use crate::ModelError;
use moebius_moe::routers::MethodConfig;
use serde_json::{Value, json};

/// The `model_type` of our vision transformers.
pub(super) const MODEL_TYPE: &str = "moebius_vision";
/// The largest size that any one dimension may ask for.
const LARGEST: usize = 1 << 16;
/// The most weights a model may ask for.
const MOST_WEIGHTS: u128 = 1 << 36;

/// A vision transformer's shape.
#[derive(Clone, Debug, PartialEq)]
pub struct VisionConfig {
    /// Numbers a pixel has: 1 (grey) or 3 (red, green, blue).
    pub channels: usize,
    /// Pixels from top to bottom; a multiple of `patch`.
    pub height: usize,
    /// Pixels from left to right; a multiple of `patch`.
    pub width: usize,
    /// Pixels of a patch's side.
    pub patch: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Blocks.
    pub layers: usize,
    /// Heads of attention; divides `hidden`.
    pub heads: usize,
    /// Inner width of a dense block's network, and of one expert.
    pub ffn: usize,
    /// Classes.
    pub classes: usize,
    /// What the class is read off.
    pub pooling: Pooling,
    /// How many of the last blocks are mixtures.
    pub sparse_layers: usize,
    /// What mixture they are; without one every block is dense.
    pub mixture: Option<Mixture>,
}

/// What the class of an image is read off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pooling {
    /// The mean of its tokens.
    #[default]
    Mean,
    /// A token of its own that stands before the patches.
    Token,
}

/// A sparse block's feed-forward part.
#[derive(Clone, Debug, PartialEq)]
pub enum Mixture {
    /// Tokens go to experts by a routing method.
    Routed {
        /// Which.
        method: MethodConfig,
        /// Networks there are.
        experts: usize,
        /// Networks a token is meant for.
        top_k: usize,
    },
    /// Experts compute on slots, weighted means of an image's tokens.
    Soft {
        /// Networks there are.
        experts: usize,
        /// Slots of each, an image.
        slots: usize,
    },
}

impl Mixture {
    /// Networks there are.
    pub fn experts(&self) -> usize {
        match *self {
            Self::Routed { experts, .. } | Self::Soft { experts, .. } => experts,
        }
    }
}

impl VisionConfig {
    /// Numbers of a patch.
    pub fn patch_len(&self) -> usize {
        self.channels * self.patch * self.patch
    }

    /// Patches of an image.
    pub fn patches(&self) -> usize {
        (self.height / self.patch) * (self.width / self.patch)
    }

    /// Tokens of an image: its patches, and the class's own if it has one.
    pub fn tokens(&self) -> usize {
        self.patches() + usize::from(self.pooling == Pooling::Token)
    }

    /// Numbers of an image.
    pub fn pixels(&self) -> usize {
        self.channels * self.height * self.width
    }

    /// Looks for contradictions.
    ///
    /// # Errors
    /// The key that is wrong, and what was wanted and found.
    pub fn validate(&self) -> Result<(), (&'static str, String)> {
        let sizes = [
            ("height", self.height),
            ("width", self.width),
            ("patch", self.patch),
            ("hidden", self.hidden),
            ("layers", self.layers),
            ("heads", self.heads),
            ("ffn", self.ffn),
            ("classes", self.classes),
        ];
        for (key, size) in sizes {
            if !(1..=LARGEST).contains(&size) {
                return Err((key, format!("wanted 1 to {LARGEST}, found {size}")));
            }
        }
        if ![1, 3].contains(&self.channels) {
            return Err(("channels", format!("wanted 1 or 3, found {}", self.channels)));
        }
        for (key, size) in [("height", self.height), ("width", self.width)] {
            if !size.is_multiple_of(self.patch) {
                return Err((key, format!("wanted a multiple of patch = {}, found {size}", self.patch)));
            }
        }
        if !self.hidden.is_multiple_of(self.heads) {
            return Err(("heads", format!("wanted a divisor of hidden = {}, found {}", self.hidden, self.heads)));
        }
        self.validate_mixture()?;
        let weights = self.count_weights();
        if weights > MOST_WEIGHTS {
            return Err((
                "hidden",
                format!("with the other sizes it asks for {weights} weights, more than there may be"),
            ));
        }
        Ok(())
    }

    fn validate_mixture(&self) -> Result<(), (&'static str, String)> {
        let most = if self.mixture.is_some() { 1..=self.layers } else { 0..=0 };
        if !most.contains(&self.sparse_layers) {
            let wanted = format!("wanted {} to {}", most.start(), most.end());
            return Err(("sparse_layers", format!("{wanted}, found {}", self.sparse_layers)));
        }
        match &self.mixture {
            Some(Mixture::Routed { experts, .. } | Mixture::Soft { experts, .. }) if !(1..=4096).contains(experts) => {
                Err(("experts", format!("wanted 1 to 4096, found {experts}")))
            }
            Some(Mixture::Soft { slots, .. }) if !(1..=4096).contains(slots) => {
                Err(("slots", format!("wanted 1 to 4096, found {slots}")))
            }
            _ => Ok(()),
        }
    }

    fn count_weights(&self) -> u128 {
        let wide = |size: usize| size as u128;
        let experts = self.mixture.as_ref().map_or(1, Mixture::experts);
        let block = 4 * wide(self.hidden) + 3 * wide(experts) * wide(self.ffn);
        wide(self.hidden)
            * (wide(self.layers) * block + wide(self.tokens()) + wide(self.classes) + wide(self.patch_len()))
    }

    /// What `config.json` holds.
    pub fn to_json(&self) -> Value {
        let mut map = json!({
            "model_type": MODEL_TYPE,
            "channels": self.channels,
            "height": self.height,
            "width": self.width,
            "patch": self.patch,
            "hidden": self.hidden,
            "layers": self.layers,
            "heads": self.heads,
            "ffn": self.ffn,
            "classes": self.classes,
            "pooling": match self.pooling { Pooling::Mean => "mean", Pooling::Token => "token" },
            "sparse_layers": self.sparse_layers,
        });
        match &self.mixture {
            None => {}
            Some(Mixture::Soft { experts, slots }) => {
                map["mixture"] = json!({"kind": "soft", "experts": experts, "slots": slots});
            }
            Some(Mixture::Routed { method, experts, top_k }) => {
                map["mixture"] = json!({"kind": "routed", "experts": experts, "experts_per_token": top_k,
                    "router": method.name, "options": crate::methods::write_options(&method.options)});
            }
        }
        map
    }

    /// Reads what [`VisionConfig::to_json`] wrote; `file` is its name for errors.
    ///
    /// # Errors
    /// A key that is missing, of another type or out of range; another `model_type`.
    pub fn from_json(value: &Value, file: &str) -> Result<Self, ModelError> {
        let keys = Keys { map: value, file };
        if keys.text("model_type")? != MODEL_TYPE {
            let found = &value["model_type"];
            return Err(ModelError::config(file, "model_type", format!("wanted {MODEL_TYPE:?}, found {found}")));
        }
        let pooling = match keys.text("pooling")? {
            "mean" => Pooling::Mean,
            "token" => Pooling::Token,
            found => return Err(ModelError::config(file, "pooling", format!("wanted mean or token, found {found:?}"))),
        };
        let config = Self {
            channels: keys.size("channels")?,
            height: keys.size("height")?,
            width: keys.size("width")?,
            patch: keys.size("patch")?,
            hidden: keys.size("hidden")?,
            layers: keys.size("layers")?,
            heads: keys.size("heads")?,
            ffn: keys.size("ffn")?,
            classes: keys.size("classes")?,
            pooling,
            sparse_layers: keys.size("sparse_layers")?,
            mixture: value.get("mixture").map(|mixture| read_mixture(&Keys { map: mixture, file })).transpose()?,
        };
        config.validate().map_err(|(key, message)| ModelError::config(file, key, message))?;
        Ok(config)
    }
}

/// The keys of an object, with errors that name file and key.
struct Keys<'a> {
    map: &'a Value,
    file: &'a str,
}

impl<'a> Keys<'a> {
    fn size(&self, key: &str) -> Result<usize, ModelError> {
        let found = self.map.get(key);
        let number = found.and_then(Value::as_u64).and_then(|number| usize::try_from(number).ok());
        number
            .ok_or_else(|| ModelError::config(self.file, key, format!("wanted a whole number, found {}", show(found))))
    }

    fn text(&self, key: &str) -> Result<&'a str, ModelError> {
        let found = self.map.get(key);
        let text = found.and_then(Value::as_str);
        text.ok_or_else(|| ModelError::config(self.file, key, format!("wanted a text, found {}", show(found))))
    }
}

fn show(value: Option<&Value>) -> String {
    value.map_or_else(|| "nothing".to_owned(), Value::to_string)
}

fn read_mixture(keys: &Keys<'_>) -> Result<Mixture, ModelError> {
    let experts = keys.size("experts")?;
    match keys.text("kind")? {
        "soft" => Ok(Mixture::Soft { experts, slots: keys.size("slots")? }),
        "routed" => {
            let options = crate::methods::read_options(keys.map.get("options"), keys.file)?;
            let method = MethodConfig { name: keys.text("router")?.to_owned(), options };
            Ok(Mixture::Routed { method, experts, top_k: keys.size("experts_per_token")? })
        }
        found => Err(ModelError::config(keys.file, "kind", format!("wanted soft or routed, found {found:?}"))),
    }
}
