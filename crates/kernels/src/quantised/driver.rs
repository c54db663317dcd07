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
/// What is left of a product would give each thread so many tasks of the next one's size: a thread that is held up does not
/// keep the others waiting. But a task has so many bytes to read.
const TASKS_PER_THREAD: usize = 4;
const TASK_BYTES: usize = 1 << 16;
/// Bytes of activations that stay in the second cache while panels pass over them.
const CACHED_BYTES: usize = 1 << 19;
/// At least so many rows share a reading of the weights, even if they leave that cache.
const SHARING_ROWS: usize = 48;
/// With fewer rows than this the kernel for many rows, if there is one, loses to the other.
const MANY_ROWS: usize = 8;
/// And so it does with so few rows of a last tile.
const FEW_ROWS: usize = 4;
/// Bytes of activations for that kernel that stay in the second cache while panels pass over them.
const MANY_CACHED_BYTES: usize = 1 << 20;
/// Panels of a task at least, if that leaves each thread one: that kernel lays out the rows anew for each task.
const MANY_PANELS: usize = 32;

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

/// Panels times many rows, along all of K.
pub(super) struct ManyRows<'a> {
    pub(super) matrix: &'a QuantisedMatrix,
    pub(super) panels: Range<usize>,
    /// Each row's records: one for each block of all units.
    pub(super) rows: &'a [*const Record],
    /// Where the first row of the result begins; nobody else uses the panels' columns of these rows. Rows are as long
    /// as the matrix has outputs.
    pub(super) c: *mut f32,
}

/// An instruction set's kernel for a format.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    rows: usize,
    /// # Safety
    /// As [`Tile`] says, on a machine with the instruction set; at most `rows` rows.
    multiply: unsafe fn(&Tile),
    /// # Safety
    /// As [`ManyRows`] says, on a machine with the instruction set.
    multiply_many: Option<unsafe fn(&ManyRows)>,
}

impl Kernel {
    pub(super) fn of<L: Layout>(isa: Isa) -> Self {
        assert!(isa <= Isa::best());
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => Self {
                multiply_many: Some(super::amx::multiply::<crate::tiles::Hardware, L>),
                ..Self::of::<L>(Isa::Avx512)
            },
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Self { rows: super::avx512::ROWS, multiply: super::avx512::multiply::<L>, multiply_many: None }
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 if is_x86_feature_detected!("avxvnni") => {
                Self { multiply: super::avx2::multiply::<L, true>, ..Self::avx2_without_vnni::<L>() }
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Self::avx2_without_vnni::<L>(),
            _ => Self { rows: super::portable::ROWS, multiply: super::portable::multiply::<L>, multiply_many: None },
        }
    }

    /// That of AVX2 on processors that have no more.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn avx2_without_vnni<L: Layout>() -> Self {
        Self { rows: super::avx2::ROWS, multiply: super::avx2::multiply::<L, false>, multiply_many: None }
    }

    /// That of AMX on simulated tiles.
    #[cfg(all(test, target_arch = "x86_64"))]
    pub(super) fn simulated<L: Layout>() -> Self {
        let multiply_many = Some(super::amx::multiply::<crate::tiles::Simulated, L> as unsafe fn(&ManyRows));
        Self { multiply_many, ..Self::of::<L>(Isa::Avx512) }
    }

    /// Whether so many rows go to `multiply_many`.
    fn takes_many(&self, rows: usize) -> bool {
        self.multiply_many.is_some() && rows >= MANY_ROWS
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
    if jobs.is_empty() {
        return;
    }
    let c = DisjointMut::new(c);
    let bytes: usize = jobs.iter().map(|job| job.matrix.bytes().len()).sum();
    let threads = if bytes < SERIAL_BYTES { 1 } else { parallel::threads() };
    let tasks = cut(kernel, jobs, threads);
    let serial_count = if threads == 1 { usize::MAX } else { 1 };
    parallel::for_each_index(tasks.len(), serial_count, |task| {
        let Task { job, panels } = &tasks[task];
        let Job { matrix, rows } = &jobs[*job];
        let records = |row: usize| activations.row(source(row));
        let rest = match rows.len() % LANES {
            rest @ 1..=FEW_ROWS => rest,
            _ => 0,
        };
        let many = if kernel.takes_many(rows.len()) { rows.start..rows.end - rest } else { rows.start..rows.start };
        run_many(kernel, matrix, panels, many.clone(), &records, &c);
        run_few(kernel, matrix, panels, many.end..rows.end, &records, &c);
    });
}

