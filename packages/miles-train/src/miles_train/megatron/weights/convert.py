"""Fill a Megatron model from a Hugging Face directory, and read it back out under the directory's names."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from miles_core.errors import InputError
from miles_train.megatron.weights.table import Region, Row, WeightTable
from miles_train.model_dir import ModelDirectory


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What of a model lies in a checkpoint: parameters and persistent buffers (a router's expert bias) by name."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                tensors[name] = buffer
    return tensors


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
    tensors = model_tensors(model)
    table.check_model(tensors)
    with directory.reader() as read:
        for row in table.expand():
            parameter = tensors[row.megatron]
            joined = row.fusion.join([_box(read(region.name), region) for region in row.regions()])
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
        parameters: of a Megatron model, unwrapped, by name (`model_tensors`); tensor parallel size 1.
        table: of the same architecture.
        ties: repeated tensors to yield as well, name to original (see `stored_ties`).

    Yields:
        Name and tensor, on the parameters' device and in their dtype. Many are views of the parameters: copy what must
        outlive the next update.
    """
    parameters = dict(parameters)
    repeated = {original: name for name, original in ties.items()}
    unfinished: dict[str, tuple[Tensor, int]] = {}
    for row in table.expand():
        for region, part in zip(row.regions(), _parts(row, parameters[row.megatron].detach()), strict=True):
            tensor = _collect(region, part, unfinished)
            if tensor is None:
                continue
            yield region.name, tensor
            if region.name in repeated:
                yield repeated[region.name], tensor


def stored_ties(table: WeightTable, directory: ModelDirectory) -> dict[str, str]:
    """The tied names that the directory stores all the same, name to original."""
    return {name: original for name, original in table.tied.items() if name in directory.tensors}


def _parts(row: Row, parameter: Tensor) -> list[Tensor]:
    if row.padded:
        parameter = parameter[: sum(shape[0] for shape in row.shapes)]
    return row.fusion.split(parameter)


def _box(tensor: Tensor, region: Region) -> Tensor:
    """The region of its tensor, as a part."""
    for dim, (start, size) in enumerate(zip(region.start, region.size, strict=True)):
        tensor = tensor.narrow(dim, start, size)
    return tensor[0] if region.is_stacked else tensor


def _collect(region: Region, part: Tensor, unfinished: dict[str, tuple[Tensor, int]]) -> Tensor | None:
    """The whole tensor once its last part has come."""
    if region.size == region.shape and not region.is_stacked:
        return part
    if region.name not in unfinished:
        unfinished[region.name] = (part.new_empty(region.shape), 0)
    whole, filled = unfinished.pop(region.name)
    _box(whole, region).copy_(part)
    filled += part.numel()
    if filled == whole.numel():
        return whole
    unfinished[region.name] = (whole, filled)
    return None
