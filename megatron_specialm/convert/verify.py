"""Whether an exported folder computes what our model does."""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


@torch.no_grad()
def largest_logit_difference(folder: Path, tokens_BT: np.ndarray, logits_BTV: torch.Tensor) -> float:
    """Load the folder as a user of Transformers would and compare: the largest absolute difference, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    theirs_BTV = model(torch.from_numpy(tokens_BT)).logits
    return float((theirs_BTV - logits_BTV.float().cpu()).abs().max())
