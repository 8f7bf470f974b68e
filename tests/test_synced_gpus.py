"""Ranks that must forward together (`synced_gpus`, FSDP): a rank that is done goes on until all are, texts unchanged.

Two gloo processes on the CPU run every case below once; the tests read what they found. The prompts of the ranks end
at different times, so a rank that left its rounds early would hang the other one.
"""

import datetime
import json
import os
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import CACHE, tiny_draft, tiny_target
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from hf_longspec.modeling.choice_longspec import Chooser

WORLD = 2
TIMEOUT = datetime.timedelta(seconds=60)
LONG, SHORT = {"max_new_tokens": 25}, {"max_new_tokens": 6}


def prompt_of(length):
    return torch.randint(2, 13, (1, length), generator=torch.Generator().manual_seed(length))


class Calls:
    """Counts the calls of the modules that a sharded target gathers its weights in."""

    def __init__(self, target):
        self.count = 0
        self.hooks = [
            module.register_forward_pre_hook(self.add)
            for module in (target, target.get_input_embeddings(), target.get_output_embeddings())
        ]

    def add(self, *args):
        self.count += 1

    def remove(self):
        for hook in self.hooks:
            hook.remove()


def compare(rank, target, *options_of_ranks, do_sample=False, tree=None, **shared):
    """What plain and assisted `generate` leave on this rank; each rank has its own prompt and options."""
    draft = tiny_draft(target, window=8, **({"tree_shape": (13, 20)} if tree is None else tree))
    options = {"pad_token_id": 0, "do_sample": do_sample, "return_dict_in_generate": True, **shared}
    options |= options_of_ranks[rank]
    runs = []
    for assistant in ({}, {"assistant_model": draft}):
        torch.manual_seed(rank)
        calls = Calls(target)
        out = target.generate(prompt_of(5 + 7 * rank), **options, **assistant)
        calls.remove()
        runs.append({"text": out.sequences.tolist(), "draw": torch.rand(1).item()})
    # plain `generate` leaves what an idle rank forwards in its cache
    lengths = {layer.get_seq_length() for layer in out[CACHE].layers}
    clean = lengths == {out.sequences.shape[1] - 1}
    return {"plain": runs[0], "ours": runs[1], "calls": calls.count, "clean": clean, "accepted": out.accept_lengths}


def replicated(rank, folder, **options):
    return compare(rank, tiny_target("llama"), SHORT, LONG, synced_gpus=True, **options)


def done_with_the_prefill(rank, folder):
    return compare(rank, tiny_target("llama"), {"max_new_tokens": 1}, LONG, synced_gpus=True)


def sliding(rank, folder):
    return compare(rank, tiny_target("mistral"), LONG, SHORT, synced_gpus=True)


def stopped_by_eos(rank, folder):
    target = tiny_target("llama")
    text = target.generate(prompt_of(5), max_new_tokens=6, pad_token_id=0)
    return compare(rank, target, LONG | {"eos_token_id": int(text[0, 8])}, LONG, synced_gpus=True)


def fsdp(rank, folder, reshard=None, apart=False, tree=None):
    """Nobody says `synced_gpus` here: `generate` sees that the target is sharded."""
    target = tiny_target("llama")
    for module in target.model.layers:
        fully_shard(module)
    if apart:
        fully_shard(target.model.embed_tokens)
        fully_shard(target.lm_head)
    fully_shard(target, **({} if reshard is None else {"reshard_after_forward": reshard}))
    return compare(rank, target, SHORT, LONG, tree=tree)


def chosen_apart(rank, folder):
    """Ranks that time their rounds would choose other trees than each other, and grow them to other depths."""
    choose = Chooser._choose
    Chooser._choose = lambda chooser: chooser._take(chooser.ladder[-rank])
    try:
        return fsdp(rank, folder, reshard=True, apart=True, tree={"tree_shape": "auto"})
    finally:
        Chooser._choose = choose


def tensor_parallel(rank, folder):
    if rank == 0:
        tiny_target("llama", vocab_size=14).save_pretrained(folder)
    dist.barrier()
    target = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=WORLD))
    target.generate(prompt_of(5), assistant_model=tiny_draft(target), pad_token_id=0, **SHORT)
    return {}


CASES = {
    "replicated": (replicated, {}),
    "sampled": (replicated, {"do_sample": True}),
    "done with the prefill": (done_with_the_prefill, {}),
    "stopped by eos": (stopped_by_eos, {}),
    "sliding window": (sliding, {}),
    "fsdp": (fsdp, {}),
    "fsdp, sharded again after each forward": (fsdp, {"reshard": True}),
    "fsdp, embedding and head apart": (fsdp, {"reshard": True, "apart": True}),
    "fsdp, copies": (fsdp, {"reshard": True, "tree": {"tree_shape": (13, 20), "copy_tokens": 6}}),
    "fsdp, trees chosen while decoding": (chosen_apart, {}),
}
TENSOR_PARALLEL = {"tensor parallel": (tensor_parallel, {})}


def work(rank, folder):
    """All cases on one rank; a case that raises does so on both, and its error is what it found."""
    torch.set_num_threads(1)
    # what torchrun sets; the rendezvous itself is a file, so that no port is needed
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=WORLD, timeout=TIMEOUT)
    found = {}
    for name, (case, options) in (CASES | TENSOR_PARALLEL).items():
        try:
            found[name] = case(rank, folder / "target", **options)
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list:
    """What each rank found, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (Path(folder),), nprocs=WORLD)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES)
def test_every_rank_writes_what_it_writes_alone(found, case):
    for ranks in found:
        assert "error" not in ranks[case], ranks[case].get("error")
        assert ranks[case]["ours"] == ranks[case]["plain"] and ranks[case]["clean"]
    texts = [ranks[case]["ours"]["text"] for ranks in found]
    assert texts[0] != texts[1]
    assert sum(sum(ranks[case]["accepted"][0]) > len(ranks[case]["accepted"][0]) for ranks in found) >= 1


@pytest.mark.parametrize("case", CASES)
def test_ranks_make_the_same_calls(found, case):
    """Each gathers weights from the others, so one more on a rank would wait for ever."""
    calls = [ranks[case].get("calls") for ranks in found]
    rounds = [len(ranks[case]["accepted"][0]) for ranks in found]
    assert calls[0] == calls[1]
    assert rounds[0] != rounds[1], "the ranks were done at the same time: nothing is tested"


def test_a_tensor_parallel_target_is_refused(found):
    for ranks in found:
        error = ranks["tensor parallel"]["error"]
        assert "ValueError: LongSpec does not serve tensor-parallel targets, got tp_size=2" in error
