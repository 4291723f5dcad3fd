"""Convert a Megatron checkpoint (torch_dist or mp_rank folders) to a Hugging Face folder.

This is `specialm convert SOURCE TARGET --to huggingface`, with the same options.
"""

import sys

from megatron_specialm.cli import main

if __name__ == "__main__":
    sys.argv = ["specialm", "convert", "--to", "huggingface", *sys.argv[1:]]
    main()
