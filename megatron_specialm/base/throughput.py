"""Model FLOPs utilisation against the peak that the device's maker states for dense matrices."""

# bf16 with fp32 accumulation, without sparsity (which makers like to print twice as high), in FLOP/s.
DENSE_BF16_PEAK = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "V100": 125e12,
}


def dense_peak(device_name: str) -> float | None:
    """FLOP/s of a device by a part of its name; None where the table does not know it (every CPU)."""
    return next((peak for name, peak in DENSE_BF16_PEAK.items() if name in device_name), None)


def utilisation(*, flops: float, seconds: float, devices: int, device_name: str) -> float | None:
    """MFU in [0, 1]: the model's own FLOPs (no recomputation) over the devices' peak; None on unknown devices."""
    peak = dense_peak(device_name)
    return None if peak is None else flops / (seconds * devices * peak)
