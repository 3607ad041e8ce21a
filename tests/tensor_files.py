"""Files of tensors that tests write."""

import numpy as np
import safetensors.numpy


def safetensors_file(path, arrays, **changed):
    """A safetensors file, some tensors changed or (None) left out."""
    arrays = {**arrays, **{name.replace("__", "."): value for name, value in changed.items()}}
    safetensors.numpy.save_file({name: np.ascontiguousarray(value)
                                 for name, value in arrays.items() if value is not None}, path)
    return path
