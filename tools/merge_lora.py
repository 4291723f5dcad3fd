"""Merge LoRA adapters into their base, as a Hugging Face folder.

This is `specialm merge SOURCE TARGET --to huggingface`, with the same options.
"""

import sys

from megatron_specialm.cli import main

if __name__ == "__main__":
    sys.argv = ["specialm", "merge", "--to", "huggingface", *sys.argv[1:]]
    main()
