"""Domains of Fashion-MNIST: what a domain does, who is in a batch, which domain is never trained on, resuming."""

import struct

import pytest
import torch
import torch.nn.functional as F

from lightning_lossplug import LossplugError
from lightning_lossplug.integrations import DomainShiftData
from lightning_lossplug.integrations.data.domains import DOMAINS, to_domain


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Squares and bars of ten sizes, in the files of Fashion-MNIST."""
    folder = tmp_path_factory.mktemp("idx")
    for part, n in (("train", 400), ("t10k", 80)):
        y = torch.arange(n) % 10
        x = torch.zeros(n, 28, 28, dtype=torch.uint8)
        for i in range(n):
            x[i, 10:18, 8 : 12 + y[i]] = 200
        header = struct.pack(">4B3I", 0, 0, 8, 3, n, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + x.numpy().tobytes())
        header = struct.pack(">4BI", 0, 0, 8, 1, n)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(header + y.to(torch.uint8).numpy().tobytes())
    return str(folder)


def image():
    x = torch.zeros(3, 28, 28, dtype=torch.uint8)
    x[:, 10:18, 6:20] = 200
    return x


def test_what_a_domain_does():
    x, index = image(), torch.arange(3)
    assert torch.equal(to_domain(to_domain(x, "inversion", index), "inversion", index), x)
    blurred = to_domain(x, "blur", index)
    assert 0 < int(blurred[0, 8, 12]) < int(blurred[0, 14, 12])
    assert blurred.float().sum() == pytest.approx(x.float().sum().item(), rel=0.02)
    turned = to_domain(x, "rotation", index)
    assert turned.float().sum() == pytest.approx(x.float().sum().item(), rel=0.1)
    assert not torch.equal(turned[0], turned[1])
    behind = to_domain(x, "background", index)
    assert (behind >= x).all()
    assert behind[x == 0].float().mean() > 40
    for domain in DOMAINS:
        assert torch.equal(to_domain(x[1:2], domain, index[1:2]), to_domain(x, domain, index)[1:2])
        assert to_domain(x, domain, index).dtype == torch.uint8
    with pytest.raises(LossplugError, match=r"there is no domain 'blurr'\. Did you mean"):
        to_domain(x, "blurr", index)


def test_domains_come_closer_with_less_strength():
    x, index = image(), torch.arange(3)
    x[:, 12, 12] = 60
    half = to_domain(x, "inversion", index, strength=0.5)
    assert torch.equal(half, torch.where(x > 127, 255 - x, x))  # bright pixels alone
    for domain in ("rotation", "background", "blur"):
        near, far = ((to_domain(x, domain, index, strength=s).float() - x.float()).square().mean() for s in (0.3, 1.0))
        assert 0 < near < 0.8 * far, domain
    for wrong in (0.0, 1.5):
        with pytest.raises(LossplugError, match=r"strength is .*, allowed is above 0 to 1"):
            DomainShiftData("blur", strength=wrong)


def test_batches_are_balanced_and_the_held_out_domain_is_the_test(root):
    data = DomainShiftData("inversion", root, batch_size=12, val_split=40)
    data.setup("fit")
    assert data.sources == ["rotation", "background", "blur"]
    for part in data.balanced.parts:
        assert part.labels.bincount(minlength=10).tolist() == [9] * 10  # every domain has every class
    assert data.val_set.labels.bincount(minlength=10).min() >= 1
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == 90 // 4
    for x, y in batches:
        assert x.shape == (12, 1, 28, 28)
        assert y.shape == (12,)
    means = torch.stack([x.reshape(3, 4, -1).mean((1, 2)) for x, _ in batches]).mean(0)
    assert means[1] > means[0] + 0.2  # the second third of a batch has the backgrounds
    assert means[1] > means[2] + 0.2
    loader.sampler.set_epoch(1)
    again = list(loader)
    assert not torch.equal(batches[0][0], again[0][0])  # another epoch, another order
    fresh = DomainShiftData("inversion", root, batch_size=12, val_split=40)
    fresh.setup("fit")
    assert torch.equal(next(iter(fresh.train_dataloader()))[0], batches[0][0])
    x, y = next(iter(data.test_dataloader()))
    assert x[:, :, 0, 0].mean() > 1.5  # white corners
    assert len(data.test_set) == 80
    assert len(data.val_set) == 30
    assert data.hparams["held_out"] == "inversion"


def test_bad_settings(root):
    with pytest.raises(LossplugError, match="batch_size is 32, 3 domains share a batch"):
        DomainShiftData("blur", root, batch_size=32)
    with pytest.raises(LossplugError, match="there is no domain 'noise'"):
        DomainShiftData("noise", root)


def test_a_run_resumes_in_mid_epoch(root):
    def loader():
        data = DomainShiftData("blur", root, batch_size=30, val_split=40, seed=3)
        data.setup("fit")
        return data.train_dataloader()

    whole = [x for x, _ in loader()]
    first = loader()
    taken = [x for _, (x, _) in zip(range(4), first, strict=False)]
    second = loader()
    second.load_state_dict(first.state_dict())
    rest = [x for x, _ in second]
    assert F.mse_loss(torch.cat(taken + rest)[: 30 * 4], torch.cat(whole)[: 30 * 4]) == 0
    assert len(taken) + len(rest) in (len(whole), len(whole) + 1)  # the last one handed out may be repeated
    assert torch.equal(rest[-1], whole[-1])
