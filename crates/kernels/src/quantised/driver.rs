//! How quantised products are cut into tasks and tiles. No cut changes a bit: a tile goes along all of K.

use std::ops::Range;

use super::activations::{Activations, Record};
use super::layout::{LANES, Layout};
use super::matrix::QuantisedMatrix;
use crate::isa::Isa;
use crate::parallel::{self, DisjointMut};

/// Weights of fewer bytes than this are multiplied by one thread: waking another takes longer.
const SERIAL_BYTES: usize = 1 << 15;
/// With fewer rows than this a product takes as long as reading the weights does.
const READING_ROWS: usize = 4;
/// Tasks a thread, so that a thread that is held up does not keep the others waiting, if each has so many bytes to read.
const TASKS_PER_THREAD: usize = 16;
const TASK_BYTES: usize = 1 << 17;
/// Bytes of activations that stay in the second cache while panels pass over them.
const CACHED_BYTES: usize = 1 << 19;
/// At least so many rows share a reading of the weights, even if they leave that cache.
const SHARING_ROWS: usize = 48;
/// The most rows that any instruction set's kernel takes.
const MOST_ROWS: usize = 12;

/// A panel times a block of rows, along all of K.
pub(super) struct Tile<'a> {
    /// The panel's units, readable.
    pub(super) panel: *const u8,
    pub(super) units: usize,
    /// Whether the panel comes from memory, and is to be asked for ahead.
    pub(super) fetch: bool,
    /// Each row's records: one for each block of all units.
    pub(super) rows: &'a [*const Record],
    /// Where the first row's first column goes; nobody else uses these elements.
    pub(super) c: *mut f32,
    pub(super) c_stride: usize,
    pub(super) columns: usize,
}

/// An instruction set's kernel for a format.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    rows: usize,
    /// # Safety
    /// As [`Tile`] says, on a machine with the instruction set; at most `rows` rows.
    multiply: unsafe fn(&Tile),
}

impl Kernel {
    pub(super) fn of<L: Layout>(isa: Isa) -> Self {
        assert!(isa <= Isa::best());
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Amx => Self { rows: super::avx512::ROWS, multiply: super::avx512::multiply::<L> },
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Self { rows: super::avx2::ROWS, multiply: super::avx2::multiply::<L> },
            _ => Self { rows: super::portable::ROWS, multiply: super::portable::multiply::<L> },
        }
    }
}

/// One product of a call: rows of the activations times a matrix.
pub(super) struct Job<'a> {
    pub(super) matrix: &'a QuantisedMatrix,
    /// Rows of the result.
    pub(super) rows: Range<usize>,
}

impl Job<'_> {
    fn work(&self) -> usize {
        self.rows.len().max(READING_ROWS) * self.matrix.bytes().len()
    }
}

/// Panels of a job that one thread computes.
struct Task {
    job: usize,
    panels: Range<usize>,
}

/// Runs all jobs, whose matrices have one format and shape, into `c` `[rows, n]`. Row `i` of the result is that of row
/// `source(i)` of the activations.
pub(super) fn run(
    kernel: Kernel,
    jobs: &[Job],
    activations: &Activations,
    source: &(impl Fn(usize) -> usize + Sync),
    c: &mut [f32],
) {
    let Some(n) = jobs.first().map(|job| job.matrix.n()) else { return };
    let c = DisjointMut::new(c);
    let bytes: usize = jobs.iter().map(|job| job.matrix.bytes().len()).sum();
    let threads = if bytes < SERIAL_BYTES { 1 } else { parallel::threads() };
    let tasks = cut(jobs, threads);
    let serial_count = if threads == 1 { usize::MAX } else { 1 };
    parallel::for_each_index(tasks.len(), serial_count, |task| {
        let Task { job, panels } = &tasks[task];
        let Job { matrix, rows } = &jobs[*job];
        let row_bytes = matrix.blocks() * size_of::<Record>();
        let together = (CACHED_BYTES / row_bytes.max(1)).max(SHARING_ROWS) / kernel.rows * kernel.rows;
        for first in rows.clone().step_by(together) {
            let rows = first..rows.end.min(first + together);
            for panel in panels.clone() {
                for first in rows.clone().step_by(kernel.rows) {
                    let block = first..rows.end.min(first + kernel.rows);
                    let mut records = [std::ptr::null(); MOST_ROWS];
                    for (record, row) in records.iter_mut().zip(block.clone()) {
                        *record = activations.row(source(row));
                    }
                    let tile = Tile {
                        panel: matrix.panel(panel).as_ptr(),
                        units: matrix.units(),
                        fetch: block.start == rows.start,
                        rows: &records[..block.len()],
                        c: c.at(first * n + panel * LANES),
                        c_stride: n,
                        columns: LANES.min(n - panel * LANES),
                    };
                    // SAFETY: `panel` and `row` gave whole panels and rows; rows and panels of C belong to this task
                    // alone and lie inside it, for `c.at` and the callers' assertion on its length say so.
                    unsafe { (kernel.multiply)(&tile) };
                }
            }
        }
    });
}

/// Cuts the jobs into tasks of about equal work, the largest first.
fn cut(jobs: &[Job], threads: usize) -> Vec<Task> {
    let work: usize = jobs.iter().map(Job::work).sum();
    let least = READING_ROWS * TASK_BYTES;
    let share = if threads == 1 { usize::MAX } else { work.div_ceil(threads * TASKS_PER_THREAD).max(least) };
    let mut tasks = Vec::new();
    for (index, job) in jobs.iter().enumerate() {
        let panels = job.matrix.panels();
        let step = panels.div_ceil(job.work().div_ceil(share).max(1)).max(1);
        tasks.extend((0..panels).step_by(step).map(|p| Task { job: index, panels: p..panels.min(p + step) }));
    }
    tasks.sort_by_key(|task| std::cmp::Reverse(task.panels.len() * jobs[task.job].rows.len()));
    tasks
}