/// Panels times rows, by the kernel for many rows.
fn run_many(
    kernel: Kernel,
    matrix: &QuantisedMatrix,
    panels: &Range<usize>,
    rows: Range<usize>,
    records: &impl Fn(usize) -> *const Record,
    c: &DisjointMut<f32>,
) {
    let Some(multiply) = kernel.multiply_many else { return };
    let row_bytes = matrix.blocks() * size_of::<Record>();
    let together = (MANY_CACHED_BYTES / row_bytes.max(1)).max(SHARING_ROWS).next_multiple_of(LANES);
    for first in rows.clone().step_by(together) {
        let rows: Vec<_> = (first..rows.end.min(first + together)).map(records).collect();
        let product = ManyRows { matrix, panels: panels.clone(), rows: &rows, c: c.at(first * matrix.n()) };
        // SAFETY: `row` gave whole rows; rows and panels of C belong to this task alone and lie inside it, for the
        // callers' assertion on its length says so.
        unsafe { multiply(&product) };
    }
}

/// Panels times rows, a few at a time.
fn run_few(
    kernel: Kernel,
    matrix: &QuantisedMatrix,
    panels: &Range<usize>,
    rows: Range<usize>,
    records: &impl Fn(usize) -> *const Record,
    c: &DisjointMut<f32>,
) {
    if rows.is_empty() {
        return;
    }
    let n = matrix.n();
    let row_bytes = matrix.blocks() * size_of::<Record>();
    let together = (CACHED_BYTES / row_bytes.max(1)).max(SHARING_ROWS) / kernel.rows * kernel.rows;
    for first in rows.clone().step_by(together) {
        let rows: Vec<_> = (first..rows.end.min(first + together)).map(records).collect();
        // As few tiles as it takes, of about equal height.
        let height = rows.len().div_ceil(rows.len().div_ceil(kernel.rows));
        for panel in panels.clone() {
            for (tile, rows) in rows.chunks(height).enumerate() {
                let tile = Tile {
                    panel: matrix.panel(panel).as_ptr(),
                    units: matrix.units(),
                    fetch: tile == 0,
                    rows,
                    c: c.at((first + tile * height) * n + panel * LANES),
                    c_stride: n,
                    columns: LANES.min(n - panel * LANES),
                };
                // SAFETY: `panel` and `row` gave whole panels and rows; rows and panels of C belong to this task
                // alone and lie inside it, for `c.at` and the callers' assertion on its length say so.
                unsafe { (kernel.multiply)(&tile) };
            }
        }
    }
}

/// Cuts the jobs into tasks, the largest first, and ever smaller ones of what is left: the threads end together.
fn cut(kernel: Kernel, jobs: &[Job], threads: usize) -> Vec<Task> {
    let mut left: usize = jobs.iter().map(Job::work).sum();
    let least = READING_ROWS * TASK_BYTES;
    let mut order: Vec<usize> = (0..jobs.len()).collect();
    order.sort_by_key(|&job| std::cmp::Reverse(jobs[job].work()));
    let mut tasks = Vec::new();
    for index in order {
        let job = &jobs[index];
        let panels = job.matrix.panels();
        let mut begun = 0;
        while begun < panels {
            let share = if threads == 1 { usize::MAX } else { (left / (threads * TASKS_PER_THREAD)).max(least) };
            let panel_work = job.work().div_ceil(panels).max(1);
            let mut step = (share / panel_work).max(1);
            if kernel.takes_many(job.rows.len()) {
                step = step.max(MANY_PANELS.min(panels.div_ceil(threads)));
            }
            let end = panels.min(begun + step);
            tasks.push(Task { job: index, panels: begun..end });
            left = left.saturating_sub((end - begun) * panel_work);
            begun = end;
        }
    }
    tasks
}
