"""Search languages: the text search configurations of PostgreSQL by which messages are stemmed.

They are those that PostgreSQL 15, the oldest version supported, has in pg_catalog.
"""

# The primary language subtags of each, of ISO 639-1 and ISO 639-3. A macrolanguage has those of its
# standard language too: "ar" is Arabic, and "arb" is Standard Arabic.
SUBTAGS = {
    "arabic": ("ar", "ara", "arb"),
    "armenian": ("hy", "hye"),
    "basque": ("eu", "eus"),
    "catalan": ("ca", "cat"),
    "danish": ("da", "dan"),
    "dutch": ("nl", "nld"),
    "english": ("en", "eng"),
    "finnish": ("fi", "fin"),
    "french": ("fr", "fra"),
    "german": ("de", "deu"),
    "greek": ("el", "ell"),
    "hindi": ("hi", "hin"),
    "hungarian": ("hu", "hun"),
    "indonesian": ("id", "ind"),
    "irish": ("ga", "gle"),
    "italian": ("it", "ita"),
    "lithuanian": ("lt", "lit"),
    "nepali": ("ne", "nep", "npi"),
    "norwegian": ("no", "nor", "nb", "nob", "nn", "nno"),
    "portuguese": ("pt", "por"),
    "romanian": ("ro", "ron"),
    "russian": ("ru", "rus"),
    "serbian": ("sr", "srp"),
    "spanish": ("es", "spa"),
    "swedish": ("sv", "swe"),
    "tamil": ("ta", "tam"),
    "turkish": ("tr", "tur"),
    "yiddish": ("yi", "yid", "ydd"),
}

# Splits text into words and does not stem them: for a language that PostgreSQL has no stemmer for.
SIMPLE = "simple"

SEARCH_LANGUAGES = (*SUBTAGS, SIMPLE)

_BY_SUBTAG = {subtag: language for language, subtags in SUBTAGS.items() for subtag in subtags}


def of_language_code(code: str) -> str:
    """The search language of a BCP 47 language tag, such as "german" for "de-AT"."""
    primary = code.partition("-")[0]
    return _BY_SUBTAG.get(primary.lower(), SIMPLE)
