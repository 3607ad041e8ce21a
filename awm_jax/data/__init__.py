"""Data sets as arrays: TFDS underneath, cached after the first preparation."""

from awm_jax.data.dataset import FOLDER, NAMES, Dataset, cache_directory, flips, load, num_classes

__all__ = ["FOLDER", "NAMES", "Dataset", "cache_directory", "flips", "load", "num_classes"]
