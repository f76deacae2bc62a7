"""Text to ids and back, for prompts and for reading responses; nothing that was generated is ever tokenised again.

Reads the `tokenizers` file of a Hugging Face directory itself: `transformers.AutoTokenizer` says the same and takes
nine seconds to import. Transformers' template renderer is imported when the first chat prompt comes.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as FastTokenizer

from miles_core.errors import InputError

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """The tokenizer of a model directory."""

    def __init__(self, model_path: str):
        """Read tokenizer.json, the chat template and the stop tokens.

        Raises:
            InputError: the directory has no tokenizer.json.
        """
        folder = Path(model_path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise InputError(
                "model.path",
                model_path,
                "must hold tokenizer.json",
                "Write one: AutoTokenizer.from_pretrained(PATH).save_pretrained(PATH).",
            )
        self._path = model_path
        self._tokenizer = FastTokenizer.from_file(str(file))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        config = _read_json(folder / "tokenizer_config.json")
        self._special = {name: _token_text(config[name]) for name in _SPECIAL if config.get(name)}
        template = folder / "chat_template.jinja"
        self._template: str | None = template.read_text() if template.is_file() else config.get("chat_template")
        self.stop_token_ids = self._find_stop_tokens(folder)
        """Ids that end a response, from generation_config.json, config.json and the tokenizer's eos_token."""

    def encode(self, content: str | Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a prompt: plain text, or chat messages through the chat template with the assistant's turn opened.

        Raises:
            InputError: chat messages and no chat template, or a prompt of no tokens.
        """
        if isinstance(content, str):
            ids = self._tokenizer.encode(content).ids
        else:
            # The template writes special tokens itself.
            ids = self._tokenizer.encode(self.render(content), add_special_tokens=False).ids
        if not ids:
            raise InputError("prompt", content, "must have at least one token", "Mend or remove that row.")
        return ids

    def encode_more(self, text: str) -> list[int]:
        """The ids of text that goes on after other tokens: nothing is put before or after it."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def token_id(self, text: str) -> int | None:
        """The id of the one token that `text` is, or None."""
        return self._tokenizer.token_to_id(text)

    def decode(self, ids: NDArray[np.int32]) -> str:
        """The text of `ids`, special tokens included: what a reward may not see, a model may hide things behind."""
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """The text of a conversation, by the model's chat template in Jinja's sandbox.

        Args:
            messages: of the conversation.
            tools: JSON schemas of what the model may call, for templates that show them.
            add_generation_prompt: open the assistant's turn at the end.
            variables: of the template's own, e.g. {"enable_thinking": False}.

        Raises:
            InputError: there is no chat template, or it refuses these messages.
        """
        # Takes a second and a half, and plain-text prompts do not need it.
        from jinja2 import TemplateError  # noqa: PLC0415
        from transformers.utils.chat_template_utils import render_jinja_template  # noqa: PLC0415

        if self._template is None:
            raise InputError(
                "data.prompts", "chat messages", f"the model at {self._path} has no chat template", "Give plain text."
            )
        try:
            texts, _ = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                chat_template=self._template,
                tools=None if tools is None else [dict(tool) for tool in tools],
                add_generation_prompt=add_generation_prompt,
                **{**self._special, **variables},  # names the template may use
            )
        except TemplateError as error:
            raise InputError(
                "messages",
                [message.get("role") for message in messages],
                f"the chat template of {self._path} refuses them: {error}",
                "Change the messages, or put another chat_template.jinja beside the model.",
            ) from error
        return texts[0]

    def _find_stop_tokens(self, folder: Path) -> tuple[int, ...]:
        found: set[int] = set()
        for name in ("generation_config.json", "config.json"):
            eos = _read_json(folder / name).get("eos_token_id")
            found.update([eos] if isinstance(eos, int) else eos or [])
        if "eos_token" in self._special:
            eos = self._tokenizer.token_to_id(self._special["eos_token"])
            found.update([] if eos is None else [eos])
        return tuple(sorted(found))


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _token_text(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]
