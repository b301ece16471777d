"""The table of dtypes agrees with torch, and bits make the tensor that they came from."""

import numpy as np
import pytest
import torch

from lewis.models.dtypes import DTYPES, EIGHT_BIT_FLOATS, as_tensor, bits_dtype, bytes_of, size_of, torch_dtype


@pytest.mark.parametrize("name", sorted(DTYPES.keys() - set(EIGHT_BIT_FLOATS)))
def test_a_dtype_is_as_torch_has_it(name: str) -> None:
    kind = torch_dtype(name)
    assert (kind.itemsize, kind.is_floating_point) == (DTYPES[name].size, DTYPES[name].floating)
    tensor = torch.arange(-3, 3).to(kind)
    assert size_of(name, (2, 3)) == len(bytes_of(tensor)) == bits_dtype(name).itemsize * 6
    again = as_tensor(name, np.frombuffer(bytes_of(tensor), bits_dtype(name)).copy())
    assert again.dtype == kind and torch.equal(again, tensor)
