"""The rounding of this device: gradients of Myrtle5 in every precision against float64. Nothing is timed."""

import jax
import pytest

from .precision import gradient_errors
from .report import Row

pytestmark = pytest.mark.usefixtures("quick_compilation")

PRECISIONS = {
    "float32, exact products": (None, "float32"),
    "float32": (None, None),  # on a GPU with products in TF32
    "bfloat16": ("bfloat16", None),
}


@pytest.mark.parametrize("width", [64, 16])
def test_gradients(record, width: int):
    if not record.full and width == 64:
        pytest.skip("one width is enough on small problems")
    width, size = (width, 32) if record.full else (width // 4, 8)
    case = f"64 x {size} x {size} images, width {width}"
    subject = f"Gradients of Myrtle5 on {jax.devices()[0].device_kind}, relative errors"
    rows = record(
        lambda: [
            Row(subject, case, name, errors=gradient_errors(width, size, *precision))
            for name, precision in PRECISIONS.items()
        ]
    )
    assert all(max(row.errors.values()) < 0.03 for row in rows)
    assert max(rows[0].errors.values()) < 1e-4
