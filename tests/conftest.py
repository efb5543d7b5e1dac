"""Triton kernels run in the interpreter where there is no GPU, and signals have their defaults."""

import os
import signal

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:  # as a shell or nohup starts what runs in the background
        signal.signal(number, handler)
