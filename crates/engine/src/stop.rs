//! Stop strings: text that may still become one is held back.

/// What a [`StopRule`] says about the text pushed so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Generation goes on; this much may be shown now.
    Continue(String),
    /// A stop string has appeared; this is the text before it.
    Stop {
        /// The rest to show.
        text: String,
        /// The stop string found.
        matched: String,
    },
}

/// Watches a stream of text for stop strings, wherever the pieces' borders lie.
#[derive(Clone, Debug, Default)]
pub struct StopRule {
    stops: Vec<String>,
    held: String,
}

impl StopRule {
    /// A rule for these strings; empty ones never match.
    pub fn new(stops: &[String]) -> Self {
        Self { stops: stops.iter().filter(|stop| !stop.is_empty()).cloned().collect(), held: String::new() }
    }

    /// Takes a piece of text. The stop string that begins first wins, among those the longest.
    pub fn push(&mut self, piece: &str) -> Verdict {
        self.held.push_str(piece);
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str()).map(|at| (at, stop)));
        if let Some((at, stop)) = found.min_by_key(|(at, stop)| (*at, usize::MAX - stop.len())) {
            let matched = stop.clone();
            let text = self.held[..at].to_string();
            self.held.clear();
            return Verdict::Stop { text, matched };
        }
        let rest = self.held.split_off(self.safe_length());
        Verdict::Continue(std::mem::replace(&mut self.held, rest))
    }

    /// The text held back, when no more will come.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes of the held text before the first place where a stop string may have begun.
    fn safe_length(&self) -> usize {
        let may_begin = |at: usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[at..]));
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let from = self.held.len().saturating_sub(longest);
        let mut places = self.held.char_indices().map(|(at, _)| at).filter(|&at| at >= from);
        places.find(|&at| may_begin(at)).unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rule(stops: &[&str]) -> StopRule {
        StopRule::new(&stops.iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    #[test]
    fn text_that_may_become_a_stop_is_held() {
        let mut stop = rule(&["END"]);
        assert_eq!(stop.push("the E"), Verdict::Continue("the ".into()));
        assert_eq!(stop.push("N"), Verdict::Continue(String::new()));
        assert_eq!(stop.push("ough"), Verdict::Continue("ENough".into()));
        assert_eq!(stop.push("EEN"), Verdict::Continue("E".into()));
        assert_eq!(stop.push("D and more"), Verdict::Stop { text: String::new(), matched: "END".into() });
        assert_eq!(stop.finish(), "");
    }

    #[test]
    fn the_first_beginning_wins_then_the_longest() {
        let stop = |stops: &[&str], text: &str| rule(stops).push(text);
        assert_eq!(stop(&["b", "abc"], "xabc"), Verdict::Stop { text: "x".into(), matched: "abc".into() });
        assert_eq!(stop(&["a", "ab"], "xab"), Verdict::Stop { text: "x".into(), matched: "ab".into() });
        assert_eq!(stop(&[""], "text"), Verdict::Continue("text".into()));
        assert_eq!(stop(&["é!"], "caf\u{e9}"), Verdict::Continue("caf".into()));
    }

    proptest! {
        /// However the text is cut, what is shown is the text up to the earliest stop string complete at that time, and
        /// nothing of a stop string leaks out.
        #[test]
        fn pieces_show_the_text_up_to_the_stop(pieces in prop::collection::vec("[abé]{0,4}", 0..12), stop in "[abé]{1,3}") {
            let whole = pieces.concat();
            let mut rule = rule(&[&stop]);
            let mut shown = String::new();
            let mut stopped = false;
            for piece in &pieces {
                match rule.push(piece) {
                    Verdict::Continue(text) => shown.push_str(&text),
                    Verdict::Stop { text, matched } => {
                        prop_assert_eq!(&matched, &stop);
                        shown.push_str(&text);
                        stopped = true;
                        break;
                    }
                }
            }
            if !stopped {
                shown.push_str(&rule.finish());
            }
            match whole.find(&stop) {
                Some(at) => prop_assert_eq!(&shown, &whole[..at]),
                None => prop_assert_eq!(&shown, &whole),
            }
            prop_assert_eq!(stopped, whole.contains(&stop));
        }
    }
}
