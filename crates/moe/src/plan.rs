//! [`Plan`]: which expert computes on which token, the one thing that routers, dispatch, grouped products, statistics and
//! traces share.

use crate::MoeError;

/// Assignments sorted by expert, in CSR form. Within an expert, rows stand in token order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    n_tokens: usize,
    n_experts: usize,
    offsets: Vec<usize>,
    token: Vec<u32>,
    slot: Vec<u32>,
    token_offsets: Vec<usize>,
    token_rows: Vec<u32>,
}

impl Plan {
    /// The plan in which token `t` goes to the experts `index[t * k..][..k]`, in slot order.
    ///
    /// # Shapes
    /// index `[tokens, k]`.
    ///
    /// # Errors
    /// If an expert does not exist, a token chooses one twice, or `index` is no multiple of `k`.
    pub fn from_choices(n_experts: usize, k: usize, index: &[u32]) -> Result<Self, MoeError> {
        if k == 0 || !index.len().is_multiple_of(k) {
            return Err(MoeError::Plan(format!("wanted {k} choices for each token, found {} in all", index.len())));
        }
        let mut offsets = vec![0; n_experts + 1];
        for (t, choices) in index.chunks_exact(k).enumerate() {
            for (slot, &expert) in choices.iter().enumerate() {
                if expert as usize >= n_experts {
                    return Err(MoeError::Plan(format!("token {t}: expert {expert} of {n_experts}")));
                }
                if choices[..slot].contains(&expert) {
                    return Err(MoeError::Plan(format!("token {t} chooses expert {expert} twice")));
                }
                offsets[expert as usize + 1] += 1;
            }
        }
        for expert in 0..n_experts {
            offsets[expert + 1] += offsets[expert];
        }
        let mut next = offsets.clone();
        let (mut token, mut slot) = (vec![0; index.len()], vec![0; index.len()]);
        let mut token_rows = vec![0; index.len()];
        for (choice, &expert) in index.iter().enumerate() {
            let row = next[expert as usize];
            next[expert as usize] += 1;
            token[row] = (choice / k) as u32;
            slot[row] = (choice % k) as u32;
            token_rows[choice] = row as u32;
        }
        let n_tokens = index.len() / k;
        let token_offsets = (0..=n_tokens).map(|t| t * k).collect();
        Ok(Self { n_tokens, n_experts, offsets, token, slot, token_offsets, token_rows })
    }

    /// A plan from its rows, for routers that give tokens different numbers of experts.
    ///
    /// # Shapes
    /// offsets `[experts + 1]`, token and slot `[assignments]`.
    ///
    /// # Errors
    /// The first thing in which the parts contradict each other; see [`Plan::validate`].
    pub fn from_rows(n_tokens: usize, offsets: Vec<usize>, token: Vec<u32>, slot: Vec<u32>) -> Result<Self, MoeError> {
        let mut token_offsets = vec![0; n_tokens + 1];
        for (row, &t) in token.iter().enumerate() {
            let count = token_offsets.get_mut(t as usize + 1).ok_or_else(|| no_such_token(row, t, n_tokens))?;
            *count += 1;
        }
        for t in 0..n_tokens {
            token_offsets[t + 1] += token_offsets[t];
        }
        let mut token_rows = vec![0; token.len()];
        for (row, (&t, &slot)) in token.iter().zip(&slot).enumerate() {
            // A slot beyond its token's rows is left for `validate` to name.
            let rows = &mut token_rows[token_offsets[t as usize]..token_offsets[t as usize + 1]];
            if let Some(place) = rows.get_mut(slot as usize) {
                *place = row as u32;
            }
        }
        let n_experts = offsets.len().saturating_sub(1);
        let plan = Self { n_tokens, n_experts, offsets, token, slot, token_offsets, token_rows };
        plan.validate()?;
        Ok(plan)
    }

