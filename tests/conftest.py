"""What must be set before any test module is imported."""

import os

import torch

if not torch.cuda.is_available():
    # Triton reads it when it is imported: without a GPU its kernels run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
