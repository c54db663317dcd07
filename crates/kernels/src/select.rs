//! Choosing, moving and summing rows: top-k, gathers, weighted scatters, embedding, and small vector arithmetic.
//!
//! Legend: `tokens` tokens, `assignments` (token, expert) pairs, `width` features of a row.

/// The `k` largest numbers of a row with their places, largest first, ties to the lower index.
///
/// NaN ranks below every number, `-inf` included (ties among NaN again to the lower index), so a result is always
/// `k` distinct places.
///
/// # Shapes
/// `row` `[n]` with `n >= k`, `index`, `value` `[k]`.
pub fn top_k(row: &[f32], k: usize, index: &mut [u32], value: &mut [f32]) {
    assert!(k <= row.len(), "top {k} of {} numbers", row.len());
    assert_eq!(index.len(), k);
    assert_eq!(value.len(), k);
    if k == 0 {
        return;
    }
    let mut filled = 0;
    for (candidate, &score) in row.iter().enumerate() {
        if filled == k && !ranks_above(score, value[k - 1]) {
            continue;
        }
        let mut place = if filled < k { filled } else { k - 1 };
        filled = (filled + 1).min(k);
        while place > 0 && ranks_above(score, value[place - 1]) {
            value[place] = value[place - 1];
            index[place] = index[place - 1];
            place -= 1;
        }
        value[place] = score;
        index[place] = candidate as u32;
    }
}

/// Whether `a` comes strictly before `b` in descending order with NaN last.
fn ranks_above(a: f32, b: f32) -> bool {
    a > b || (b.is_nan() && !a.is_nan())
}

/// [`top_k`] of each row.
///
/// # Shapes
/// `scores` `[rows, cols]`, `index`, `value` `[rows, k]`.
pub fn top_k_rows(scores: &[f32], cols: usize, k: usize, index: &mut [u32], value: &mut [f32]) {
    assert_eq!(index.len(), value.len());
    if k == 0 {
        return;
    }
    for ((row, index), value) in scores.chunks_exact(cols).zip(index.chunks_exact_mut(k)).zip(value.chunks_exact_mut(k))
    {
        top_k(row, k, index, value);
    }
}

/// The place of the largest number, the lowest of equals; NaN ranks last. `None` for no numbers.
pub fn argmax(row: &[f32]) -> Option<usize> {
    let mut best = 0;
    for (i, &v) in row.iter().enumerate() {
        if ranks_above(v, row[best]) {
            best = i;
        }
    }
    (!row.is_empty()).then_some(best)
}

/// `out[i] = source[rows[i]]`. An embedding's forward.
///
/// # Shapes
/// `source` `[n, width]`, `rows` `[m]`, `out` `[m, width]`.
pub fn gather_rows(source: &[f32], width: usize, rows: &[u32], out: &mut [f32]) {
    assert_eq!(out.len(), rows.len() * width);
    for (out, &row) in out.chunks_exact_mut(width).zip(rows) {
        out.copy_from_slice(&source[row as usize * width..][..width]);
    }
}

/// `out[i] = weights[i] * source[rows[i]]`: the gradient of [`scatter_weighted`] to its source.
///
/// # Shapes
/// `source` `[n, width]`, `rows`, `weights` `[m]`, `out` `[m, width]`.
pub fn gather_rows_weighted(source: &[f32], width: usize, rows: &[u32], weights: &[f32], out: &mut [f32]) {
    assert_eq!(out.len(), rows.len() * width);
    assert_eq!(weights.len(), rows.len());
    for ((out, &row), &weight) in out.chunks_exact_mut(width).zip(rows).zip(weights) {
        let source = &source[row as usize * width..][..width];
        out.iter_mut().zip(source).for_each(|(o, &s)| *o = weight * s);
    }
}

