"""Evaluation in several processes gives the same result as in one."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

from maskwright.inference import evaluate
from tests.inference.painted import Painted
from tests.inference.test_evaluate import Gallery


def one_of_two(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=2)
    result = evaluate(Painted().eval(), Gallery(), batch=2, device="cpu", examples=0)
    torch.save({"summary": result.summary, "missing": result.missing}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_work_and_both_know_the_result(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=one_of_two, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    expected = evaluate(Painted().eval(), Gallery(), device="cpu", examples=0).summary
    for rank in range(2):
        told = torch.load(tmp_path / f"{rank}.pt")
        assert told["summary"] == expected
        assert told["missing"] == 0
