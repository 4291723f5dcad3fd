"""Figures and tables from invented rows: what is drawn, what it says, and what seeds add up to."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_specialm.launch.costs import TASKS, total_cost

SIZES = {None: 1.0, 50_000: 1.3, 200_000: 1.0, 1_000_000: 0.8}  # factors of perplexity
DOMAINS = {"legal": 0.8, "speeches": 1.0, "encyclopedia": 1.25}
# method: (perplexity before fine-tuning, after), generic FLOPs, specialization FLOPs, per budget
METHODS: dict[str, list[tuple[float | None, float, float, float]]] = {
    "slm": [(130, 108, 5e12, 1.3e12), (101, 91, 1.5e13, 1.3e12), (88, 80, 4.5e13, 1.4e12)],
    "slm-nopt": [(None, 200, 0, 3.8e12)],
    "slm-is": [(72, 70, 5.7e10, 5.5e12), (57.5, 57.4, 5.7e10, 1.6e13), (50, 49, 5.7e10, 4.7e13)],
    "slm-mix": [(112, 96, 1.6e13, 1.5e12), (90, 79, 4.8e13, 1.5e12), (77, 70, 1.5e14, 1.5e12)],
    "slm-pn": [(109, 93, 1.2e13, 1.4e12), (88, 77, 3.6e13, 1.4e12), (76, 69, 1.1e14, 1.4e12)],
    "slm-d": [(None, 86, 6.5e13, 2.9e12), (None, 75, 1.9e14, 3.1e12)],
    "llm": [(95, 82, 5.2e13, 6.0e12), (80, 66, 1.6e14, 6.2e12)],
    "llm-lora": [(95, 84, 5.2e13, 9.0e12), (80, 67, 1.6e14, 9.1e12)],
}


def invented(
    *, seed: int = 0, sizes: tuple[int | None, ...] = (None,), methods: tuple[str, ...] = tuple(METHODS)
) -> Any:
    """Results as `write_results` makes them, of a page with these methods and sizes."""
    rows = list(_rows(seed, sizes, methods))
    macro = []
    for key in dict.fromkeys((row["method"], row["finetuned"], row["stage"], row["size"]) for row in rows):
        own = [row for row in rows if (row["method"], row["finetuned"], row["stage"], row["size"]) == key]
        entry = {name: value for name, value in own[0].items() if name not in ("domain", "base_domain", "nll")}
        perplexity = math.exp(sum(row["nll"] for row in own) / len(own))
        macro.append({**entry, "domains": len(own), "perplexity": perplexity})
    concentration = [
        {"stage": "assignment", "domain": domain, "base_domain": domain, "size": None, "k": 64, "windows": 400,
         "top_share": 0.5 + seed / 10, "entropy": 1.5, "effective_clusters": math.exp(1.5), "seed": seed}
        for domain in DOMAINS
    ]  # fmt: skip
    selection = [
        {"method": "slm-mix", "stage": "expert", "domain": "legal", "base_domain": "legal", "size": None,
         "choice": "c3", "by": "loss", "criterion": criterion, "criterion_choice": choice, "rank": rank,
         "tokens": tokens, "flops": 2.5e9, "seed": seed}
        for criterion, choice, rank, tokens in (("loss", "c3", 1, 65_536), ("frequency", "c1", 2, 0))
    ]  # fmt: skip
    return {
        "pipeline": "arena", "rows": rows, "macro": macro, "concentration": concentration, "selection": selection,
    }  # fmt: skip


def _rows(seed: int, sizes: tuple[int | None, ...], methods: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for method in methods:
        for budget, (before, after, generic, specialization) in enumerate(METHODS[method]):
            for finetuned, level in ((False, before), (True, after)):
                for size in sizes:
                    for domain, factor in DOMAINS.items():
                        if level is None:
                            continue
                        steep = {"slm-nopt": 3, "slm-is": 0.3}.get(method, 1) if finetuned else 0
                        noise = 1 + 0.03 * seed * (-1) ** len(domain)
                        perplexity = level * factor * SIZES[size] ** steep * noise
                        costs = {
                            "generic_tokens": 0, "specialization_tokens": 0,
                            "generic_flops": generic, "specialization_flops": specialization,
                            "generic_device_seconds": 2 + generic / 5e10, "specialization_device_seconds": specialization / 4e10,
                        }  # fmt: skip
                        totals = {
                            f"total_{what}_{tasks}": total_cost(costs, what, tasks=tasks)
                            for what in ("flops", "device_seconds")
                            for tasks in TASKS
                        }
                        yield {
                            "method": method, "stage": f"{method}-{budget}{'-tuned' * finetuned}",
                            "domain": domain if size is None else f"{domain}-{size}", "base_domain": domain, "size": size,
                            "finetuned": finetuned, "nll": math.log(perplexity), "perplexity": perplexity,
                            "tokens_evaluated": 40_000, **costs, **totals, "devices": "cpu",
                            "inference_parameters": 3_000_000, "seed": seed, "model": "m",
                        }  # fmt: skip
