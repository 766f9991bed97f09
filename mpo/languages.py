"""Languages by ISO 639-1 code: their English names, their FLORES-200 codes (which NLLB uses), and
the scripts they are written in.

A language has one name here, whichever usual form it came in: `canonical`. A script that is not the
language's own stays with it (zh-Hant).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import cache

LANGUAGES: dict[str, tuple[str, str]] = {
    "af": ("Afrikaans", "afr_Latn"),
    "ak": ("Akan", "aka_Latn"),
    "am": ("Amharic", "amh_Ethi"),
    "ar": ("Arabic", "arb_Arab"),
    "as": ("Assamese", "asm_Beng"),
    "ay": ("Aymara", "ayr_Latn"),
    "az": ("Azerbaijani", "azj_Latn"),
    "ba": ("Bashkir", "bak_Cyrl"),
    "be": ("Belarusian", "bel_Cyrl"),
    "bg": ("Bulgarian", "bul_Cyrl"),
    "bm": ("Bambara", "bam_Latn"),
    "bn": ("Bengali", "ben_Beng"),
    "bo": ("Tibetan", "bod_Tibt"),
    "bs": ("Bosnian", "bos_Latn"),
    "ca": ("Catalan", "cat_Latn"),
    "cs": ("Czech", "ces_Latn"),
    "cy": ("Welsh", "cym_Latn"),
    "da": ("Danish", "dan_Latn"),
    "de": ("German", "deu_Latn"),
    "dz": ("Dzongkha", "dzo_Tibt"),
    "ee": ("Ewe", "ewe_Latn"),
    "el": ("Greek", "ell_Grek"),
    "en": ("English", "eng_Latn"),
    "eo": ("Esperanto", "epo_Latn"),
    "es": ("Spanish", "spa_Latn"),
    "et": ("Estonian", "est_Latn"),
    "eu": ("Basque", "eus_Latn"),
    "fa": ("Persian", "pes_Arab"),
    "ff": ("Fulah", "fuv_Latn"),
    "fi": ("Finnish", "fin_Latn"),
    "fj": ("Fijian", "fij_Latn"),
    "fo": ("Faroese", "fao_Latn"),
    "fr": ("French", "fra_Latn"),
    "ga": ("Irish", "gle_Latn"),
    "gd": ("Scottish Gaelic", "gla_Latn"),
    "gl": ("Galician", "glg_Latn"),
    "gn": ("Guarani", "grn_Latn"),
    "gu": ("Gujarati", "guj_Gujr"),
    "ha": ("Hausa", "hau_Latn"),
    "he": ("Hebrew", "heb_Hebr"),
    "hi": ("Hindi", "hin_Deva"),
    "hr": ("Croatian", "hrv_Latn"),
    "ht": ("Haitian Creole", "hat_Latn"),
    "hu": ("Hungarian", "hun_Latn"),
    "hy": ("Armenian", "hye_Armn"),
    "id": ("Indonesian", "ind_Latn"),
    "ig": ("Igbo", "ibo_Latn"),
    "is": ("Icelandic", "isl_Latn"),
    "it": ("Italian", "ita_Latn"),
    "ja": ("Japanese", "jpn_Jpan"),
    "jv": ("Javanese", "jav_Latn"),
    "ka": ("Georgian", "kat_Geor"),
    "kg": ("Kongo", "kon_Latn"),
    "ki": ("Kikuyu", "kik_Latn"),
    "kk": ("Kazakh", "kaz_Cyrl"),
    "km": ("Khmer", "khm_Khmr"),
    "kn": ("Kannada", "kan_Knda"),
    "ko": ("Korean", "kor_Hang"),
    "ks": ("Kashmiri", "kas_Arab"),
    "ku": ("Kurdish", "kmr_Latn"),
    "ky": ("Kyrgyz", "kir_Cyrl"),
    "lb": ("Luxembourgish", "ltz_Latn"),
    "lg": ("Ganda", "lug_Latn"),
    "li": ("Limburgish", "lim_Latn"),
    "ln": ("Lingala", "lin_Latn"),
    "lo": ("Lao", "lao_Laoo"),
    "lt": ("Lithuanian", "lit_Latn"),
    "lv": ("Latvian", "lvs_Latn"),
    "mg": ("Malagasy", "plt_Latn"),
    "mi": ("Maori", "mri_Latn"),
    "mk": ("Macedonian", "mkd_Cyrl"),
    "ml": ("Malayalam", "mal_Mlym"),
    "mn": ("Mongolian", "khk_Cyrl"),
    "mr": ("Marathi", "mar_Deva"),
    "ms": ("Malay", "zsm_Latn"),
    "mt": ("Maltese", "mlt_Latn"),
    "my": ("Burmese", "mya_Mymr"),
    "nb": ("Norwegian Bokmål", "nob_Latn"),
    "ne": ("Nepali", "npi_Deva"),
    "nl": ("Dutch", "nld_Latn"),
    "nn": ("Norwegian Nynorsk", "nno_Latn"),
    "no": ("Norwegian", "nob_Latn"),
    "ny": ("Chichewa", "nya_Latn"),
    "oc": ("Occitan", "oci_Latn"),
    "om": ("Oromo", "gaz_Latn"),
    "or": ("Odia", "ory_Orya"),
    "pa": ("Punjabi", "pan_Guru"),
    "pl": ("Polish", "pol_Latn"),
    "ps": ("Pashto", "pbt_Arab"),
    "pt": ("Portuguese", "por_Latn"),
    "qu": ("Quechua", "quy_Latn"),
    "rn": ("Rundi", "run_Latn"),
    "ro": ("Romanian", "ron_Latn"),
    "ru": ("Russian", "rus_Cyrl"),
    "rw": ("Kinyarwanda", "kin_Latn"),
    "sa": ("Sanskrit", "san_Deva"),
    "sc": ("Sardinian", "srd_Latn"),
    "sd": ("Sindhi", "snd_Arab"),
    "sg": ("Sango", "sag_Latn"),
    "si": ("Sinhala", "sin_Sinh"),
    "sk": ("Slovak", "slk_Latn"),
    "sl": ("Slovenian", "slv_Latn"),
    "sm": ("Samoan", "smo_Latn"),
    "sn": ("Shona", "sna_Latn"),
    "so": ("Somali", "som_Latn"),
    "sq": ("Albanian", "als_Latn"),
    "sr": ("Serbian", "srp_Cyrl"),
    "ss": ("Swati", "ssw_Latn"),
    "st": ("Southern Sotho", "sot_Latn"),
    "su": ("Sundanese", "sun_Latn"),
    "sv": ("Swedish", "swe_Latn"),
    "sw": ("Swahili", "swh_Latn"),
    "ta": ("Tamil", "tam_Taml"),
    "te": ("Telugu", "tel_Telu"),
    "tg": ("Tajik", "tgk_Cyrl"),
    "th": ("Thai", "tha_Thai"),
    "ti": ("Tigrinya", "tir_Ethi"),
    "tk": ("Turkmen", "tuk_Latn"),
    "tl": ("Tagalog", "tgl_Latn"),
    "tn": ("Tswana", "tsn_Latn"),
    "tr": ("Turkish", "tur_Latn"),
    "ts": ("Tsonga", "tso_Latn"),
    "tt": ("Tatar", "tat_Cyrl"),
    "tw": ("Twi", "twi_Latn"),
    "ug": ("Uyghur", "uig_Arab"),
    "uk": ("Ukrainian", "ukr_Cyrl"),
    "ur": ("Urdu", "urd_Arab"),
    "uz": ("Uzbek", "uzn_Latn"),
    "vi": ("Vietnamese", "vie_Latn"),
    "wo": ("Wolof", "wol_Latn"),
    "xh": ("Xhosa", "xho_Latn"),
    "yi": ("Yiddish", "ydd_Hebr"),
    "yo": ("Yoruba", "yor_Latn"),
    "zh": ("Chinese", "zho_Hans"),
    "zu": ("Zulu", "zul_Latn"),
}

_LETTERS = {
    "Arab": ("ARABIC",),
    "Armn": ("ARMENIAN",),
    "Beng": ("BENGALI",),
    "Cyrl": ("CYRILLIC",),
    "Deva": ("DEVANAGARI",),
    "Ethi": ("ETHIOPIC",),
    "Geor": ("GEORGIAN",),
    "Grek": ("GREEK",),
    "Gujr": ("GUJARATI",),
    "Guru": ("GURMUKHI",),
    "Hang": ("HANGUL",),
    "Hans": ("CJK",),
    "Hant": ("CJK",),
    "Hebr": ("HEBREW",),
    "Jpan": ("HIRAGANA", "KATAKANA", "CJK"),
    "Khmr": ("KHMER",),
    "Knda": ("KANNADA",),
    "Laoo": ("LAO",),
    "Latn": ("LATIN",),
    "Mlym": ("MALAYALAM",),
    "Mymr": ("MYANMAR",),
    "Orya": ("ORIYA",),
    "Sinh": ("SINHALA",),
    "Taml": ("TAMIL",),
    "Telu": ("TELUGU",),
    "Thai": ("THAI",),
    "Tibt": ("TIBETAN",),
}
"""First words of the Unicode names of a script's letters."""

