"""The setting of all tests: shape checks, number of threads, reproducible random examples."""

from __future__ import annotations

import os

os.environ.setdefault("MASKWRIGHT_DEBUG", "1")  # mistakes of the library keep their traceback (checkpoints/budget.py)

from tests import shapes

if shapes.ENABLED:
    shapes.install()

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("thorough", settings.get_profile("ci"), derandomize=False, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """`-n auto`: at most four workers, because each imports torch, and more take memory without saving time."""
    return min(4, os.cpu_count() or 1)


def pytest_configure(config: pytest.Config) -> None:
    # Workers share the cores, and the tensors are small: more threads take more CPU time without saving any.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse tests marked both fast and slow, and start slow tests first, to balance the workers."""
    both = [item.nodeid for item in items if item.get_closest_marker("fast") and item.get_closest_marker("slow")]
    if both:
        raise pytest.UsageError(f"marked fast and slow at once: {', '.join(both)}")
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    chosen = config.option.markexpr
    omitted = ("thorough",) if chosen == "fast" else () if chosen else ("cluster", "full", "runtime")
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in omitted)]
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def _repeatable():
    """Seed torch before every test."""
    torch.manual_seed(0)
