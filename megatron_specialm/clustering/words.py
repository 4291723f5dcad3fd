"""The words of a text, for counting.

Most scripts separate words by spaces: a word is a run of two or more letters or digits, as with scikit-learn's
`\\b\\w\\w+\\b`. A run of a script without spaces is cut into overlapping pairs of characters (the usual index for Chinese and
Japanese; Nie et al., IRAL 2000, find them as good as words); a single character stays. Signs of Indic scripts that `\\w` does
not match belong to their words, and marks of scripts without spaces to their runs.
"""

import re
from itertools import pairwise

# Blocks of Unicode without their punctuation and digits.
_SPACELESS = (
    "\u0e01-\u0e3a\u0e40-\u0e4e"  # Thai
    "\u0e81-\u0ece\u0edc-\u0edf"  # Lao
    "\u0f00\u0f40-\u0fbc"  # Tibetan
    "\u1000-\u103f\u1050-\u108f\ua9e0-\ua9ef\ua9fa-\ua9fe\uaa60-\uaa7f"  # Myanmar
    "\u1780-\u17d3\u17d7\u17dc\u17dd"  # Khmer
    "\u1950-\u19cf\u1a20-\u1a7f\u1aa0-\u1aad"  # Tai Le, New Tai Lue, Tai Tham
    "\ua980-\ua9c0"  # Javanese
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"  # Han
    "\u3041-\u3096\u3099-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Hiragana, Katakana
    "\u3105-\u312f\u31a0-\u31bf"  # Bopomofo
    "\ua000-\ua48c"  # Yi
)
_INDIC = "\u0900-\u0963\u0971-\u0dff"  # Devanagari to Sinhala
_RUN = re.compile(f"[{_SPACELESS}]+")
_WORD = re.compile(rf"[\w{_INDIC}]{{2,}}")


def words(text: str) -> list[str]:
    """The words of a text in lower case, and pairs of characters for scripts without spaces."""
    text = text.lower()
    found: list[str] = _WORD.findall(_RUN.sub(" ", text))
    for run in _RUN.findall(text):
        found += map("".join, pairwise(run)) if len(run) > 1 else [run]
    return found
