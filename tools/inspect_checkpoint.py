"""Print what a checkpoint of any format is.

This is `specialm inspect PATH`, with the same options.
"""

import sys

from megatron_specialm.cli import main

if __name__ == "__main__":
    sys.argv = ["specialm", "inspect", *sys.argv[1:]]
    main()
