//! Where experts stand when they are spread over devices, and which have copies: load balancing by replication as
//! DeepSeek-V3 does it (DeepSeek-AI 2024, section 3.4; the algorithm of its EPLB).
//!
//! Busy experts get copies, then copies are packed onto devices so that each has about the same load. If the groups of
//! experts (of which a token uses few) share evenly over nodes, groups are packed onto nodes first, so that the copies of
//! a group stay on one node.

use crate::MoeError;

/// What to spread, and over what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spread {
    /// Experts with their copies, all devices together; a multiple of `devices`.
    pub replicas: usize,
    /// Groups of experts; divides the experts.
    pub groups: usize,
    /// Nodes; divides `devices`.
    pub nodes: usize,
    /// Devices of all nodes together.
    pub devices: usize,
}

/// The expert of each replica, device by device.
///
/// # Shapes
/// loads `[experts]`, result `[replicas]`: device d has `result[d * replicas / devices..][..replicas / devices]`.
///
/// # Errors
/// Numbers that do not divide each other as [`Spread`] says, or fewer replicas than experts.
pub fn place_replicas(loads: &[f64], spread: &Spread) -> Result<Vec<usize>, MoeError> {
    let spread = check(loads.len(), spread)?;
    let Spread { replicas, groups, nodes, devices } = spread;
    let (group_size, per_node) = (loads.len() / groups, loads.len() / nodes);
    // Experts in the order in which nodes hold their groups.
    let group_loads: Vec<f64> = loads.chunks_exact(group_size).map(|group| group.iter().sum()).collect();
    let order: Vec<usize> = pack(&group_loads, nodes)
        .into_iter()
        .flatten()
        .flat_map(|group| group * group_size..(group + 1) * group_size)
        .collect();
    let mut placed = Vec::with_capacity(replicas);
    for mine in order.chunks_exact(per_node) {
        let mine_loads: Vec<f64> = mine.iter().map(|&expert| loads[expert]).collect();
        let (expert, copies) = replicate(&mine_loads, replicas / nodes);
        let shares: Vec<f64> = expert.iter().map(|&e| mine_loads[e] / copies[e] as f64).collect();
        placed.extend(pack(&shares, devices / nodes).into_iter().flatten().map(|replica| mine[expert[replica]]));
    }
    Ok(placed)
}

/// The spread with one group and one node where groups do not share over nodes.
fn check(experts: usize, spread: &Spread) -> Result<Spread, MoeError> {
    let &Spread { replicas, groups, nodes, devices } = spread;
    let refuse = |what: &str, wanted: String, found: usize| {
        Err(MoeError::Plan(format!("placement: {what}: wanted {wanted}, found {found}")))
    };
    if devices == 0 || nodes == 0 || !devices.is_multiple_of(nodes) {
        return refuse("nodes", format!("a divisor of {devices} devices"), nodes);
    }
    if !replicas.is_multiple_of(devices) || replicas < experts {
        return refuse("replicas", format!("a multiple of {devices} devices, at least {experts} experts"), replicas);
    }
    if groups == 0 || experts == 0 || !experts.is_multiple_of(groups) {
        return refuse("groups", format!("a divisor of {experts} experts"), groups);
    }
    let shared = groups.is_multiple_of(nodes);
    Ok(if shared { *spread } else { Spread { groups: 1, nodes: 1, ..*spread } })
}

/// Items in as many packs, the same number in each: heaviest first, each to the lightest pack that has room.
fn pack(weights: &[f64], packs: usize) -> Vec<Vec<usize>> {
    let room = weights.len() / packs;
    let mut order: Vec<usize> = (0..weights.len()).collect();
    if room > 1 {
        order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]));
    }
    let (mut packed, mut sums) = (vec![Vec::with_capacity(room); packs], vec![0.0; packs]);
    for item in order {
        let open = (0..packs).filter(|&pack| packed[pack].len() < room);
        let lightest = match room {
            1 => item,
            _ => open.min_by(|&a, &b| f64::total_cmp(&sums[a], &sums[b])).expect("as much room as items"),
        };
        packed[lightest].push(item);
        sums[lightest] += weights[item];
    }
    packed
}

/// The expert of each replica, and the copies of each expert: every expert once, then again and again the one whose load
/// a copy is highest.
fn replicate(loads: &[f64], replicas: usize) -> (Vec<usize>, Vec<usize>) {
    let (mut expert, mut copies): (Vec<usize>, _) = ((0..loads.len()).collect(), vec![1; loads.len()]);
    while expert.len() < replicas {
        let share = |e: usize| loads[e] / copies[e] as f64;
        let busiest = (0..loads.len()).fold(0, |best, e| if share(e) > share(best) { e } else { best });
        copies[busiest] += 1;
        expert.push(busiest);
    }
    (expert, copies)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LOADS: [f64; 12] = [90.0, 132.0, 40.0, 61.0, 104.0, 165.0, 39.0, 4.0, 73.0, 56.0, 183.0, 86.0];

    /// The example that DeepSeek publishes with EPLB.
    #[test]
    fn the_published_vector() {
        let spread = Spread { replicas: 16, groups: 4, nodes: 2, devices: 8 };
        let found = place_replicas(&LOADS, &spread).unwrap();
        assert_eq!(found, [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]);
    }

    #[test]
    fn numbers_that_do_not_fit_are_refused() {
        let refuse = |replicas, groups, nodes, devices| {
            place_replicas(&LOADS, &Spread { replicas, groups, nodes, devices }).unwrap_err().to_string()
        };
        assert!(refuse(16, 4, 3, 8).contains("nodes: wanted a divisor of 8 devices, found 3"));
        assert!(refuse(15, 4, 2, 8).contains("replicas: wanted a multiple of 8 devices"));
        assert!(refuse(8, 4, 2, 8).contains("at least 12 experts, found 8"));
        assert!(refuse(16, 5, 2, 8).contains("groups: wanted a divisor of 12 experts, found 5"));
        assert!(refuse(16, 4, 0, 8).contains("found 0"));
    }

    proptest! {
        #[test]
        fn every_expert_has_a_place_and_copies_follow_the_load(
            loads in proptest::collection::vec(0.0f64..100.0, 16), extra in 0usize..4, grouped: bool,
        ) {
            let spread = Spread { replicas: 16 + 4 * extra, groups: if grouped { 4 } else { 1 }, nodes: 2, devices: 4 };
            let placed = place_replicas(&loads, &spread).unwrap();
            prop_assert_eq!(placed.len(), spread.replicas);
            let copies = |e: usize| placed.iter().filter(|&&found| found == e).count();
            prop_assert!((0..16).all(|e| copies(e) >= 1));
            if !grouped && extra > 0 {
                let busiest = (0..16).max_by(|&a, &b| loads[a].total_cmp(&loads[b])).unwrap();
                prop_assert!(copies(busiest) > 1 || loads[busiest] == 0.0);
            }
        }
    }
}
