"""What ExactResume keeps: random states, complete and loadable with weights_only, and the count of epochs."""

import io
import random

import numpy as np
import pytest
import torch
from callback_runs import OrderedLoader, Plain, assert_equal, make_trainer, state_of
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lossplug.callbacks import ExactResume
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


def test_a_run_resumed_at_the_end_of_every_epoch_trains_no_epoch_twice(tmp_path):
    def run(folder, epochs, resume=None):
        torch.manual_seed(0)
        module = Plain(dropout=0.1)
        saver = ModelCheckpoint(tmp_path / folder, filename="{step}", save_top_k=-1, every_n_train_steps=4)
        callbacks = [saver, ExactResume()]
        trainer = make_trainer(max_epochs=epochs, enable_checkpointing=True, callbacks=callbacks)
        trainer.fit(module, OrderedLoader(), ckpt_path=resume)
        return trainer.global_step, state_of(module)

    steps, straight = run("a", 3)
    run("b", 3, tmp_path / "a" / "step=8.ckpt")
    for step in (12, 16, 20, 24):
        again, state = run(f"c{step}", 3, tmp_path / "b" / f"step={step}.ckpt")
        assert again == steps == 24
        assert_equal(state, straight)
