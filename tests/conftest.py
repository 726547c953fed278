"""What all tests share."""

from collections.abc import Iterator

import pytest
import torch
import torchvision_ops  # noqa: F401  # before transformers, which imports torchvision where it is installed

from stompp_hf import kernels

torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it does, much more on a busy machine


@pytest.fixture
def plain_torch() -> Iterator[None]:
    """Packed layers compute in plain torch, also where the compiled part is there."""
    kernels.use("torch")
    yield
    kernels.use()
