"""What all tests share."""

import torch

torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it does, much more on a busy machine
