"""The recipe: what to run, as frozen pydantic models. Unknown keys are errors that name the nearest known one.

Keys of the engines keep upstream's own names and pass through verbatim: `[rollout.sglang]` is checked against the
installed SGLang, `[train.megatron]` by Megatron's own parser, both before a process starts.
"""

import copy
import difflib
import functools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_serializer, model_validator

from miles_core.errors import InputError

DEFAULT_DASHBOARD_PORT = 8265  # Ray's own


class Section(BaseModel):
    """A table of the recipe: immutable, no unknown keys, no guessing of types ("12" and true are no numbers)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class HookSpec(Section):
    """User code with its parameters: `"package.module:name"`, or `{ name = "package.module:name", key = value }`.

    Attributes:
        name: dotted module, colon, attribute; or the name of a built-in.
        params: the remaining keys of the table, given to the code as keyword arguments.
    """

    name: str
    params: Mapping[str, Any] = {}

    @model_serializer
    def _as_table(self) -> dict[str, Any]:
        return {"name": self.name, **self.params}  # what `_hook` reads, so that a dumped recipe can be run again

    @classmethod
    def of(cls, code: Any) -> Self:
        """The spec of an object in Python: a function, a class, or `functools.partial` of one with its parameters.

        The processes of a run import it by its name, so that it must be found there: no lambda, nothing inside a
        function, nothing of the script that runs.

        Raises:
            ValueError: another process could not import it.
        """
        params: dict[str, Any] = {}
        while isinstance(code, functools.partial):
            if code.args:
                raise ValueError(f"{code} binds positional arguments: bind parameters by their names")
            code, params = code.func, {**code.keywords, **params}
        module, name = getattr(code, "__module__", None), getattr(code, "__qualname__", "")
        if not name or module in (None, "__main__") or "<" in name:
            raise ValueError(f"{code!r} cannot be imported by other processes: put a function of that name in a module")
        return cls(name=f"{module}:{name}", params=params)


def _hook(value: Any) -> Any:
    if isinstance(value, str):
        return {"name": value}
    if callable(value):
        return HookSpec.of(value)
    if isinstance(value, dict) and "name" in value:
        table = cast("dict[str, Any]", value)
        return {"name": table["name"], "params": {key: item for key, item in table.items() if key != "name"}}
    return cast("Any", value)


Hook = Annotated[HookSpec, BeforeValidator(_hook)]


class ModelSection(Section):
    """`[model]`: a Hugging Face directory.

    Attributes:
        path: the directory.
        source: code that makes the directory at `path` when it is not there: `source(path, **params)`.
        family: "package.module:name" of a weight table and a Megatron spec from elsewhere
            (`miles_train.megatron.families.Family`); by default the trainer's own, by the class in config.json.
    """

    path: str
    source: Hook | None = None
    family: str | None = None


class DataSection(Section):
    """`[data]`: where prompts come from; exactly one of `prompts` and `source`.

    Attributes:
        prompts: a JSONL or Parquet file, one prompt a row.
        source: code that makes prompts: `source(seed=..., **params)` returns a DataSource.
        prompt_field: column of `prompts` that holds the text or the chat messages; the others become metadata.
        shuffle: new order every epoch, from the run's seed.
    """

    prompts: str | None = None
    source: Hook | None = None
    prompt_field: str = "prompt"
    shuffle: bool = True

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.prompts is None) == (self.source is None):
            raise ValueError("exactly one of data.prompts (a file) and data.source (code) must be given")
        return self


class RolloutSection(Section):
    """`[rollout]`: how samples are made.

    Attributes:
        prompts_per_step: groups of one step.
        group_size: samples of one prompt.
        max_new_tokens: most tokens that a response may have.
        temperature: of sampling; logprobs are compared at the same temperature. > 0.
        top_p: nucleus of sampling; below 1 rollout logprobs are not those of the full distribution.
        max_retries: how often a failed request is tried again before its group is dropped.
        deadline_s: seconds that one step's generation may take.
        request_deadline_s: seconds that one request may take.
        sglang: SGLang's own argument names, verbatim.
    """

    prompts_per_step: int = Field(32, gt=0)
    group_size: int = Field(8, gt=0)
    max_new_tokens: int = Field(256, gt=0)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_retries: int = Field(2, ge=0)
    deadline_s: float = Field(600.0, gt=0)
    request_deadline_s: float = Field(300.0, gt=0)
    sglang: Mapping[str, Any] = {}


class RewardSection(Section):
    """`[reward]`: where and how long a reward function may run.

    Attributes:
        isolate: run it in a pool of killable processes with limits; built-in rewards may do without.
        processes: size of that pool.
        timeout_s: wall-clock limit of one call.
        memory_bytes: memory limit of one process.
    """

    isolate: bool = True
    processes: int = Field(1, gt=0)
    timeout_s: float = Field(10.0, gt=0)
    memory_bytes: int = Field(1 << 30, ge=1 << 26)


class KLSection(Section):
    """`[algorithm.kl]`: what keeps the policy near a reference. It needs `ref_logprobs`.

    Attributes:
        estimator: "k1", "k2", "k3" or code.
        coef: weight in the loss, or in the reward.
        place: "loss" adds coef * KL to each token's loss; "reward" takes it from each token's reward.
        gradient: in a loss, whose gradient is taken: the estimator's "own", that of "k2", or that of the estimator
            weighed by "importance" (see miles_core.algorithms.losses.KLTerm).
    """

    estimator: Hook = HookSpec(name="k3")
    coef: float = Field(gt=0)
    place: Literal["loss", "reward"] = "loss"
    gradient: Literal["own", "k2", "importance"] = "own"


class AlgorithmSection(Section):
    """`[algorithm]`: what is learned from the samples.

        loss = product of corrections * loss + kl.coef * KL - entropy_coef * entropy, per token

    `miles hooks` lists the names of what comes with Miles.

    Attributes:
        advantage: "grpo", another name, or code; parameters beside its name.
        loss: "ppo_clip", another name, or code.
        corrections: of what engine and trainer disagree about: "tis", "mis", "icepop" or code, multiplied.
        kl: to a reference; none by default.
        entropy_coef: weight of the entropy bonus, in nats.
        reduction: how per-token losses become one number: the mean over all tokens of the step ("token_mean", DAPO),
            the mean over samples of the mean over their tokens ("sample_mean", GRPO's first paper), another name, or
            code.
        num_minibatches: optimizer updates per step.
    """

    advantage: Hook = HookSpec(name="grpo")
    loss: Hook = HookSpec(name="ppo_clip")
    corrections: Annotated[tuple[Hook, ...], Field(strict=False)] = ()
    kl: KLSection | None = None
    entropy_coef: float = Field(0.0, ge=0)
    reduction: Hook = HookSpec(name="token_mean")
    num_minibatches: int = Field(1, gt=0)


class TrainSection(Section):
    """`[train]`: how the policy is updated.

    Attributes:
        steps: turns of the loop.
        num_ranks: trainer processes.
        micro_batch_tokens: most tokens, padding included, in one forward pass of one rank.
        save_every: steps between checkpoints; 0 saves only at the end and when interrupted.
        keep_checkpoints: how many of the newest stay on disk.
        deadline_s: seconds that one training step may take.
        megatron: Megatron's own argument names, verbatim.
    """

    steps: int = Field(100, gt=0)
    num_ranks: int = Field(1, gt=0)
    micro_batch_tokens: int = Field(16384, gt=0)
    save_every: int = Field(50, ge=0)
    keep_checkpoints: int = Field(2, gt=0)
    deadline_s: float = Field(600.0, gt=0)
    megatron: Mapping[str, Any] = {}


class SyncSection(Section):
    """`[sync]`: how weights reach the engines.

    Attributes:
        transport: "auto" probes and says what it took; else the name of a transport of miles-sync.
        deadline_s: seconds that any stage of one push may take.
    """

    transport: Literal["auto", "shm", "gloo"] = "auto"
    deadline_s: float = Field(120.0, gt=0)


class ContractsSection(Section):
    """`[contracts]`: bounds above which the run stops.

    Attributes:
        max_logprob_gap: mean |trainer - engine| logprob allowed at step 0; by default 1e-3 in fp32 and 0.03 in bf16.
    """

    max_logprob_gap: float | None = Field(None, gt=0)


class ControlsSection(Section):
    """`[controls]`: experiments that must not learn.

    Attributes:
        shuffle_rewards: rewards are permuted among all samples of a step before advantages are computed.
        freeze_engine: pushes are skipped; the engine serves version 0 for ever.
    """

    shuffle_rewards: bool = False
    freeze_engine: bool = False


class ObserveSection(Section):
    """`[observe]`: what is written beside metrics.jsonl.

    Attributes:
        samples_every: steps between Parquet files of samples; 0 writes none.
        tensorboard: also write TensorBoard events (extra `miles-core[tensorboard]`).
        wandb: project name to log to (extra `miles-core[wandb]`), or empty.
    """

    samples_every: int = Field(10, ge=0)
    tensorboard: bool = False
    wandb: str = ""


class HooksSection(Section):
    """`[hooks]`: user code. `reward` or `group_reward` is required; the others are called where their names say.

    See miles_core.hooks and `miles hooks` for the signatures.
    """

    reward: Hook | None = None
    group_reward: Hook | None = None
    rollout: Hook | None = None
    generate: Hook | None = None
    filter_before_reward: Hook | None = None
    sample_filter: Hook | None = None
    metrics: Hook | None = None
    after_model_init: Hook | None = None
    before_logprobs: Hook | None = None
    before_train_step: Hook | None = None
    after_train_step: Hook | None = None
    after_step: Hook | None = None
    on_checkpoint: Hook | None = None

    @model_validator(mode="after")
    def _one_judge(self) -> Self:
        if (self.reward is None) == (self.group_reward is None):
            raise ValueError("exactly one of hooks.reward (judges a sample) and hooks.group_reward must be given")
        return self


class ClusterSection(Section):
    """`[cluster]`: the machines.

    Attributes:
        address: a running Ray cluster to join ("auto" or host:port); empty starts Ray on this machine.
        dashboard_port: port of Ray's dashboard on loopback; 0 leaves it out.
        start_deadline_s: seconds that all processes together may take to be ready.
    """

    address: str = ""
    dashboard_port: int = Field(DEFAULT_DASHBOARD_PORT, ge=0, le=65535)
    start_deadline_s: float = Field(300.0, gt=0)


class Recipe(Section):
    """A whole run.

    Attributes:
        name: of the run; its folder is `runs/<name>`.
        seed: every random choice derives from it.
        deterministic: prompts in fixed order and seeds from run seed, step, prompt and sample; the run can be repeated
            and resumed bit by bit. One trainer rank.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0)
    deterministic: bool = False
    model: ModelSection
    data: DataSection
    rollout: RolloutSection = RolloutSection()  # pyright: ignore[reportCallIssue]
    reward: RewardSection = RewardSection()  # pyright: ignore[reportCallIssue]
    algorithm: AlgorithmSection = AlgorithmSection()  # pyright: ignore[reportCallIssue]
    train: TrainSection = TrainSection()  # pyright: ignore[reportCallIssue]
    sync: SyncSection = SyncSection()  # pyright: ignore[reportCallIssue]
    contracts: ContractsSection = ContractsSection()  # pyright: ignore[reportCallIssue]
    controls: ControlsSection = ControlsSection()
    observe: ObserveSection = ObserveSection()  # pyright: ignore[reportCallIssue]
    hooks: HooksSection
    cluster: ClusterSection = ClusterSection()  # pyright: ignore[reportCallIssue]

    @model_validator(mode="after")
    def _one_rank_when_deterministic(self) -> Self:
        if self.deterministic and self.train.num_ranks != 1:
            raise ValueError(
                f"deterministic = true needs train.num_ranks = 1 (it is {self.train.num_ranks}): "
                "sums over several ranks depend on their timing"
            )
        return self


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe with its parent and apply overrides.

    Args:
        path: the TOML file. `extends = "other.toml"` names one parent, relative to it.
        overrides: `key.path=value` with values in TOML's spelling (bare words count as strings).

    Raises:
        InputError: the file cannot be read, or a key or value is wrong.
    """
    return override_recipe(_read_with_parent(path), overrides, str(path))


def override_recipe(table: Mapping[str, Any], overrides: Sequence[str], origin: str = "the defaults") -> Recipe:
    """Validate a recipe given as nested mappings, with overrides as `load_recipe` takes them.

    Raises:
        InputError: for the first wrong key or value; `origin` is named in it.
    """
    overridden = copy.deepcopy(dict(table))
    for override in overrides:
        _apply(overridden, override)
    return check_recipe(overridden, origin)


def check_recipe(table: Mapping[str, Any], origin: str) -> Recipe:
    """Validate a recipe given as nested mappings.

    Raises:
        InputError: for the first wrong key or value; `origin` is named in it.
    """
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        raise _input_error(error, origin) from None


def _read_with_parent(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path in children:
        raise InputError("extends", str(path), "a recipe cannot be its own ancestor", "Remove one `extends` line.")
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise InputError(
            "recipe", str(path), f"the file cannot be read ({error.strerror})", "Check the path."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError("recipe", str(path), f"not valid TOML ({error})", "Mend that line.") from None
    parent = table.pop("extends", None)
    if parent is None:
        return table
    if not isinstance(parent, str):
        raise InputError("extends", parent, "must be the path of one parent recipe", 'Write extends = "base.toml".')
    return _merge(_read_with_parent(path.parent / parent, (*children, path)), table)


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Tables merge key by key, everything else is replaced; a hook table with another name replaces its parent's."""
    merged = dict(base)
    for key, value in over.items():
        old, new = _table(merged.get(key)), _table(value)
        if old is not None and new is not None and new.get("name", old.get("name")) == old.get("name"):
            merged[key] = _merge(old, new)
        else:
            merged[key] = value
    return merged


