//! How a product is cut: into tasks for the threads, and a task into blocks for the caches.
//!
//! No cut changes a bit: each element of the result is one chain of additions along K, and where the chain is
//! interrupted between blocks of K the sum rests in C as it is.

use std::ops::Range;

use super::kernels::{BlockProduct, Kernels, Lines, pieces};
use super::packed::{BLOCK_WORDS, LANES};
use super::{Beta, Mat, Packed};
use crate::isa::Isa;
use crate::memory::Buffer;
use crate::parallel::{self, DisjointMut};

/// Less work than this runs on one thread: waking another takes longer.
const SERIAL_WORK: usize = 1 << 20;
/// With fewer rows than this a product takes as long as reading B takes.
const READING_ROWS: usize = 6;
/// Tasks a thread, so that a thread that is held up does not keep the others waiting.
const TASKS_PER_THREAD: usize = 4;
/// Rows that are packed at once; they stay in the second cache together with `CACHED_PANELS`.
const CACHED_ROWS: usize = 144;
/// Panels of B that stay in the second cache while blocks of rows pass over them.
const CACHED_PANELS: usize = 16;

/// One product of a call: `c[first..][rows, n] = [c +] a b`.
pub(super) struct Job<'a> {
    pub(super) a: Mat<'a>,
    pub(super) b: &'a Packed,
    /// Where the product's first element stands in C, whose rows are `b.n()` long.
    pub(super) first: usize,
}

impl Job<'_> {
    /// The time it takes, in multiplications.
    fn work(&self) -> usize {
        self.a.rows.max(READING_ROWS) * self.b.n() * self.b.k()
    }
}

/// Rows and panels of a job that one thread computes.
struct Task {
    job: usize,
    rows: Range<usize>,
    panels: Range<usize>,
}

/// Runs all jobs, which write different parts of `c`, and whose operands have one precision.
pub(super) fn run(jobs: &[Job], c: &mut [f32], beta: Beta) {
    let Some(first) = jobs.first() else { return };
    run_on(Kernels::of(Isa::current(), first.b.precision()), jobs, c, beta);
}

/// As [`run`], with given kernels.
pub(super) fn run_on(kernels: &Kernels, jobs: &[Job], c: &mut [f32], beta: Beta) {
    for job in jobs {
        assert_eq!(job.a.cols, job.b.k(), "columns of the left operand, rows of the right one");
        assert_eq!(job.b.precision(), kernels.precision, "operands of one call have one precision");
        assert!(job.first + job.a.rows * job.b.n() <= c.len(), "the result leaves its slice");
    }
    let work: usize = jobs.iter().map(Job::work).sum();
    let threads = if work < SERIAL_WORK { 1 } else { parallel::threads() };
    let tasks = cut(jobs, kernels, work, threads);
    let c = DisjointMut::new(c);
    let serial_count = if threads == 1 { usize::MAX } else { 1 };
    parallel::for_each_index(tasks.len(), serial_count, |task| {
        let task = &tasks[task];
        run_task(kernels, &jobs[task.job], task, &c, beta);
    });
}

/// Cuts the jobs into tasks of about equal work, the largest first.
fn cut(jobs: &[Job], kernels: &Kernels, work: usize, threads: usize) -> Vec<Task> {
    let share = if threads == 1 { usize::MAX } else { work.div_ceil(threads * TASKS_PER_THREAD).max(SERIAL_WORK / 4) };
    let mut tasks = Vec::new();
    for (index, job) in jobs.iter().enumerate() {
        let (rows, panels) = (job.a.rows, job.b.panels());
        if rows == 0 || panels == 0 {
            continue;
        }
        let (row_parts, panel_parts) = parts(job, kernels, job.work().div_ceil(share));
        let step = rows.div_ceil(row_parts).next_multiple_of(kernels.block_rows);
        for rows in pieces(0..rows, step) {
            for panels in pieces(0..panels, panels.div_ceil(panel_parts)) {
                tasks.push(Task { job: index, rows: rows.clone(), panels });
            }
        }
    }
    tasks.sort_by_key(|task| std::cmp::Reverse(task.rows.len() * task.panels.len() * jobs[task.job].b.k()));
    tasks
}

