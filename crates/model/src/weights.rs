//! [`Weights`]: hands out the weights of a model under construction, each with the next id.

use crate::ModelError;
use crate::position::Rotations;
use moebius_tensor::Param;

/// Makes the weight of an id, a name and a shape.
pub(crate) type MakeParam<'s> = dyn FnMut(usize, &str, &[usize]) -> Result<Param, ModelError> + 's;

/// Asked for weights in the order of their ids.
pub(crate) struct Weights<'m, 's> {
    make: &'m mut MakeParam<'s>,
    next_id: usize,
    /// What the names of the part under construction begin with.
    prefix: String,
    /// The rotations that layers share.
    pub(crate) rotations: Rotations,
}

impl<'m, 's> Weights<'m, 's> {
    pub(crate) fn new(make: &'m mut MakeParam<'s>) -> Self {
        Self { make, next_id: 0, prefix: String::new(), rotations: Rotations::default() }
    }

    /// The next weight, of this name inside the part under construction.
    pub(crate) fn get(&mut self, name: &str, shape: &[usize]) -> Result<Param, ModelError> {
        self.next_id += 1;
        (self.make)(self.next_id - 1, &format!("{}{name}", self.prefix), shape)
    }

    /// As [`Weights::get`], if it is wanted at all.
    pub(crate) fn get_if(&mut self, wanted: bool, name: &str, shape: &[usize]) -> Result<Option<Param>, ModelError> {
        if wanted { self.get(name, shape).map(Some) } else { Ok(None) }
    }

    /// Builds a part whose weights' names begin with `part`.
    pub(crate) fn within<T>(
        &mut self,
        part: &str,
        build: impl FnOnce(&mut Self) -> Result<T, ModelError>,
    ) -> Result<T, ModelError> {
        let length = self.prefix.len();
        self.prefix.push_str(part);
        let built = build(self);
        self.prefix.truncate(length);
        built
    }
}
