"""A dataset whose state is where the streams of its worker are."""

from typing import Any

from torch.utils.data import DataLoader, Dataset

from nemo_rng_dcp.worker_streams import WithWorkerStreams
from tests.support.streams import draw, unmoved


class AgainAndAgain(Dataset[Any]):
    """Each sample is drawn, and drawn again from the state before."""

    def __init__(self) -> None:
        self.streams = WithWorkerStreams(range(2))

    def __len__(self) -> int:
        return len(self.streams)

    def __getitem__(self, index: int) -> Any:
        state = self.streams.state_dict()
        drawn = draw(3)
        self.streams.load_state_dict(state)
        return self.streams[index], drawn, draw(3)


def test_the_streams_of_a_worker_go_on_where_they_were() -> None:
    samples = list(DataLoader(AgainAndAgain(), batch_size=None, num_workers=1))
    assert [index for index, *_ in samples] == [0, 1]
    assert all(again == drawn for _, drawn, again in samples)


def test_the_main_process_has_no_state() -> None:
    dataset = WithWorkerStreams([3, 1, 4])
    assert (len(dataset), dataset[2], dataset.state_dict()) == (3, 4, {})
    with unmoved():
        dataset.load_state_dict({})
