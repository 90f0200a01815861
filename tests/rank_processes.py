"""Processes that are the ranks of a gloo group, for tests."""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

RANKS = 2
SECONDS = 120

#: What runs on every rank, in a folder that all have.
Case = Callable[[Path], None]


def run(cases: Callable[[], Mapping[str, Case]], folder: Path) -> dict[str, list[str]]:
    """What each case said on each rank: a traceback, or "" where it passed.

    cases: a function of a module, which every rank calls for its cases, in the same order.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_rank, args=(rank, cases, folder, results), daemon=True)
        for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    said: dict[str, list[str]] = {name: [] for name in cases()}
    for _ in range(RANKS * len(said)):
        name, text = results.get(timeout=SECONDS)
        said[name].append(text)
    for process in processes:
        process.join(SECONDS)
    return said


def _rank(rank: int, cases: Callable[[], Mapping[str, Case]], folder: Path, results: Any) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS}  # for transformers
    os.environ.update({name: str(value) for name, value in names.items()})
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/init",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=SECONDS),
    )
    for name, case in cases().items():
        try:
            case(folder)
            results.put((name, ""))
        except BaseException:
            results.put((name, f"rank {rank}: {traceback.format_exc()}"))
    dist.barrier()
    dist.destroy_process_group()
