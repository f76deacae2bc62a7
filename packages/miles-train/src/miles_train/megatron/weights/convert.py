"""Fill a Megatron model from a Hugging Face directory, and read it back out under the directory's names."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from miles_core.errors import InputError
from miles_train.megatron.weights.table import Row, WeightTable
from miles_train.model_dir import ModelDirectory


@torch.no_grad()
def load_weights(model: nn.Module, table: WeightTable, directory: ModelDirectory) -> None:
    """Copy every tensor of the directory into its parameter, in the parameter's dtype.

    Tensors are read one row at a time; padding of the vocabulary becomes zero.

    Args:
        model: a Megatron model, unwrapped; tensor parallel size 1.
        table: of the same architecture, checked against the directory.
        directory: where the weights lie.

    Raises:
        InputError: the model's parameters are not those of the table, or a tied tensor is stored and differs.
    """
    parameters = dict(model.named_parameters())
    table.check_model(parameters)
    with directory.reader() as read:
        for row in table.expand():
            parameter = parameters[row.megatron]
            joined = row.fusion.join([read(name) for name in row.hf])
            if row.padded:
                parameter[len(joined) :] = 0
            parameter[: len(joined)].copy_(joined)
        for name, original in stored_ties(table, directory).items():
            if not torch.equal(read(name), read(original)):
                raise InputError(
                    f"{name} in {directory.path}",
                    f"differs from {original}",
                    "tie_word_embeddings = true makes them one tensor",
                    'Set "tie_word_embeddings": false in config.json to train both.',
                )


def hf_weights(
    parameters: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], table: WeightTable, ties: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield every Hugging Face tensor with its name.

    Args:
        parameters: of a Megatron model, unwrapped, by name; tensor parallel size 1.
        table: of the same architecture.
        ties: repeated tensors to yield as well, name to original (see `stored_ties`).

    Yields:
        Name and tensor, on the parameters' device and in their dtype. Many are views of the parameters: copy what must
        outlive the next update.
    """
    parameters = dict(parameters)
    repeated = {original: name for name, original in ties.items()}
    for row in table.expand():
        for name, tensor in zip(row.hf, _parts(row, parameters[row.megatron].detach()), strict=True):
            yield name, tensor
            if name in repeated:
                yield repeated[name], tensor


def stored_ties(table: WeightTable, directory: ModelDirectory) -> dict[str, str]:
    """The tied names that the directory stores all the same, name to original."""
    return {name: original for name, original in table.tied.items() if name in directory.tensors}


def _parts(row: Row, parameter: Tensor) -> list[Tensor]:
    if row.padded:
        parameter = parameter[: sum(shape[0] for shape in row.shapes)]
    return row.fusion.split(parameter)
