"""The streams of a DataLoader worker, for loaders that store a state for each worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset, get_worker_info

from nemo_rng_dcp.generators import GeneratorSet


class WithWorkerStreams(Dataset[Any]):
    """A map-style dataset whose state is where the streams of its worker are.

    For torchdata's ``StatefulDataLoader``, which stores a state of the dataset for each worker and
    gives it back to the worker before its next batch: Python's, NumPy's and torch CPU's global
    generators then go on where they were. In the main process it has no state, since
    ``StatefulRNG`` stores that process's streams.

    Args:
        dataset: What makes the samples.

    Example:
        >>> dataset = WithWorkerStreams([3, 1, 4])
        >>> len(dataset), dataset[2], dataset.state_dict()
        (3, 4, {})
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index]

    def state_dict(self) -> dict[str, bytes]:
        """Return the packed streams by name; nothing in the main process."""
        if get_worker_info() is None:
            return {}
        generators = GeneratorSet(None)
        return generators.pack(generators.take())

    def load_state_dict(self, state_dict: Mapping[str, bytes]) -> None:
        """Put the streams back to where :meth:`state_dict` has them.

        Raises:
            RNGStateError: A generator would not take its state. No stream has moved.
        """
        generators = GeneratorSet(None)
        generators.restore(generators.unpack(state_dict))