SCRIPTS = {code: _LETTERS[flores[-4:]] for code, (_, flores) in LANGUAGES.items()}
"""Scripts of each language, as Unicode names its letters."""

_OTHER_CODES = {
    "alb": "sq",
    "ara": "ar",
    "arm": "hy",
    "aym": "ay",
    "aze": "az",
    "baq": "eu",
    "bur": "my",
    "chi": "zh",
    "cmn": "zh",
    "cze": "cs",
    "dut": "nl",
    "ekk": "et",
    "fas": "fa",
    "fil": "tl",
    "fre": "fr",
    "ful": "ff",
    "geo": "ka",
    "ger": "de",
    "gre": "el",
    "gug": "gn",
    "ice": "is",
    "in": "id",
    "iw": "he",
    "ji": "yi",
    "jw": "jv",
    "kur": "ku",
    "lav": "lv",
    "mac": "mk",
    "mao": "mi",
    "may": "ms",
    "mlg": "mg",
    "mo": "ro",
    "mon": "mn",
    "msa": "ms",
    "nep": "ne",
    "nor": "no",
    "ori": "or",
    "orm": "om",
    "per": "fa",
    "pus": "ps",
    "que": "qu",
    "rum": "ro",
    "slo": "sk",
    "sqi": "sq",
    "swa": "sw",
    "tib": "bo",
    "uzb": "uz",
    "wel": "cy",
    "yid": "yi",
}
"""ISO 639-2 and 639-3 where FLORES takes another one, and codes that were given up."""
_CODES: dict[str, str] = {
    **_OTHER_CODES,
    **{flores[:3]: code for code, (_, flores) in reversed(LANGUAGES.items())},
}
_CODES |= {code: code for code in LANGUAGES} | {
    name.casefold(): code for code, (name, _) in LANGUAGES.items()
}
"""The code of every form without script and region, in lower case."""

