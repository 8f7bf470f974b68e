"""A small report, as `hf-longspec evaluate` writes it."""

from typing import Any


def bucket(task: str, context: int, accept_length: float, speed_up: float) -> dict[str, Any]:
    return {
        "task": task,
        "context": context,
        "prompts": 4,
        "prompt_tokens": float(context),
        "cut": 0,
        "accept_length": accept_length,
        "lowest": 3.0,
        "highest": 4.0,
        "acceptance_by_level": [0.9, 0.8],
        "plain_prefill_seconds": 1.0,
        "prefill_seconds": 1.1,
        "plain_tokens_per_second": 10.0,
        "tokens_per_second": 10.0 * speed_up,
        "speed_up": speed_up,
        "equal": 3,
        "ties": 1,
        "different": 0,
        "plain_peak_bytes": None,
        "peak_bytes": None,
    }


def report() -> dict[str, Any]:
    figures = [(1024, 3.5, 2.0), (4096, 3.25, 1.5)]
    return {
        "format": "hf-longspec evaluation",
        "version": 1,
        "target": {"name": "tiny", "revision": None, "vocabulary_sha256": "f" * 64, "dtype": "bfloat16"},
        "draft": {
            "name": "draft",
            "parameters": 1000,
            "weights_bytes": 2000,
            "state_bytes": 434688,
            "tree": [2, 2],
            "verify_tokens": None,
            "backend": "torch",
        },
        "setting": {
            "contexts": [1024, 4096],
            "prompts": 4,
            "max_new_tokens": {"code": 64},
            "temperature": 0.0,
            "seed": 0,
        },
        "machine": {"cores": 2, "load_average": 1.9},
        "sources": [],
        "left_out": {},
        "provenance": {
            "command": "hf-longspec evaluate --target tiny",
            "device": "CPU, 2 threads",
            "commit": None,
            "torch": "2.13",
            "transformers": "5.23",
            "python": "3.12",
            "hf-longspec": "0.1.0",
            "triton": None,
        },
        "buckets": [bucket(task, *figure) for task in ("code", "all") for figure in figures],
    }
