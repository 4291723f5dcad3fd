"""Convert a Hugging Face folder to a DeepSpeed checkpoint.

This is `specialm convert SOURCE TARGET --to deepspeed`, with the same options.
"""

import sys

from megatron_specialm.cli import main

if __name__ == "__main__":
    sys.argv = ["specialm", "convert", "--to", "deepspeed", *sys.argv[1:]]
    main()
