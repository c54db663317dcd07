#!/usr/bin/env bash
# The vowel table of 1991 (docs/experiments.md): gets Peterson and Barney's measurements out of Debian's praat, or takes a
# CSV with the columns speaker, vowel, f1, f2, and runs the example on it.
#   bench/vowels.sh [TABLE.csv [RUNS]]
set -euo pipefail
cd "$(dirname "$0")/.."

table=${1:-}
if [ -z "$table" ]; then
    command -v praat >/dev/null || { echo "wanted: praat (apt-get install praat), or a CSV as first argument" >&2; exit 1; }
    work=$(mktemp -d)
    trap 'rm -r "$work"' EXIT
    printf 'Create formant table (Peterson & Barney 1952)\nSave as comma-separated file: "%s"\n' "$work/raw.csv" >"$work/table.praat"
    praat --run "$work/table.praat"
    table=$work/vowels.csv
    # The four vowels of the paper: heed, hid, hod, hud; columns by name, for versions of praat order them differently.
    awk -F, '
        NR == 1 { for (i = 1; i <= NF; i++) column[tolower($i)] = i; print "speaker,vowel,f1,f2"; next }
        {
            name = $column["vowel"]
            letter = name == "iy" ? "i" : name == "ih" ? "I" : name == "aa" ? "A" : name == "ah" ? "V" : ""
            if (letter != "") print $column["speaker"] "," letter "," $column["f1"] "," $column["f2"]
        }' "$work/raw.csv" >"$table"
fi
exec cargo run --release -q -p moebius-moe --example vowels -- "$table" "${2:-25}"
