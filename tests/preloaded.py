"""What the fork server of the tests imports, once, for all ranks and workers that it starts."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed looks for a GPU when it is imported

import timm  # noqa: F401

if os.environ.get("TRITON_INTERPRET") != "1":  # those tests have a fork server of their own and train nothing
    import deepspeed
    import deepspeed.runtime.zero.muon.muon_optimizer  # imports torch's whole compiler, in every ZeRO engine

    import trainer.pretrain  # noqa: F401

    # DeepSpeed imports its parts when they are first used.
    deepspeed.initialize  # noqa: B018
    deepspeed.ops.__compatible_ops__  # noqa: B018
