//! The rotations of positions, made as they are asked for and shared by all layers that turn alike.

use crate::config::Rope;
use moebius_kernels::rope::RopeTable;
use std::sync::{Arc, Mutex, PoisonError};

/// The rotations of as many positions as were asked for so far: a context may be of millions.
#[derive(Debug)]
pub(crate) struct RotaryAngles {
    rope: Rope,
    frequencies: Vec<f32>,
    magnitude: f32,
    table: Mutex<Arc<RopeTable>>,
}

impl RotaryAngles {
    fn new(rope: &Rope) -> Self {
        let (frequencies, magnitude) = rope.frequencies();
        let table = RopeTable::of_frequencies(&frequencies, magnitude, rope.pairs, 0);
        Self { rope: rope.clone(), frequencies, magnitude, table: Mutex::new(Arc::new(table)) }
    }

    /// A table that holds `positions` positions. Each row is the same in a table of any length.
    pub(crate) fn covering(&self, positions: usize) -> Arc<RopeTable> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        if table.positions() < positions {
            let length = positions.next_power_of_two().max(256);
            *table = Arc::new(RopeTable::of_frequencies(&self.frequencies, self.magnitude, self.rope.pairs, length));
        }
        table.clone()
    }
}

/// The rotations of a model under construction: one for each way of turning.
#[derive(Debug, Default)]
pub(crate) struct Rotations {
    known: Vec<Arc<RotaryAngles>>,
}

impl Rotations {
    pub(crate) fn of(&mut self, rope: &Rope) -> Arc<RotaryAngles> {
        if let Some(known) = self.known.iter().find(|known| known.rope == *rope) {
            return known.clone();
        }
        let angles = Arc::new(RotaryAngles::new(rope));
        self.known.push(angles.clone());
        angles
    }
}
