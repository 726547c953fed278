"""What all tests share."""

import torch
import torchvision_ops  # noqa: F401  # before transformers, which imports torchvision where it is installed

torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it does, much more on a busy machine
