"""The README of an exported model: what it is, what it was made from, what it cost."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelFacts:
    """What a model card says. Costs are of the last training alone: `results.json` of the run has those of all it rests on."""

    name: str
    method: str
    domain: str
    finetuned: bool
    parameters: int
    context_length: int
    vocabulary_size: int
    domain_files: tuple[str, ...]
    generic_files: tuple[str, ...]
    training_tokens: int
    training_flops: int
    device_seconds: float
    device: str
    steps: int
    validation_loss: float | None
    logit_difference: float
    seed: int
    digest: str


def model_card(facts: ModelFacts) -> str:
    """The card as Markdown with the front matter that model hubs read."""
    tuned = f"then fine-tuned on the domain `{facts.domain}`" if facts.finetuned else "not fine-tuned"
    loss = "not measured" if facts.validation_loss is None else f"{facts.validation_loss:.4f} nats per token"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [megatron_specialm, {facts.method}, {facts.domain}]
---

# {facts.name}

A small specialized language model of {facts.parameters / 1e6:.1f}M parameters, made by the method `{facts.method}` of
Grangier et al., [Need a Small Specialized Language Model? Plan Early!](https://arxiv.org/abs/2402.01093), {tuned}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
ids = tokenizer(tokenizer.bos_token + "Once", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=40)[0]))
```

A text begins with the end-of-document token, as in training. The context is {facts.context_length} tokens, the vocabulary
{facts.vocabulary_size}.

| | |
|---|---|
| domain text | {_files(facts.domain_files)} |
| generic text | {_files(facts.generic_files)} |
| steps of the last training, to the end | {facts.steps} |
| tokens of the last training | {facts.training_tokens:,} |
| FLOPs of the last training | {facts.training_flops:.3e} |
| device-seconds of the last training | {facts.device_seconds:.1f} on {facts.device} |
| validation loss | {loss} |
| seed | {facts.seed} |
| training digest | `{facts.digest}` |
| largest difference to the source model's logits | {facts.logit_difference:.2e} |

The licence of the model follows from that of the text it was trained on, which this program does not know.
"""


def _files(files: tuple[str, ...]) -> str:
    return ", ".join(f"`{file}`" for file in files) or "none"
