"""`python -m megatron_specialm` is `specialm`: what torchrun starts."""

from megatron_specialm.cli import main

if __name__ == "__main__":
    main()
