"""What several tests share."""
import pytest
import torch

import data


@pytest.fixture(scope="session")
def leaves(tmp_path_factory):
    """Data folder with the generated images' cache."""
    folder = str(tmp_path_factory.mktemp("data"))
    for split, number in (("train", 40), ("train", 2048), ("val", 64), ("val", 1000)):
        data.load("deadleaves", split, folder, num_images=number)
    return folder


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
