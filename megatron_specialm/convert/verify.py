"""Whether an exported folder computes what our model does.

Legend: B windows, T positions, V vocabulary.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


@torch.no_grad()
def largest_logit_difference(folder: Path, tokens_BT: np.ndarray, logits_BTV: torch.Tensor) -> float:
    """Load the folder as a user of Transformers would and compare: the largest absolute difference, in fp32.

    It is NaN where either side's logits are: compare it with `not difference <= tolerance`.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True).float().eval()
    theirs_BTV = model(torch.from_numpy(tokens_BT)).logits
    return float((theirs_BTV - logits_BTV.float().cpu()).abs().max())
