"""What every process of the tests needs, imported once by the server that they are forked from. Starts no thread."""

import contextlib
import importlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

for name in (
    # Of these torch imports the first two late: a second of every process.
    "torch._dynamo",
    "fsspec",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "flashoptim_native",
):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
