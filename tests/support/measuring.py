"""What importance measures of one model on one calibration set, and which layers it covers."""

from pathlib import Path

from lewis.importance.calibration import Calibration
from lewis.importance.measure import Shapes, measure_sets, network_in
from lewis.importance.measured import Measured
from lewis.models.model import Model
from lewis.models.network.module_tree import Layer
from lewis.progress import Report, silent
from lewis.recipe.schema import Importance


def measure(
    model: Model, calibration: Calibration, settings: Importance | None = None, *, progress: Report = silent
) -> Measured:
    """Norms and moments of one set."""
    [measured] = measure_sets(model, [calibration], settings, progress=progress)
    return measured


def covered_layers(folder: Path, tensors: Shapes | None = None) -> list[Layer]:
    """The covered layers of a model, by its config and the shapes of its tensors."""
    return [layer for covered in network_in(folder, tensors).covered for layer in covered.layers]
