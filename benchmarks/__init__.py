"""Commands that measure: each prints a table and, with --json, writes its figures with the machine they come from."""

import os

# torch's imports ask whether there is a device; asked so, processes that are forked later can still use it
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
