"""What the fork server of the tests imports, once, for all ranks and workers that it starts."""

import os

import models.adco  # noqa: F401

if os.environ.get("TRITON_INTERPRET") != "1":  # those tests have a fork server of their own and train nothing
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed looks for a GPU when it is imported

    import deepspeed
    import deepspeed.runtime.zero.muon.muon_optimizer  # imports the compiler, as every ZeRO engine does
    import timm  # noqa: F401

    import trainer.pretrain  # noqa: F401

    # DeepSpeed imports its parts when they are first used.
    deepspeed.initialize  # noqa: B018
    deepspeed.ops.__compatible_ops__  # noqa: B018
