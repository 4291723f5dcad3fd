"""The parts of tools/gpu_check.sh, and what runs them."""
