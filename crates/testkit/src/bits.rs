//! Comparing results to the bit, and computing them on several numbers of threads.

/// A thread pool of `n` threads, for tests that compare bits between thread counts.
pub fn threads(n: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(n).build().expect("a thread pool")
}

/// Panics unless both hold the same bits; says how many differ, and the first that does.
pub fn same_bits(what: &str, found: &[f32], wanted: &[f32]) {
    assert_eq!(found.len(), wanted.len(), "{what}: numbers");
    let different = |i: &usize| found[*i].to_bits() != wanted[*i].to_bits();
    let count = (0..found.len()).filter(different).count();
    if let Some(i) = (0..found.len()).find(different) {
        panic!("{what}: {count} of {} differ, first [{i}]: found {}, wanted {}", found.len(), found[i], wanted[i]);
    }
}

/// Computes named numbers on one, two and three threads, and panics unless all give the same bits; gives them.
pub fn same_bits_on_any_threads(compute: impl Fn() -> Vec<(String, Vec<f32>)> + Sync) -> Vec<(String, Vec<f32>)> {
    let serial = threads(1).install(&compute);
    for n in 2..=3 {
        let parallel = threads(n).install(&compute);
        assert_eq!(parallel.len(), serial.len(), "{n} threads: results");
        for ((name, found), (_, wanted)) in parallel.iter().zip(&serial) {
            same_bits(&format!("{name} on {n} threads"), found, wanted);
        }
    }
    serial
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_bits_pass() {
        same_bits("x", &[1.0, f32::NAN], &[1.0, f32::NAN]);
    }

    #[test]
    #[should_panic(expected = "x: 1 of 2 differ, first [1]: found -0, wanted 0")]
    fn equal_numbers_of_other_bits_do_not() {
        same_bits("x", &[1.0, -0.0], &[1.0, 0.0]);
    }

    #[test]
    #[should_panic(expected = "sum on 2 threads: 1 of 1 differ")]
    fn work_that_depends_on_threads_is_found_out() {
        same_bits_on_any_threads(|| vec![("sum".into(), vec![rayon::current_num_threads() as f32])]);
    }
}
