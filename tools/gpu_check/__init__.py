"""The parts of tools/gpu_check.sh, and their runner."""
