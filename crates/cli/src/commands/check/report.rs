//! What a comparison found: the largest difference of each quantity, and whether it is small enough.

/// The largest absolute difference seen, and where.
#[derive(Clone, Debug, Default)]
pub struct Worst {
    difference: f64,
    place: String,
    compared: usize,
    /// Comparisons that are not even equal.
    differing: usize,
}

impl Worst {
    /// Takes in two rows of numbers, which `name` calls by name. Another length or a number that is not one counts as
    /// infinitely far off.
    pub fn compare(&mut self, name: &str, wanted: &[f32], found: &[f32]) {
        self.compare_count(name, wanted.len(), found.len());
        for (at, (wanted, found)) in wanted.iter().zip(found).enumerate() {
            let difference = (f64::from(*wanted) - f64::from(*found)).abs();
            let difference = if difference.is_nan() { f64::INFINITY } else { difference };
            self.take(difference, || format!("{name}[{at}]: wanted {wanted:e}, found {found:e}"));
        }
    }

    /// As [`Worst::compare`], where the folder may not have what is wanted: then nothing is compared.
    pub fn compare_known(&mut self, name: &str, wanted: Option<&[f32]>, found: &[f32]) {
        if let Some(wanted) = wanted {
            self.compare(name, wanted, found);
        }
    }

    /// Takes in one comparison of things that are equal or not.
    pub fn compare_equal(&mut self, equal: bool, place: impl FnOnce() -> String) {
        self.take(if equal { 0.0 } else { 1.0 }, place);
    }

    /// Takes in numbers of things that must be equal; says nothing if they are.
    pub fn compare_count(&mut self, name: &str, wanted: usize, found: usize) {
        if wanted != found {
            self.take(f64::INFINITY, || format!("{name}: wanted {wanted} values, found {found}"));
        }
    }

    fn take(&mut self, difference: f64, place: impl FnOnce() -> String) {
        self.compared += 1;
        self.differing += usize::from(difference > 0.0);
        if difference > self.difference {
            self.difference = difference;
            self.place = place();
        }
    }
}

/// The lines of one folder.
#[derive(Debug)]
pub struct Report {
    tolerance: f64,
    lines: Vec<String>,
    within: bool,
}

impl Report {
    /// An empty report.
    pub fn new(tolerance: f64) -> Self {
        Self { tolerance, lines: Vec::new(), within: true }
    }

    /// A quantity that must be equal within the tolerance.
    pub fn quantity(&mut self, name: &str, worst: &Worst) {
        self.line(name, worst, self.tolerance, &format!("{:.1e}", worst.difference));
    }

    /// A quantity that must be equal.
    pub fn exact(&mut self, name: &str, worst: &Worst) {
        self.line(name, worst, 0.0, &format!("{} differ", worst.differing));
    }

    fn line(&mut self, name: &str, worst: &Worst, tolerance: f64, difference: &str) {
        if worst.compared == 0 {
            self.lines.push(format!("  {name:<16} {:>10}             absent", "-"));
            return;
        }
        let within = worst.difference <= tolerance;
        self.within &= within;
        let verdict = if within { "ok".to_string() } else { format!("DIFFERS  {}", worst.place) };
        self.lines.push(format!("  {name:<16} {difference:>10}  of {:>7}  {verdict}", worst.compared));
    }

    /// Whether every quantity was close enough.
    pub fn within(&self) -> bool {
        self.within
    }

    /// The report as text, a line for each quantity.
    pub fn text(&self) -> String {
        self.lines.iter().map(|line| format!("{line}\n")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_is_kept_and_named() {
        let mut worst = Worst::default();
        worst.compare("a", &[1.0, 2.0], &[1.0, 2.5]);
        worst.compare("b", &[1.0], &[1.25]);
        let mut report = Report::new(1e-4);
        report.quantity("numbers", &worst);
        assert!(!report.within());
        assert!(
            report.text().contains("5.0e-1  of       3  DIFFERS  a[1]: wanted 2e0, found 2.5e0"),
            "{}",
            report.text()
        );
    }

    #[test]
    fn what_is_no_number_or_too_short_is_infinitely_far() {
        for (wanted, found) in [(&[0.0f32][..], &[f32::NAN][..]), (&[0.0, 1.0], &[0.0])] {
            let mut worst = Worst::default();
            worst.compare("x", wanted, found);
            let mut report = Report::new(1e9);
            report.quantity("x", &worst);
            assert!(!report.within());
        }
        let mut report = Report::new(0.0);
        report.quantity("nothing", &Worst::default());
        assert!(report.within() && report.text().ends_with("absent\n"));
    }
}
