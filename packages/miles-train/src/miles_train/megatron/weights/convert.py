"""Read a Megatron model back out under the names of its Hugging Face directory."""

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from miles_train.megatron.weights.table import Region, Row, WeightTable


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What of a model lies in a checkpoint: parameters and persistent buffers (a router's expert bias) by name."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                tensors[name] = buffer
    return tensors


def hf_weights(
    parameters: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], table: WeightTable, ties: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield every Hugging Face tensor with its name.

    Args:
        parameters: of a Megatron model, unwrapped, by name (`names.global_tensors`); tensor parallel size 1.
        table: of the same architecture.
        ties: repeated tensors to yield as well, name to original (see `stored_ties`).

    Yields:
        Name and tensor, on the parameters' device and in their dtype. Many are views of the parameters: copy what must
        outlive the next update.
    """
    parameters = dict(parameters)
    repeated: dict[str, list[str]] = {}
    for name, original in ties.items():
        repeated.setdefault(original, []).append(name)
    unfinished: dict[str, tuple[Tensor, int]] = {}
    for row in table.expand():
        for region, part in zip(row.regions(), _parts(row, parameters[row.megatron].detach()), strict=True):
            tensor = _collect(region, part, unfinished)
            if tensor is None:
                continue
            yield region.name, tensor
            for name in repeated.get(region.name, ()):
                yield name, tensor


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