def _table(value: Any) -> dict[str, Any] | None:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def _apply(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not equals or not all(path):
        raise InputError("--set", override, "must read key.path=value", "Write e.g. --set train.megatron.lr=2e-6.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for part in path[:-1]:
        child = table.setdefault(part, {})
        if isinstance(child, str):  # a hook written as a bare name
            child = table[part] = {"name": child}
        if not isinstance(child, dict):
            raise InputError("--set", override, f"{part} is a value, not a table", "Shorten the key.")
        table = cast("dict[str, Any]", child)
    table[path[-1]] = value


def _input_error(error: ValidationError, origin: str) -> InputError:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    setting = ".".join(location) or "recipe"
    if first["type"] == "extra_forbidden":
        known = list(_fields_at(location[:-1]))
        near = difflib.get_close_matches(location[-1], known, n=1)
        way_out = f"Did you mean {near[0]!r}?" if near else f"Known keys here: {', '.join(known)}."
        return InputError(setting, first["input"], f"unknown key in {origin}", way_out)
    if first["type"] == "missing":
        return InputError(setting, None, f"required, and missing in {origin}", "Add it.")
    rule = first["msg"].removeprefix("Value error, ")
    value = first["input"] if location else origin
    return InputError(setting, value, rule, f"Change it in {origin} or with --set.")


def _fields_at(location: Sequence[str]) -> Iterator[str]:
    model: Any = Recipe
    for part in location:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return
        model = annotation
    yield from model.model_fields
