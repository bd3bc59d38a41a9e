"""What must be set before anything imports Triton: without a GPU its kernels are run as Python."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
