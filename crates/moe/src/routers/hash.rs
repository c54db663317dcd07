//! Hash layers (Roller et al. 2021): a fixed table gives each id of the vocabulary its expert. No weight but 1, no
//! gradient to any router, no loss. With k tables (MultiHash) each picks one of its own E / k experts: k networks of
//! width w / k side by side, summed, are the paper's concatenation of k segments of the two matrices.

use super::selection::plan_of;
use super::{Context, Decision, RoutingMethod, Setup};
use crate::MoeError;
use moebius_tensor::{Graph, Param, Rng, Tensor, Var};

/// Independent draws: `[ids]` experts.
pub fn random_table(ids: usize, experts: usize, seed: u64) -> Vec<u32> {
    let mut rng = Rng::new(seed);
    (0..ids).map(|_| rng.below(experts) as u32).collect()
}

/// Ids in falling order of frequency, each to the expert that has the least so far.
pub fn balanced_table(frequencies: &[u64], experts: usize) -> Vec<u32> {
    let mut order: Vec<usize> = (0..frequencies.len()).collect();
    order.sort_by_key(|&id| (std::cmp::Reverse(frequencies[id]), id));
    let (mut loads, mut table) = (vec![0u64; experts], vec![0; frequencies.len()]);
    for id in order {
        let lightest = (0..experts).min_by_key(|&e| (loads[e], e)).expect("at least one expert");
        // Ids that never occurred count a little, so that they spread too.
        loads[lightest] += frequencies[id].max(1);
        table[id] = lightest as u32;
    }
    table
}

/// The cluster of each embedding `[ids, width]` after `rounds` of k-means (Lloyd 1957) from centres drawn among the ids.
pub fn clustered_table(embeddings: &Tensor, experts: usize, rounds: usize, seed: u64) -> Vec<u32> {
    let [ids, width] = *embeddings.shape() else { panic!("embeddings are [ids, width]") };
    let point = |id: usize| &embeddings.data()[id * width..(id + 1) * width];
    let mut rng = Rng::new(seed);
    let mut shuffled: Vec<usize> = (0..ids).collect();
    (0..ids.min(experts)).for_each(|i| shuffled.swap(i, i + rng.below(ids - i)));
    let mut centres: Vec<Vec<f32>> = shuffled.iter().take(experts).map(|&id| point(id).to_vec()).collect();
    let mut table = vec![0u32; ids];
    for _ in 0..rounds {
        for (id, nearest) in table.iter_mut().enumerate() {
            let distance = |c: &[f32]| c.iter().zip(point(id)).map(|(c, x)| (c - x).powi(2)).sum::<f32>();
            let best = (0..centres.len()).min_by(|&a, &b| distance(&centres[a]).total_cmp(&distance(&centres[b])));
            *nearest = best.unwrap_or(0) as u32;
        }
        for (c, centre) in centres.iter_mut().enumerate() {
            let mine: Vec<usize> = (0..ids).filter(|&id| table[id] as usize == c).collect();
            if !mine.is_empty() {
                let mean = |i: usize| mine.iter().map(|&id| point(id)[i]).sum::<f32>() / mine.len() as f32;
                *centre = (0..width).map(mean).collect();
            }
        }
    }
    table
}

/// The members of each cluster dealt to the experts in turn, so that similar ids go to different experts.
pub fn dispersed_table(clusters: &[u32], experts: usize) -> Vec<u32> {
    let mut order: Vec<usize> = (0..clusters.len()).collect();
    order.sort_by_key(|&id| (clusters[id], id));
    let mut table = vec![0; clusters.len()];
    order.into_iter().enumerate().for_each(|(i, id)| table[id] = (i % experts) as u32);
    table
}

/// Where the data decide: the words of `table` whose table is a weight, which no gradient reaches.
const FROM_DATA: [&str; 3] = ["counted", "clustered", "dispersed"];

/// Experts that such a table may name: whole numbers that bf16 keeps.
const MOST_STORED: usize = 256;

/// Ids times experts that tables may be made for: far above published models, far below what takes minutes.
const MOST_PAIRS: usize = 1 << 29;

/// Routes by the ids of [`Context::token_ids`].
#[derive(Debug)]
struct Hash {
    /// One a choice, each into its own run of experts; none where the table is a weight.
    tables: Vec<Vec<u32>>,
    /// `[ids]`: each id's expert, written there by whoever has the data.
    stored: Option<Param>,
    experts: usize,
}

pub(super) fn build(setup: &mut Setup<'_>) -> Result<Box<dyn RoutingMethod>, MoeError> {
    let hashes = setup.top_k_up_to(setup.experts)?;
    if !setup.experts.is_multiple_of(hashes) {
        let reason = format!("wanted a number of hashes that divides the {} experts, found {hashes}", setup.experts);
        return Err(setup.refuse(reason));
    }
    if setup.vocabulary == 0 {
        return Err(setup.refuse("it routes by token id and needs a vocabulary"));
    }
    let (each, ids) = (setup.experts / hashes, setup.vocabulary);
    if ids.saturating_mul(setup.experts) > MOST_PAIRS {
        let reason = format!("wanted at most {MOST_PAIRS} pairs of an id and an expert, found {ids} ids");
        return Err(setup.refuse(reason));
    }
    let seed = setup.count("seed", 42, 0..=1 << 52)? as u64;
    let table = setup.word("table", &[&["random", "balanced"][..], &FROM_DATA].concat())?;
    if table >= 2 {
        if hashes != 1 || setup.experts > MOST_STORED {
            let reason = format!(
                "wanted 1 choice a token of at most {MOST_STORED} experts with a table from data, found {hashes} of {}",
                setup.experts
            );
            return Err(setup.refuse(reason));
        }
        let stored = Some((setup.param)("table", &[ids])?);
        return Ok(Box::new(Hash { tables: Vec::new(), stored, experts: setup.experts }));
    }
    let tables = (0..hashes as u64).map(|i| match table {
        0 => random_table(ids, each, seed + i),
        // By Zipf's law, ids counted as if they stood in falling order of frequency, as merges of a BPE nearly do.
        _ => balanced_table(&(0..ids).map(|id| (1 << 32) / (id as u64 + 1 + i)).collect::<Vec<_>>(), each),
    });
    Ok(Box::new(Hash { tables: tables.collect(), stored: None, experts: setup.experts }))
}

