"""Convert a Hugging Face folder to a Megatron checkpoint (torch_dist).

This is `specialm convert SOURCE TARGET --to megatron`, with the same options.
"""

import sys

from megatron_specialm.cli import main

if __name__ == "__main__":
    sys.argv = ["specialm", "convert", "--to", "megatron", *sys.argv[1:]]
    main()
