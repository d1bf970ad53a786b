"""What ranks forked for tests find imported: the fork server of tests/ranks.py imports this module once.

It starts no thread and touches no process group, so that it can be forked. A module that cannot be imported is left to the rank
that wants it: the error is then a test's.
"""

import gc
import importlib
import sys
import warnings
from contextlib import suppress

MODULES = (
    "torch",
    "deepspeed",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.dist_checkpointing",
    "megatron.core.models.gpt",
    "transformers.modeling_utils",
    "launch.common",
    "model.megatron.spec",
    "pretrain.backends.deepspeed",
    "pretrain.backends.fsdp",
    "pretrain.backends.pipeline",
    "pretrain.inference",
    "pretrain.interop.export",
    "pretrain.run",
    "tests.helpers",
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for name in MODULES:
        with suppress(Exception):
            importlib.import_module(name)

sys.modules["torch"].set_num_threads(1)
sys.stdout.flush()
sys.stderr.flush()
gc.collect()
gc.freeze()  # else the first collection in a rank would copy every page