    /// An error if its parts contradict each other: each row has one expert, an existing token and a slot; a token's
    /// slots count from zero; an expert's tokens rise; rows by expert and rows by token are the same rows.
    ///
    /// # Errors
    /// The first contradiction.
    pub fn validate(&self) -> Result<(), MoeError> {
        let rows = self.token.len();
        check_offsets("experts", &self.offsets, self.n_experts, rows)?;
        check_offsets("tokens", &self.token_offsets, self.n_tokens, self.token_rows.len())?;
        for (what, found) in [("slots", self.slot.len()), ("rows by token", self.token_rows.len())] {
            if found != rows {
                return Err(MoeError::Plan(format!("{found} {what} for {rows} rows")));
            }
        }
        for (expert, bounds) in self.offsets.windows(2).enumerate() {
            if let Some(i) = self.token[bounds[0]..bounds[1]].windows(2).position(|pair| pair[0] >= pair[1]) {
                let [a, b] = [self.token[bounds[0] + i], self.token[bounds[0] + i + 1]];
                return Err(MoeError::Plan(format!("expert {expert}: token {b} stands after token {a}")));
            }
        }
        for (row, (&token, &slot)) in self.token.iter().zip(&self.slot).enumerate() {
            let Some(bounds) = self.token_offsets.get(token as usize..token as usize + 2) else {
                return Err(no_such_token(row, token, self.n_tokens));
            };
            // As many rows as slots, and each row found at its slot: so no slot is missing or taken twice.
            match self.token_rows[bounds[0]..bounds[1]].get(slot as usize) {
                None => {
                    let count = bounds[1] - bounds[0];
                    return Err(MoeError::Plan(format!("row {row}: slot {slot} of the {count} of token {token}")));
                }
                Some(&found) if found as usize != row => {
                    let message = format!("token {token}, slot {slot}: row {row} by expert, row {found} by token");
                    return Err(MoeError::Plan(message));
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// Tokens routed.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Experts there are, with or without tokens.
    pub fn n_experts(&self) -> usize {
        self.n_experts
    }

    /// Pairs of a token and an expert.
    pub fn n_assignments(&self) -> usize {
        self.token.len()
    }

    /// `[experts + 1]`: expert e computes on rows `offsets[e]..offsets[e + 1]`.
    pub fn offsets(&self) -> &[usize] {
        &self.offsets
    }

    /// The expert that computes on a row.
    pub fn expert_of_row(&self, row: usize) -> usize {
        self.offsets.partition_point(|&first| first <= row) - 1
    }

    /// `[assignments]`: the token of each row.
    pub fn token(&self) -> &[u32] {
        &self.token
    }

    /// `[assignments]`: the row's place among its token's choices.
    pub fn slot(&self) -> &[u32] {
        &self.slot
    }

    /// The rows of each token in slot order: `rows[offsets[t]..offsets[t + 1]]`.
    pub fn rows_of_token(&self) -> (&[usize], &[u32]) {
        (&self.token_offsets, &self.token_rows)
    }

    /// Tokens of each expert.
    pub fn counts(&self) -> Vec<usize> {
        self.offsets.windows(2).map(|pair| pair[1] - pair[0]).collect()
    }
}

fn no_such_token(row: usize, token: u32, n_tokens: usize) -> MoeError {
    MoeError::Plan(format!("row {row}: token {token} of {n_tokens}"))
}

/// An error unless `offsets` cut `rows` rows into `parts` parts.
fn check_offsets(what: &str, offsets: &[usize], parts: usize, rows: usize) -> Result<(), MoeError> {
    if offsets.len() != parts + 1 {
        return Err(MoeError::Plan(format!("{} offsets for {parts} {what}", offsets.len())));
    }
    if let Some(i) = (0..parts).find(|&i| offsets[i] > offsets[i + 1]) {
        return Err(MoeError::Plan(format!("offsets of {what}: {} after {}", offsets[i + 1], offsets[i])));
    }
    if (offsets[0], offsets[parts]) != (0, rows) {
        let (first, last) = (offsets[0], offsets[parts]);
        return Err(MoeError::Plan(format!("offsets of {what} from {first} to {last} for {rows} rows")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn three_tokens_over_four_experts() {
        // Token 0 to experts 2 and 0, token 1 to 0 and 3, token 2 to 3 and 2; expert 1 idles.
        let plan = Plan::from_choices(4, 2, &[2, 0, 0, 3, 3, 2]).unwrap();
        assert_eq!(plan.offsets(), [0, 2, 2, 4, 6]);
        assert_eq!(plan.token(), [0, 1, 0, 2, 1, 2]);
        assert_eq!(plan.slot(), [1, 0, 0, 1, 1, 0]);
        assert_eq!(plan.counts(), [2, 0, 2, 2]);
        assert_eq!([0, 1, 2, 5].map(|row| plan.expert_of_row(row)), [0, 0, 2, 3]);
        assert_eq!(plan.rows_of_token(), (&[0, 2, 4, 6][..], &[2, 0, 1, 4, 5, 3][..]));
    }

    #[test]
    fn bad_choices_are_refused() {
        let message = |k, index: &[u32]| Plan::from_choices(3, k, index).unwrap_err().to_string();
        assert_eq!(message(2, &[0, 3]), "routing plan: token 0: expert 3 of 3");
        assert_eq!(message(2, &[0, 1, 2, 2]), "routing plan: token 1 chooses expert 2 twice");
        assert_eq!(message(2, &[0]), "routing plan: wanted 2 choices for each token, found 1 in all");
        assert!(Plan::from_choices(3, 0, &[]).is_err());
    }

    #[test]
    fn no_tokens_make_an_empty_plan() {
        let plan = Plan::from_choices(3, 2, &[]).unwrap();
        assert_eq!((plan.n_tokens(), plan.counts()), (0, vec![0, 0, 0]));
    }

    #[test]
    fn tokens_may_have_different_numbers_of_experts() {
        // Expert 0 takes tokens 1 and 2, expert 1 token 1; token 0 goes nowhere.
        let plan = Plan::from_rows(3, vec![0, 2, 3], vec![1, 2, 1], vec![1, 0, 0]).unwrap();
        assert_eq!((plan.n_tokens(), plan.n_experts(), plan.n_assignments()), (3, 2, 3));
        assert_eq!(plan.rows_of_token(), (&[0, 0, 2, 3][..], &[2, 0, 1][..]));
    }

    #[test]
    fn contradictory_rows_are_refused() {
        let message = |offsets: &[usize], token: &[u32], slot: &[u32]| {
            Plan::from_rows(2, offsets.to_vec(), token.to_vec(), slot.to_vec()).unwrap_err().to_string()
        };
        assert_eq!(message(&[0, 1], &[2], &[0]), "routing plan: row 0: token 2 of 2");
        assert_eq!(message(&[0, 1], &[u32::MAX], &[0]), "routing plan: row 0: token 4294967295 of 2");
        assert_eq!(message(&[0, 2], &[1, 0], &[0, 0]), "routing plan: expert 0: token 0 stands after token 1");
        assert_eq!(message(&[0, 2], &[1, 1], &[0, 1]), "routing plan: expert 0: token 1 stands after token 1");
        assert_eq!(message(&[0, 1], &[1], &[1]), "routing plan: row 0: slot 1 of the 1 of token 1");
        assert_eq!(
            message(&[0, 1, 2], &[1, 1], &[0, 0]),
            "routing plan: token 1, slot 0: row 0 by expert, row 1 by token"
        );
        assert_eq!(message(&[0, 1], &[1], &[]), "routing plan: 0 slots for 1 rows");
        assert_eq!(message(&[0, 2], &[1], &[0]), "routing plan: offsets of experts from 0 to 2 for 1 rows");
        assert_eq!(message(&[1, 1], &[1], &[0]), "routing plan: offsets of experts from 1 to 1 for 1 rows");
        assert_eq!(message(&[0, 2, 1], &[1], &[0]), "routing plan: offsets of experts: 1 after 2");
        assert_eq!(message(&[], &[], &[]), "routing plan: 0 offsets for 0 experts");
    }

    #[test]
    fn every_field_that_is_tampered_with_is_found_out() {
        type Tamper = fn(&mut Plan);
        let plan = Plan::from_choices(4, 2, &[2, 0, 0, 3, 3, 2]).unwrap();
        assert_eq!(plan.validate(), Ok(()));
        let tampers: [(&str, Tamper); 16] = [
            ("n_tokens", |plan| plan.n_tokens += 1),
            ("n_tokens", |plan| plan.n_tokens -= 1),
            ("n_experts", |plan| plan.n_experts += 1),
            ("n_experts", |plan| plan.n_experts = 0),
            ("offsets, shorter", |plan| plan.offsets.truncate(3)),
            ("offsets, falling", |plan| plan.offsets[1] = 5),
            ("offsets, first", |plan| plan.offsets[0] = 1),
            ("offsets, last", |plan| plan.offsets[4] = 5),
            ("token, one less", |plan| plan.token.truncate(5)),
            ("token, order", |plan| plan.token.swap(0, 1)),
            ("slot, one more", |plan| plan.slot.push(0)),
            ("slot", |plan| plan.slot[0] = 0),
            ("token_offsets, shorter", |plan| plan.token_offsets.truncate(2)),
            ("token_offsets", |plan| plan.token_offsets[1] = 1),
            ("token_rows, one less", |plan| plan.token_rows.truncate(5)),
            ("token_rows, order", |plan| plan.token_rows.swap(0, 1)),
        ];
        for (what, tamper) in tampers {
            let mut plan = plan.clone();
            tamper(&mut plan);
            assert!(plan.validate().is_err(), "{what}");
        }
    }

    /// Choices of `k` distinct experts for each token.
    fn choices(n_experts: usize, k: usize, tokens: usize, seed: u64) -> Vec<u32> {
        let mut rng = moebius_tensor::Rng::new(seed);
        let mut index = Vec::new();
        for _ in 0..tokens {
            let mut experts: Vec<u32> = (0..n_experts as u32).collect();
            for slot in 0..k {
                let other = slot + rng.below(n_experts - slot);
                experts.swap(slot, other);
            }
            index.extend(&experts[..k]);
        }
        index
    }

    proptest! {
        #[test]
        fn every_choice_has_one_row(n_experts in 1usize..9, tokens in 0usize..40, seed in 0u64..1000) {
            let k = 1 + seed as usize % n_experts;
            let index = choices(n_experts, k, tokens, seed);
            let plan = Plan::from_choices(n_experts, k, &index).unwrap();
            prop_assert_eq!(plan.counts().iter().sum::<usize>(), tokens * k);
            for expert in 0..n_experts {
                let rows = plan.offsets()[expert]..plan.offsets()[expert + 1];
                prop_assert!(plan.token()[rows.clone()].is_sorted());
                for row in rows {
                    let (token, slot) = (plan.token()[row] as usize, plan.slot()[row] as usize);
                    prop_assert_eq!(index[token * k + slot], expert as u32);
                    prop_assert_eq!(plan.rows_of_token().1[token * k + slot], row as u32);
                }
            }
            prop_assert_eq!(plan.validate(), Ok(()));
            let (offsets, token, slot) = (plan.offsets.clone(), plan.token.clone(), plan.slot.clone());
            prop_assert_eq!(Plan::from_rows(tokens, offsets, token, slot).unwrap(), plan);
        }

        /// Another number anywhere in the rows contradicts the rest.
        #[test]
        fn a_single_changed_number_is_found_out(
            tokens in 1usize..20, seed in 0u64..1000, field in 0usize..3, at in 0usize..1000, number in 0u32..50,
        ) {
            let k = 1 + seed as usize % 5;
            let mut plan = Plan::from_choices(5, k, &choices(5, k, tokens, seed)).unwrap();
            let numbers = [&mut plan.token, &mut plan.slot, &mut plan.token_rows].into_iter().nth(field).unwrap();
            let at = at % numbers.len();
            prop_assume!(numbers[at] != number);
            numbers[at] = number;
            prop_assert!(plan.validate().is_err());
        }

        /// Rows that identity experts would answer with, summed with weights that sum to one, are the tokens again. The
        /// weights are powers of two, so that not even rounding comes between.
        #[test]
        fn combining_what_was_dispatched_gives_it_back(tokens in 0usize..30, seed in 0u64..1000, width in 1usize..40) {
            use moebius_kernels::select::{gather_rows, scatter_weighted};
            let k = [1, 2, 4][seed as usize % 3];
            let plan = Plan::from_choices(6, k, &choices(6, k, tokens, seed)).unwrap();
            let mut x = vec![0.0; tokens * width];
            moebius_tensor::Rng::new(seed).fill_normal(&mut x, 1.0);
            let mut rows = vec![f32::NAN; plan.n_assignments() * width];
            gather_rows(&x, width, plan.token(), &mut rows);
            let weights = vec![1.0 / k as f32; plan.n_assignments()];
            let (offsets, token_rows) = plan.rows_of_token();
            let mut combined = vec![f32::NAN; x.len()];
            scatter_weighted(&rows, width, offsets, token_rows, &weights, &mut combined);
            prop_assert_eq!(combined, x);
        }
    }
}