/// `out[i] = a[rows[i]] · b[i]`: the gradient of [`scatter_weighted`] to its weights.
///
/// # Shapes
/// `a` `[n, width]`, `rows` `[m]`, `b` `[m, width]`, `out` `[m]`.
pub fn gathered_dots(a: &[f32], width: usize, rows: &[u32], b: &[f32], out: &mut [f32]) {
    assert_eq!(b.len(), rows.len() * width);
    assert_eq!(out.len(), rows.len());
    for ((out, &row), b) in out.iter_mut().zip(rows).zip(b.chunks_exact(width)) {
        let a = &a[row as usize * width..][..width];
        *out = a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>() as f32;
    }
}

/// The combine: `out[t] = Σ weights[r] * source[r]` over `r` in `rows[offsets[t]..offsets[t + 1]]`, in that order
/// (slot order); a token without rows becomes zero.
///
/// # Shapes
/// `source` `[assignments, width]`, `weights` `[assignments]`, `offsets` `[tokens + 1]`, `rows` `[offsets[tokens]]`,
/// `out` `[tokens, width]`.
pub fn scatter_weighted(
    source: &[f32],
    width: usize,
    offsets: &[usize],
    rows: &[u32],
    weights: &[f32],
    out: &mut [f32],
) {
    assert_eq!(out.len(), (offsets.len() - 1) * width);
    for (out, bounds) in out.chunks_exact_mut(width).zip(offsets.windows(2)) {
        out.fill(0.0);
        for &row in &rows[bounds[0]..bounds[1]] {
            let weight = weights[row as usize];
            let source = &source[row as usize * width..][..width];
            out.iter_mut().zip(source).for_each(|(o, &s)| *o = weight.mul_add(s, *o));
        }
    }
}

/// `out[t] += Σ source[r]` over `r` in `rows[offsets[t]..offsets[t + 1]]`, in that order: the gradient of
/// [`gather_rows`] when rows are known by token.
///
/// # Shapes
/// As [`scatter_weighted`].
pub fn scatter_add(source: &[f32], width: usize, offsets: &[usize], rows: &[u32], out: &mut [f32]) {
    assert_eq!(out.len(), (offsets.len() - 1) * width);
    for (out, bounds) in out.chunks_exact_mut(width).zip(offsets.windows(2)) {
        for &row in &rows[bounds[0]..bounds[1]] {
            add_assign_plain(out, &source[row as usize * width..][..width]);
        }
    }
}

/// `dtable[ids[i]] += dy[i]`, the rows of one id in the order of `i`: an embedding's backward.
///
/// # Shapes
/// `dy` `[tokens, width]`, `ids` `[tokens]`, `dtable` `[vocab, width]`.
pub fn embedding_backward(dy: &[f32], width: usize, ids: &[u32], dtable: &mut [f32]) {
    assert_eq!(dy.len(), ids.len() * width);
    for (dy, &id) in dy.chunks_exact(width).zip(ids) {
        add_assign_plain(&mut dtable[id as usize * width..][..width], dy);
    }
}

/// `a += b`.
pub fn add_assign(a: &mut [f32], b: &[f32]) {
    add_assign_plain(a, b);
}

/// `out = a + b`.
pub fn add(a: &[f32], b: &[f32], out: &mut [f32]) {
    assert_eq!(a.len(), b.len());
    assert_eq!(a.len(), out.len());
    out.iter_mut().zip(a).zip(b).for_each(|((o, &a), &b)| *o = a + b);
}

/// `x *= factor`.
pub fn scale(x: &mut [f32], factor: f32) {
    x.iter_mut().for_each(|v| *v *= factor);
}

/// `a += factor * b`.
pub fn scaled_add(a: &mut [f32], factor: f32, b: &[f32]) {
    assert_eq!(a.len(), b.len());
    a.iter_mut().zip(b).for_each(|(a, &b)| *a = factor.mul_add(b, *a));
}

/// `Σ x²` in f64, in an order that depends on the length alone.
pub fn sum_squares(x: &[f32]) -> f64 {
    x.iter().map(|&v| f64::from(v) * f64::from(v)).sum()
}

fn add_assign_plain(a: &mut [f32], b: &[f32]) {
    assert_eq!(a.len(), b.len());
    a.iter_mut().zip(b).for_each(|(a, &b)| *a += b);
}