/// In how many parts to cut rows and panels to get `wanted` tasks that read as little as can be: each part of the rows
/// reads all of B, each part of the panels packs all of A.
fn parts(job: &Job, kernels: &Kernels, wanted: usize) -> (usize, usize) {
    let row_limit = job.a.rows.div_ceil(kernels.block_rows);
    let panel_limit = job.b.panels();
    let wanted = wanted.clamp(1, row_limit * panel_limit);
    (1..=wanted.min(panel_limit))
        .map(|panel_parts| (wanted.div_ceil(panel_parts).min(row_limit), panel_parts))
        .filter(|(row_parts, panel_parts)| row_parts * panel_parts >= wanted)
        .min_by_key(|(row_parts, panel_parts)| row_parts * job.b.n() + 2 * panel_parts * job.a.rows)
        .unwrap_or((row_limit, panel_limit))
}

fn run_task(kernels: &Kernels, job: &Job, task: &Task, c: &DisjointMut<f32>, beta: Beta) {
    let (a, b, n) = (job.a, job.b, job.b.n());
    let columns = task.panels.start * LANES..n.min(task.panels.end * LANES);
    if b.k() == 0 {
        if beta == Beta::Overwrite {
            for row in task.rows.clone() {
                let start = job.first + row * n;
                // SAFETY: tasks take different rows or columns of C.
                unsafe { c.range(start + columns.start..start + columns.end) }.fill(0.0);
            }
        }
        return;
    }
    let (block_rows, block_k) = (kernels.block_rows, kernels.precision.block_k());
    let slab_rows = CACHED_ROWS.next_multiple_of(block_rows);
    let unpacked = if kernels.takes_unpacked { Lines::rows(a).words(kernels.precision) } else { None };
    let most_rows = if unpacked.is_some() { 0 } else { kernels.padded_rows(slab_rows.min(task.rows.len())) };
    let mut words = Buffer::<u32>::scratch(most_rows * kernels.k_blocks.min(b.k_blocks()) * LANES);
    for rows in pieces(task.rows.clone(), slab_rows) {
        for k_blocks in pieces(0..b.k_blocks(), kernels.k_blocks) {
            let k = k_blocks.start * block_k..b.k().min(k_blocks.end * block_k);
            let accumulate = beta == Beta::Accumulate || k_blocks.start > 0;
            if unpacked.is_none() {
                kernels.pack_rows(&Lines::rows(a.row_range(rows.clone()).col_range(k)), &mut words);
            }
            for panels in pieces(task.panels.clone(), CACHED_PANELS) {
                let columns = panels.start * LANES..n.min(panels.end * LANES);
                let b_start = panels.start * b.panel_words() + k_blocks.start * BLOCK_WORDS;
                for block in pieces(rows.clone(), block_rows) {
                    let (a, unpacked_stride) = match unpacked {
                        Some((a, stride)) => {
                            (a.wrapping_add(block.start * stride + k_blocks.start * LANES), Some(stride))
                        }
                        None => (words[(block.start - rows.start) * k_blocks.len() * LANES..].as_ptr(), None),
                    };
                    let product = BlockProduct {
                        a,
                        unpacked_stride,
                        rows: block.len(),
                        k_blocks: k_blocks.len(),
                        b: b.words()[b_start..].as_ptr(),
                        panel_stride: b.panel_words(),
                        columns: columns.len(),
                        c: c.at(job.first + block.start * n + columns.start),
                        c_stride: n,
                        accumulate,
                    };
                    // SAFETY: rows and columns lie in the job's part of C, which `run` checked, and belong to this
                    // task alone; A was packed above or has these rows and whole k blocks, and B these panels.
                    unsafe { kernels.multiply(&product) };
                }
            }
        }
    }
}
