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
    "data_pipeline.read.token_file",
    "deepspeed",
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "encodings.idna",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.dist_checkpointing",
    "megatron.core.models.gpt",
    "transformers.modeling_utils",
    "launch.common",
    "model.attention.baselines",
    "model.attention.mhe",
    "model.decoder",
    "model.megatron.spec",
    "model.positions.alibi",
    "model.positions.learned",
    "model.positions.rotary",
    "pretrain.backends.deepspeed",
    "pretrain.backends.fsdp",
    "pretrain.backends.pipeline",
    "pretrain.inference",
    "pretrain.interop.export",
    "pretrain.objectives.next_token",
    "pretrain.optim.adamw",
    "pretrain.run",
    "tests.helpers",
    "torch.distributed.tensor.debug",
    "torch.profiler._cupti_monitor",
    "torch.testing._internal.composite_compliance",
)

gc.disable()  # importing leaves little garbage, and looking for it takes seconds
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for name in MODULES:
        with suppress(Exception):
            importlib.import_module(name)

sys.modules["torch"].set_num_threads(1)
sys.stdout.flush()
sys.stderr.flush()
gc.freeze()  # else the first collection in a rank would copy every page
gc.enable()
