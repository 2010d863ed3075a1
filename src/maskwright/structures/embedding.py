"""The encoding of an image, from which a promptable system answers any number of prompts."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from maskwright.errors import DataError, UsageError
from maskwright.files import atomic_path
from maskwright.structures.placement import Placement

FORMAT = "maskwright-embedding"


@dataclass(frozen=True, eq=False)
class Embedding:
    """The encoding of one image.

    An embedding is never changed: several threads can answer prompts on the same one.

    Attributes:
        tensors: The encoder's output by name, (C, h, w) each.
        placement: How the image was placed in the network's input.
        input_size: H, W of the network's input with its padding.
        system: Identifies the image encoder (name, options and weights) that computed it.
    """

    tensors: Mapping[str, Tensor]
    placement: Placement
    input_size: tuple[int, int]
    system: str

    @property
    def image_size(self) -> tuple[int, int]:
        """H, W of the image."""
        return self.placement.image_size

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self.tensors.values())).device

    def __repr__(self) -> str:
        """Return a line with shapes in place of values."""
        shapes = ", ".join(f"{name}: {tuple(value.shape)}" for name, value in self.tensors.items())
        height, width = self.image_size
        return f"Embedding({shapes}; image {height} x {width}; {self.system})"

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Embedding:
        """Return the embedding on a device, or with another floating point type.

        Raises:
            UsageError: If the device is not available, or the type is not a floating point type.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise UsageError(f"the type of an embedding must be a floating point type, got {dtype}")
        return replace(self, tensors=_moved(self.tensors, device, dtype))

    def save(self, path: str | Path) -> Path:
        """Write a file, atomically, that `load` reads on any machine.

        Args:
            path: A file name that ends in .safetensors.

        Raises:
            UsageError: If `path` has another suffix.
            DataError: If the file cannot be written.
        """
        from safetensors.torch import save_file

        path = Path(path)
        if path.suffix != ".safetensors":
            raise UsageError(f"{path}: the file name of an embedding must end in .safetensors")
        about = {
            "format": FORMAT,
            "system": self.system,
            "placement": json.dumps(asdict(self.placement)),
            "input_size": json.dumps(list(self.input_size)),
        }
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in self.tensors.items()}
        with atomic_path(path, DataError) as part:
            save_file(tensors, part, metadata=about)
        return path

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Embedding:
        """Read a file that `save` wrote.

        Args:
            path: The file.
            device: Where to put the tensors.

        Raises:
            DataError: If the file cannot be read or is not an embedding.
            UsageError: If the device is not available.
        """
        from safetensors import safe_open

        path = Path(path)
        if not path.is_file():
            raise DataError(f"{path}: there is no such file")
        try:
            with safe_open(path, "pt", device="cpu") as file:
                about = cast("dict[str, str]", file.metadata() or {})
                if about.get("format") != FORMAT:
                    raise DataError(f"{path}: it is not an embedding; expected a file written by Embedding.save")
                names: list[str] = list(file.keys())  # pyright: ignore[reportUnknownArgumentType] - not annotated
                tensors = {name: cast(Tensor, file.get_tensor(name)) for name in names}
            placement = _placement(json.loads(about["placement"]))
            input_size = _size(json.loads(about["input_size"]))
            system = about["system"]
        except DataError:
            raise
        except Exception as error:  # safetensors raises its own class for damaged files
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise DataError(f"{path}: it cannot be read as an embedding ({reason}); save it again") from None
        expected = {"image", *(f"finer.{number}" for number in range(len(tensors) - 1))}
        if tensors.keys() != expected:
            given = ", ".join(sorted(tensors)[:4]) or "none"
            raise DataError(
                f"{path}: an embedding must have the tensors image, finer.0, ..., got {given}; save it again"
            )
        if any(value.ndim != 3 or not value.is_floating_point() for value in tensors.values()):
            raise DataError(f"{path}: an embedding must have floating point tensors of three axes; save it again")
        return cls(_moved(tensors, device), placement, input_size, system)


def _moved(
    tensors: Mapping[str, Tensor], device: torch.device | str | None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The tensors on a device."""
    try:
        return {name: value.to(device, dtype) for name, value in tensors.items()}
    except (RuntimeError, AssertionError) as error:  # torch raises one or the other where a device is missing
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UsageError(f"the embedding cannot be moved to {device!s} ({reason})") from None


def _placement(values: Any) -> Placement:
    """The placement that `save` has described."""
    (h, w), (rows, columns) = values["image_size"], values["size"]
    (sx, sy), (ox, oy) = values["scale"], values["offset"]
    numbers = [float(v) for v in (sx, sy, ox, oy)]
    if min(int(h), int(w), int(rows), int(columns)) < 1 or not all(abs(v) < 1e9 for v in numbers) or 0 in numbers[:2]:
        raise ValueError("its placement is invalid")
    return Placement(
        (int(h), int(w)), (int(rows), int(columns)), (numbers[0], numbers[1]), (numbers[2], numbers[3]),
        bool(values["mirrored"]),
    )  # fmt: skip


def _size(values: Any) -> tuple[int, int]:
    height, width = values
    if min(int(height), int(width)) < 1:
        raise ValueError("its input_size is invalid")
    return int(height), int(width)
