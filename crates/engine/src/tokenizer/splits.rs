//! How byte-level vocabularies cut text into words before merging, by the name that GGUF files give the way.
//!
//! Each expression cuts what the one before it left, matches and gaps alike. The expressions stand in the
//! `tokenizer.json` of the models named; llama.cpp's `src/llama-vocab.cpp` lists which name means which.

/// One way of cutting and merging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Split {
    /// Regular expressions, in order.
    pub expressions: &'static [&'static str],
    /// Whether a word that stands in the vocabulary is taken whole, whatever the merges would make of it.
    pub whole_words: bool,
    /// Whether tokens are written in GPT-2's alphabet of bytes; otherwise in characters, spaces as `▁`.
    pub byte_level: bool,
    /// Whether a text begins with bos where the file does not say.
    pub begins: bool,
}

macro_rules! contraction {
    () => {
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    };
}
/// Contractions, words, numbers, marks with the line breaks after them, white space.
macro_rules! words {
    ($numbers:literal) => {
        concat!(
            contraction!(),
            r"|[^\r\n\p{L}\p{N}]?\p{L}+|",
            $numbers,
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    };
}
/// As [`words`], but a capital letter after a small one begins a word; `$suffix` may end it.
macro_rules! cased_words {
    ($suffix:expr, $numbers:literal) => {
        concat!(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
            $suffix,
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
            $suffix,
            "|",
            $numbers,
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    };
}
macro_rules! contraction_or_none {
    () => {
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    };
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Llama 3's and cl100k's, from which many descend.
const LLAMA3: &str = words!(r"\p{N}{1,3}");
/// Qwen's: one digit a token.
const QWEN2: &str = words!(r"\p{N}");
const QWEN35: &str = concat!(
    contraction!(),
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// o200k's.
const GPT4O: &str = cased_words!(contraction_or_none!(), r"\p{N}{1,3}");
const TEKKEN: &str = cased_words!("", r"\p{N}");
const YOUTU: &str = cased_words!(contraction_or_none!(), r"\p{N}");
const YOUTU_SCRIPTS: &str = concat!(
    r"[\x{AC00}-\x{D7A3}\x{3131}-\x{318E}]+|[\x{FF01}\x{2026}\x{201C}\x{201D}\x{2018}\x{2019}\x{2014}",
    r"\x{FF1A}\x{FF1B}\x{FF0C}\x{3001}-\x{303F}\x{FE30}-\x{FE4F}]+|[\x{3105}-\x{312F}]+|[\x{4E00}-",
    r"\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+",
);
/// Kimi's: o200k's with runs of Chinese characters on their own.
const KIMI_K2: &str = concat!(
    r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*",
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+",
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const BAILING: &str = concat!(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|",
    r"\s*[\r\n]|\s+(?!\S)|\s+"
);
const SEED_CODER: &str =
    concat!(contraction!(), r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+");
const EXAONE_MOE: &str = concat!(
    contraction!(),
    r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|",
    r"\s*[\r\n]|\s+(?!\S)|\s+"
);
/// Cased letters as DeepSeek's first tokenizers list them.
const DEEPSEEK_LETTERS: &str = concat!(
    r"\s?[A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}\x{295}-",
    r"\x{2AF}\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}\x{388}-\x{38A}\x{38C}\x{38E}-",
    r"\x{3A1}\x{3A3}-\x{3F5}\x{3F7}-\x{481}\x{48A}-\x{52F}\x{531}-\x{556}\x{10A0}-\x{10C5}\x{13A0}-",
    r"\x{13F5}\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}",
    r"\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-",
    r"\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}",
    r"\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}\x{1FF2}-",
    r"\x{1FF4}\x{1FF6}-\x{1FFC}\x{2102}\x{2107}\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}",
    r"\x{2126}\x{2128}\x{212A}-\x{212D}\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}\x{2145}-\x{2149}",
    r"\x{214E}\x{2183}\x{2184}\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}",
    r"\x{A640}-\x{A66D}\x{A680}-\x{A69B}\x{A722}-\x{A76F}\x{A771}-\x{A787}\x{A78B}-\x{A78E}\x{AB70}-",
    r"\x{ABBF}\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}",
    r"\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}",
    r"\x{1E900}-\x{1E943}]+",
);
const DEEPSEEK_MARKS: &str = r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+";
const DEEPSEEK_CHINESE: &str = r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+";
/// Chinese and Japanese.
const IDEOGRAPHS: &str = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+";
const DEEPSEEK_V3: [&str; 3] = [
    r"\p{N}{1,3}",
    IDEOGRAPHS,
    concat!(
        r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"##,
        r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
];
const BLOOM: &str = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{FF0C}\x{3001}\x{964}\x{6D4}\x{60C})]+";

/// Names and expressions; of a row's names all mean the same.
const EXPRESSIONS: [(&[&str], &[&str]); 23] = [
    (
        &[
            "gpt-2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "jina-es",
            "jina-de",
            "jina-v2-es",
            "jina-v2-de",
            "jina-v1-en",
            "jina-v2-code",
            "roberta-bpe",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "modern-bert",
            "exaone4",
        ],
        &[GPT2],
    ),
    (
        &[
            "llama3",
            "llama-v3",
            "llama-bpe",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
            "jina-v5-nano",
            "dbrx",
            "smaug-bpe",
            "chatglm-bpe",
            "glm4",
            "glm5",
        ],
        &[LLAMA3],
    ),
    (
        &["qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "stablelm2", "hunyuan", "solar-open", "megrez", "grok-2"],
        &[QWEN2],
    ),
    (&["qwen35"], &[QWEN35]),
    (&["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"], &DEEPSEEK_V3),
    (&["deepseek-llm"], &[r"[\r\n]", DEEPSEEK_LETTERS, DEEPSEEK_MARKS, r"\s+$", DEEPSEEK_CHINESE, r"\p{N}+"]),
    (&["deepseek-coder"], &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_CHINESE, r"\p{N}"]),
    (&["falcon"], &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"]),
    (
        &["starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"],
        &[r"\p{N}", GPT2],
    ),
    (&["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2", "granite-embed-multi-97m"], &[GPT4O]),
    (&["tiny_aya", "cohere2moe"], &[r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O]),
    (&["tekken"], &[TEKKEN]),
    (&["youtu"], &[YOUTU_SCRIPTS, YOUTU]),
    (&["kimi-k2"], &[KIMI_K2]),
    (&["bailingmoe", "bailingmoe2", "llada-moe"], &[BAILING]),
    (&["seed-coder"], &[SEED_CODER]),
    (&["exaone-moe"], &[EXAONE_MOE]),
    (&["minicpm5"], &[r"\p{N}{1,3}", words!(r"\p{N}+")]),
    (&["laguna"], &[r"[^\n]+|[\n]+", QWEN2]),
    (&["bloom", "gpt3-finnish", "poro-chat"], &[BLOOM]),
    (&["viking"], &[BLOOM, r"\p{N}"]),
    (&["gemma4", "granite-embed-multi-311m", "sarvam-moe"], &[r"[^\n]+|[\n]+"]),
    (&["default"], &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
];

const WHOLE_WORDS: [&str; 15] = [
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "jina-v5-nano",
    "youtu",
    "glm4",
    "glm5",
    "tekken",
    "minicpm5",
    "granite-embed-multi-97m",
];
const WITHOUT_BYTES: [&str; 3] = ["gemma4", "granite-embed-multi-311m", "sarvam-moe"];
const BEGINNING: [&str; 10] = [
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "jina-v5-nano",
    "tekken",
];

/// The way that a name stands for, `None` if it is not known.
pub(super) fn named(name: &str) -> Option<Split> {
    let (_, expressions) = EXPRESSIONS.iter().find(|(names, _)| names.contains(&name))?;
    Some(Split {
        expressions,
        whole_words: WHOLE_WORDS.contains(&name),
        byte_level: !WITHOUT_BYTES.contains(&name),
        begins: BEGINNING.contains(&name),
    })
}

/// A name that stands for one expression alone.
pub(super) fn with_expression(expression: &str) -> Option<&'static str> {
    let row = EXPRESSIONS.iter().find(|(_, expressions)| *expressions == [expression]);
    row.and_then(|(names, _)| names.first().copied())
}

/// All names, for messages.
pub(super) fn names() -> String {
    EXPRESSIONS.iter().flat_map(|(names, _)| names.iter().copied()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::pre_tokenizers::split::{Split as Cut, SplitPattern};
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, SplitDelimiterBehavior};

    fn cut(name: &str, text: &str) -> Vec<String> {
        let mut pieces = PreTokenizedString::from(text);
        for expression in named(name).expect("a known name").expressions {
            let pattern = SplitPattern::Regex((*expression).to_string());
            Cut::new(pattern, SplitDelimiterBehavior::Isolated, false).unwrap().pre_tokenize(&mut pieces).unwrap();
        }
        let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
        splits.into_iter().map(|(piece, ..)| piece.to_string()).collect()
    }

    #[test]
    fn every_expression_compiles_and_loses_no_letter() {
        let text = "Don't  stop, HelloWORLD'S 12345 ñandú 日本語\r\n\n\t x_y++ ٣٤ 🙂\u{200d}é  ";
        for (names, _) in EXPRESSIONS {
            for name in names {
                assert_eq!(cut(name, text).concat(), text, "{name}");
            }
        }
        let listed: Vec<&str> = EXPRESSIONS.iter().flat_map(|(names, _)| names.iter().copied()).collect();
        for name in WHOLE_WORDS.iter().chain(&WITHOUT_BYTES).chain(&BEGINNING) {
            assert!(listed.contains(name), "{name}");
        }
        assert_eq!(named("nobody's"), None);
    }

    #[test]
    fn words_are_cut_as_the_families_do() {
        assert_eq!(cut("gpt-2", "It's 1234 now"), ["It", "'s", " 1234", " now"]);
        assert_eq!(cut("llama-bpe", "IT'S 1234 now"), ["IT", "'S", " ", "123", "4", " now"]);
        assert_eq!(cut("qwen2", "a12\n\nb"), ["a", "1", "2", "\n\n", "b"]);
        assert_eq!(cut("gpt-4o", "camelCase's X"), ["camel", "Case's", " X"]);
        assert_eq!(cut("tekken", "camelCase's"), ["camel", "Case", "'s"]);
        assert_eq!(cut("deepseek-v3", "12345日本x"), ["123", "45", "日本", "x"]);
        assert_eq!(cut("smollm", "x 10"), ["x", " ", "1", "0"]);
    }
}
