"""Comparing the logits of an exported folder with our model's.

Legend: B windows, T positions, V vocabulary.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


@torch.no_grad()
def largest_logit_difference(folder: Path, tokens_BT: np.ndarray, logits_BTV: torch.Tensor) -> float:
    """The largest absolute difference, in fp32, between our logits and those of the folder, loaded as a user of Transformers
    loads it. NaN where either side's logits are: compare it with `not difference <= tolerance`.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True).float().eval()
    theirs_BTV = model(torch.from_numpy(tokens_BT)).logits
    return float((theirs_BTV - logits_BTV.float().cpu()).abs().max())
