"""The rows of layers for multi-token prediction, as DeepSeek-V3 and GLM-4.5 store them: behind the decoder's layers.

Each has an embedding and an output head stored with it, copies of the model's own.
"""

from collections.abc import Callable, Sequence

from miles_core.errors import InputError
from miles_train.megatron.weights.table import Row


def more_rows(
    layers: Sequence[int], hidden: int, decoder_rows: Callable[[str, str], list[Row]], prefix: str = ""
) -> list[Row]:
    """Rows of the layers, which are to be trained.

    Args:
        layers: their numbers as stored.
        hidden: width of the residual stream.
        decoder_rows: rows of the decoder layer inside one, by the prefixes of Hugging Face's and Megatron's names.
        prefix: before Hugging Face's names.

    Raises:
        InputError: there are none.
    """
    if not layers:
        raise InputError(
            "train.megatron.mtp_loss_scaling_factor",
            "set",
            "the model has no layers for multi-token prediction (num_nextn_predict_layers = 0)",
            "Remove the key.",
        )
    rows: list[Row] = []
    names = {"enorm": "enorm", "hnorm": "hnorm", "shared_head.norm": "final_layernorm"}
    for number, layer in enumerate(layers):
        hf, megatron = f"{prefix}model.layers.{layer}.", f"mtp.layers.{number}."
        rows += [Row((f"{hf}{a}.weight",), ((hidden,),), f"{megatron}{b}.weight") for a, b in names.items()]
        rows.append(Row((hf + "eh_proj.weight",), ((hidden, 2 * hidden),), megatron + "eh_proj.weight", shard_dim=0))
        rows += decoder_rows(hf, megatron + "mtp_model_layer.")
    return rows


def more_ties(layers: Sequence[int], embedding: str, head: str, prefix: str = "") -> dict[str, str]:
    """The copies stored with the layers, name to original.

    Args:
        layers: their numbers as stored.
        embedding: name of the model's embedding.
        head: name of its output head; that of the embedding where the two are tied.
        prefix: before Hugging Face's names.
    """
    ties = {f"{prefix}model.layers.{layer}.embed_tokens.weight": embedding for layer in layers}
    return ties | {f"{prefix}model.layers.{layer}.shared_head.head.weight": head for layer in layers}
