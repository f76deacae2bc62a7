"""Low-rank adapters (LoRA) on plain torch linears, with PEFT directories in and out.

`attach` gives linears a low-rank path, `merge` folds it into the weights and `unmerge` takes it out again to the bit,
`save_peft` and `load_peft` exchange adapters with the peft library and with engines.
"""

from miles_lora.config import LoraConfig
from miles_lora.errors import LoraError
from miles_lora.layer import LoraLinear
from miles_lora.model import (
    adapter_config,
    adapter_state,
    attach,
    detach,
    load_adapter_state,
    mark_trainable,
    merge,
    unmerge,
)
from miles_lora.peft_directory import load_peft, save_peft

__all__ = [  # noqa: RUF022 (grouped by subject)
    # what an adapter is
    "LoraConfig",
    "LoraLinear",
    "LoraError",
    # on a model and off again
    "attach",
    "detach",
    "mark_trainable",
    "merge",
    "unmerge",
    # its tensors
    "adapter_config",
    "adapter_state",
    "load_adapter_state",
    # as PEFT directories
    "load_peft",
    "save_peft",
]
