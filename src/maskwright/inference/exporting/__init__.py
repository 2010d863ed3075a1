"""Export to ONNX and OpenVINO, checked on an image before the file appears."""

from maskwright.inference.exporting.checking import Difference
from maskwright.inference.exporting.writing import Exported, export

__all__ = ["Difference", "Exported", "export"]