impl RoutingMethod for Hash {
    fn decide<'p>(&'p self, _: &Graph<'p>, x: &Var, context: &Context<'_>) -> Result<Decision, MoeError> {
        let [tokens, _] = x.dims()?;
        let refuse = |reason| Err(MoeError::Refused { router: "hash", reason });
        if context.token_ids.len() != tokens {
            return refuse(format!("wanted the ids of {tokens} tokens, found {}", context.token_ids.len()));
        }
        let each = self.experts / self.tables.len().max(1);
        let mut pairs = Vec::with_capacity(tokens * self.tables.len().max(1));
        for (token, &id) in context.token_ids.iter().enumerate() {
            let Some(stored) = &self.stored else { break };
            let Some(&expert) = stored.value().data().get(id as usize) else {
                return refuse(format!("token {token}: wanted an id below {}, found {id}", stored.shape()[0]));
            };
            if expert.fract() != 0.0 || !(0.0..self.experts as f32).contains(&expert) {
                return refuse(format!(
                    "the table's id {id}: wanted a whole number below {}, found {expert}; nobody has made the table",
                    self.experts
                ));
            }
            pairs.push((token, expert as usize));
        }
        for (token, &id) in context.token_ids.iter().enumerate() {
            for (i, table) in self.tables.iter().enumerate() {
                let Some(&expert) = table.get(id as usize) else {
                    return refuse(format!("token {token}: wanted an id below {}, found {id}", table.len()));
                };
                pairs.push((token, i * each + expert as usize));
            }
        }
        let plan = plan_of(tokens, self.experts, pairs)?;
        let weights = Var::constant(Tensor::new(&[plan.n_assignments()], vec![1.0; plan.n_assignments()]));
        let nothing = Var::constant(Tensor::zeros(&[tokens, self.experts]));
        Ok(Decision::new(plan, weights, nothing.clone(), nothing))
    }

    fn params(&self) -> Vec<&Param> {
        self.stored.iter().collect()
    }

    fn params_mut(&mut self) -> Vec<&mut Param> {
        self.stored.iter_mut().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn built(top_k: usize, table: &str, value: Vec<f32>) -> Result<Box<dyn RoutingMethod>, MoeError> {
        let mut make = |name: &str, shape: &[usize]| Ok(Param::new(0, name, Tensor::new(shape, value.clone())));
        let mut setup = Setup::new(2, 4, top_k, &mut make);
        setup.vocabulary = value.len();
        setup.options.insert("table".into(), table.into());
        super::super::build("hash", &mut setup)
    }

    #[test]
    fn a_stored_table_is_looked_up() {
        let decide = |method: &dyn RoutingMethod, ids: &[u32]| {
            let x = Var::constant(Tensor::zeros(&[ids.len(), 2]));
            let context = Context { token_ids: ids, ..Context::default() };
            method.decide(&Graph::inference(moebius_kernels::gemm::Precision::F32), &x, &context)
        };
        for table in FROM_DATA {
            let method = built(1, table, vec![3.0, 0.0, 2.0]).unwrap();
            assert_eq!(decide(&*method, &[2, 0, 0, 1]).unwrap().plan.counts(), [1, 0, 1, 2]);
            assert!(decide(&*method, &[3]).unwrap_err().to_string().contains("wanted an id below 3, found 3"));
            // What initial weights are: nobody has made the table.
            let unmade = built(1, table, vec![0.02, 4.0, -1.0]).unwrap();
            for id in 0..3 {
                let message = decide(&*unmade, &[id]).unwrap_err().to_string();
                assert!(message.contains("wanted a whole number below 4"), "{message}");
            }
        }
        let message = built(2, "counted", vec![0.0]).unwrap_err().to_string();
        assert!(message.contains("wanted 1 choice a token of at most 256 experts"), "{message}");
    }

    #[test]
    fn tables_on_paper() {
        assert_eq!(balanced_table(&[5, 9, 4, 1, 0, 0], 2), [1, 0, 1, 0, 1, 0]);
        // Two clusters of two: each cluster's members part.
        let points = Tensor::new(&[4, 1], vec![0.0, 10.0, 0.5, 10.5]);
        let clusters = clustered_table(&points, 2, 10, 1);
        assert!(clusters[0] == clusters[2] && clusters[1] == clusters[3] && clusters[0] != clusters[1]);
        let dispersed = dispersed_table(&clusters, 2);
        assert!(dispersed[0] != dispersed[2] && dispersed[1] != dispersed[3]);
        let random = random_table(3000, 3, 42);
        assert!((0..3).all(|e| (900..1100).contains(&random.iter().filter(|&&found| found == e).count())));
    }
}