_OWN_SCRIPT = {"Hani": "Hans", "Hrkt": "Jpan", "Kore": "Hang"}
_WRITTEN_THERE = {("zh", "tw"): "Hant", ("zh", "hk"): "Hant", ("zh", "mo"): "Hant"}
"""Scripts that a region says."""
_SCRIPT_NAMES = {
    "Arab": "Arabic script",
    "Cyrl": "Cyrillic script",
    "Hans": "simplified",
    "Hant": "traditional",
    "Latn": "Latin script",
}


def canonical(language: str) -> str:
    """One name for all usual forms of a language. What is not known stays as it is, in lower case
    and with hyphens.

        >>> {canonical(form) for form in "zh ZH zh-CN zh_Hans_CN zho chi cmn Chinese".split()}
        {'zh'}
        >>> canonical("zh-TW"), canonical("sr_Latn"), canonical("Klingon_X")
        ('zh-Hant', 'sr-Latn', 'klingon-x')
    """
    text = language.strip().casefold()
    if text in _CODES:
        return _CODES[text]
    first, *rest = re.split("[-_]", text.split(".")[0])
    code = _CODES.get(first)
    if code is None:
        return text.replace("_", "-")
    script = next((part.title() for part in rest if len(part) == 4 and part.isalpha()), None)
    script = script or next(
        (_WRITTEN_THERE[code, part] for part in rest if (code, part) in _WRITTEN_THERE), None
    )
    script = _OWN_SCRIPT.get(script or "", script)
    return code if script in (None, LANGUAGES[code][1][-4:]) else f"{code}-{script}"


def code_of(language: str) -> str:
    """A canonical name without its script."""
    return language.split("-")[0]


def is_known(language: str) -> bool:
    """Whether the table has the language of a canonical name, and its script."""
    return scripts_of(language) is not None


def name_of(language: str) -> str:
    """The English name of a canonical name; itself where it is not known.

    >>> name_of("zh-Hant")
    'Chinese (traditional)'
    """
    code, _, script = language.partition("-")
    if not is_known(language):
        return language
    name, _ = LANGUAGES[code]
    return f"{name} ({_SCRIPT_NAMES.get(script, script)})" if script else name


def flores_of(language: str) -> str | None:
    """The FLORES-200 code of a canonical name; None where it is not known.

    >>> flores_of("zh-Hant")
    'zho_Hant'
    """
    code, _, script = language.partition("-")
    if code not in LANGUAGES:
        return None
    _, flores = LANGUAGES[code]
    return f"{flores[:-4]}{script or flores[-4:]}"


def scripts_of(language: str) -> tuple[str, ...] | None:
    """Scripts of a canonical name, as Unicode names its letters; None where it is not known."""
    code, _, script = language.partition("-")
    if code not in LANGUAGES:
        return None
    return _LETTERS.get(script) if script else SCRIPTS[code]


_WEIGHTS = {"CJK": 3, "HIRAGANA": 2, "KATAKANA": 2, "HANGUL": 2}


@cache
def script_of(character: str) -> str:
    """First word of a letter's Unicode name, such as LATIN; empty for what is no letter."""
    return unicodedata.name(character, "").split(" ")[0] if character.isalpha() else ""


def weight_of(character: str) -> int:
    """How many Latin characters one character stands for, roughly: Han 3, kana and Hangul 2,
    combining marks and white space 0, else 1."""
    if character.isspace() or unicodedata.category(character).startswith("M"):
        return 0
    return _WEIGHTS.get(script_of(character), 1)


def weighed_letters(text: str) -> Counter[str]:
    """The weight of a text's letters in each script."""
    weights: Counter[str] = Counter()
    for character, count in Counter(text).items():
        if character.isalpha():
            weights[script_of(character)] += weight_of(character) * count
    return weights


def script_share(text: str, language: str) -> float:
    """Share of the text's letters, weighted, that belong to the language's script.

    1 for a language that is not known, or without letters. The weights let a Chinese sentence bear
    a Latin name.

        >>> script_share("我用 GPT", "zh")
        0.6666666666666666
    """
    expected, weights = scripts_of(language), weighed_letters(text)
    if expected is None or not weights:
        return 1.0
    return sum(weights[script] for script in expected) / weights.total()
