"""The random states that ExactResume keeps: complete, and loadable with weights_only."""

import io
import random

import numpy as np
import pytest
import torch

from lightning_lossplug.callbacks.exact_resume import random_state, set_random_state

CPU = torch.device("cpu")


def draw():
    return (
        [random.random(), random.gauss(0, 1)],
        np.random.rand(3).tolist() + np.random.randn(1).tolist(),
        torch.rand(3).tolist() + torch.randn(3).tolist(),
    )


@pytest.mark.parametrize("draws_before", [0, 1])
def test_state_goes_through_a_file_and_back(draws_before):
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    for _ in range(draws_before):  # an odd number of normal draws leaves one in the caches of Python and NumPy
        draw()
    buffer = io.BytesIO()
    torch.save(random_state(CPU), buffer)
    expected = draw()
    random.seed(7)
    np.random.seed(8)
    torch.manual_seed(9)
    assert draw() != expected
    buffer.seek(0)
    set_random_state(torch.load(buffer, weights_only=True), CPU)
    assert draw() == expected
