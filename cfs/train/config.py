"""Everything a training run can be told, flat; the command line is made from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cfs.assets import TINYWORLD_DIR
from cfs.baselines import METHODS
from cfs.cli import option
from cfs.data import tinyworld
from cfs.data.formats import FORMATS
from cfs.errors import UserError
from cfs.model.attention import TRAINING_ATTENTION_HELP
from cfs.train.method_options import MethodOptions

LARGEST_BATCH = 2**17
"""Examples of a step, of which every rank makes a list."""

AT_LEAST_ONE = (
    "batch_size",
    "steps",
    "kl_every",
    "micro_batch_tokens",
    "save_every",
    "keep",
    "stop_after",
    "shard_ranks",
    "plan_ranks",
)

# What a field that the user left out becomes. The paper's setting for real checkpoints (section
# 3, appendix B); a small model on a small world wants larger steps and shorter texts.
CHECKPOINT_DEFAULTS: dict[str, Any] = {
    "lr": 5e-6,
    "epochs": 2.0,
    "max_length": 512,
    "batch_size": 128,
    "beta2": 0.999,
    "micro_batch_tokens": 16384,
    "optimizer": "adamw8bit",
}
TINYWORLD_DEFAULTS: dict[str, Any] = CHECKPOINT_DEFAULTS | {
    "lr": 1e-3,
    "epochs": None,
    "steps": 400,
    "batch_size": 32,  # many small steps: at 128 a minute of CPU is too few to learn anything
    "max_length": 128,
    "micro_batch_tokens": 1024,  # what fits a CPU's cache
    "optimizer": "adamw",
}
PRETRAIN_DEFAULTS: dict[str, Any] = TINYWORLD_DEFAULTS | {
    "lr": 2e-3,
    "steps": 7000,
    "batch_size": 64,
    "beta2": 0.95,
}


def _depends(name: str, meaning: str) -> Any:
    """A field that `resolved` fills in; its help names what with."""
    absent = {"steps": "by --epochs", "epochs": "by --steps"}.get(name)
    checkpoint, world, pretrain = (
        table.get(name) or absent
        for table in (CHECKPOINT_DEFAULTS, TINYWORLD_DEFAULTS, PRETRAIN_DEFAULTS)
    )
    said = f"{checkpoint}; TinyWorld {world}, its pretraining {pretrain}"
    return option(None, f"{meaning} [{checkpoint if checkpoint == world == pretrain else said}]")


@dataclass(frozen=True)
class TrainConfig(MethodOptions):
    """Flags of `train.py`, in kebab-case there; those of the methods are in `cfs/baselines/`.

    A field that defaults to None though its type has no None depends on the model, the data, the
    device or the method: `resolved` and `counted` put it in place before anything else reads it.
    """

    method: str = option(
        "cfs", "training method, or several joined by '+' (--list-methods): " + ", ".join(METHODS)
    )
    list_methods: bool = option(False, "print the methods with a line on each, and stop")
    model: str = option(None, "model directory or hub name; default: embedded TinyWorld")
    data: str | None = option(None, "fine-tuning data, JSONL or parquet; default: TinyWorld's")
    format: str | None = option(None, "of --data, and needed with it: " + ", ".join(FORMATS))
    interleave: list[str] | None = option(  # noqa: RUF009 (it makes a field)
        None, "several task files instead of --data, and their shares", "FILE:FORMAT=WEIGHT"
    )
    skill: str = option(
        tinyworld.NEW_SKILL,
        "what TinyWorld's task teaches: " + ", ".join(tinyworld.NEW_SKILLS),
    )
    score_skills: list[str] | None = option(  # noqa: RUF009
        None, "further new skills of TinyWorld to score, beside the old ones and --skill", "NAME"
    )
    stages: list[str] | None = option(  # noqa: RUF009
        None, "YAML files of flags, one a task: fine-tune on each in turn", "FILE"
    )
    tuned: list[str] | None = option(  # noqa: RUF009
        None,
        "models that fine-tuning gave, for the methods that need one; default: trained first",
        "DIR",
    )
    out: str | None = option(None, "run directory; default: the next free one under runs/")
    resume: bool = option(False, "go on with the run in --out, or begin it there")

    synthetic: str | None = option(None, "corpus from generate.py; default: drawn and cached")
    corpora: str = option("runs/corpora", "where drawn corpora are kept and found again")
    synthetic_ratio: float = option(1.0, "examples mixed in per task example (Table 4)")
    temperature: float = option(
        None, "sampling temperature of what is mixed in [cfs 1.0, cs 0.6, ssr 0.9]"
    )
    top_p: float = option(
        None, "nucleus probability of what is mixed in [cfs 0.95, cs 0.95, ssr 0.6]"
    )
    lam: float = option(1.0, "weight of the examples mixed in")
    normalize: Literal["pooled", "source"] = option(
        "pooled", "divide by all targets, or each source by its own"
    )

    steps: int = _depends("steps", "gradient steps, instead of --epochs")
    epochs: float | None = _depends("epochs", "passes over the task data alone")
    batch_size: int = _depends("batch_size", "examples per gradient step, over all ranks")
    max_length: int = _depends("max_length", "tokens an example or sample is cut to")
    lr: float = _depends("lr", "peak learning rate")
    optimizer: Literal["adamw", "adamw8bit"] = _depends(
        "optimizer", "AdamW with float32 states, or bitsandbytes' with 8-bit states"
    )
    beta2: float = _depends("beta2", "AdamW's decay of the squared gradient")
    warmup: float = option(0.03, "share of the steps that warm up; cosine to zero after")
    weight_decay: float = option(0.0, "decoupled weight decay of matrices")
    clip: float = option(1.0, "largest gradient norm; 0 clips nothing")

    save_every: int = option(None, "steps between checkpoints; default: a tenth of the run")
    keep: int = option(2, "checkpoints kept, the newest")
    stop_after: int | None = option(
        None, "save and stop after this step, as SIGTERM does; --resume goes on", "STEP"
    )
    kl_samples: int = option(
        512, "held-out samples, drawn at temperature 1 and top-p 1; 0 estimates no KL"
    )
    kl_every: int = option(None, "steps between KL estimates; default: a tenth of the run")
    skill_items: int = option(200, "test items per skill at the end (TinyWorld)")
    tensorboard: bool = option(False, "write the metrics for TensorBoard too, into the run")
    wandb: str | None = option(None, "send the metrics to this Weights & Biases project too")

    seed: int = option(0, "of the data order, the samples and pretraining's weights")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to compute")
    dtype: Literal["float32", "bfloat16"] = option(
        None, "of the computation; default: bfloat16 on CUDA, else float32"
    )
    masters: Literal["float32", "bfloat16"] = option(
        "float32", "of the weights that are updated; bfloat16 ones are rounded stochastically"
    )
    result_dtype: Literal["float32", "bfloat16"] | None = option(
        None, "of the model that the run writes; default: that of the checkpoint it starts from"
    )
    micro_batch_tokens: int = _depends("micro_batch_tokens", "tokens per forward pass and rank")
    activation_checkpointing: Literal["none", "selective", "block"] = option(
        "none", "what the backward pass computes again instead of keeping it"
    )
    attention: Literal["auto", "flash", "varlen", "sdpa"] = option("auto", TRAINING_ATTENTION_HELP)
    compile: bool = option(False, "torch.compile the blocks")
    shard_ranks: int | None = option(
        None, "ranks that hold one copy of the model; fewer than all: hybrid sharding [all]"
    )
    offload_reference: bool = option(
        False, "keep the shards of theta* that a method needs in host memory"
    )
    plan: bool = option(False, "print the memory that a rank needs, and stop")
    plan_ranks: int | None = option(None, "ranks to plan for; default: those of this run")
    plan_gib: float | None = option(None, "memory of one rank's device; default: this machine's")

    def __post_init__(self) -> None:
        self._check_values()
        self.check_method()
        if (self.data is None) != (self.format is None):
            raise UserError("--data and --format go together; see --help for the formats")
        if self.interleave is not None and self.data is not None:
            raise UserError("--data and --interleave: give one of them")
        if self.plan and self.stages is not None:
            raise UserError("--plan and --stages: plan one stage at a time, by its own flags")
        if self.resume and self.out is None:
            raise UserError("--resume: needs --out, the directory of the run")
        if self.steps is not None and self.epochs is not None:
            raise UserError(f"--steps {self.steps} and --epochs {self.epochs}: give one of them")
        if self.from_scratch and self.epochs is not None and self.on_tinyworld_data:
            raise UserError("--epochs: TinyWorld's pretraining text has no end; give --steps")

    def _check_values(self) -> None:
        is_enough = self.kl_samples == 0 or self.kl_samples >= 2
        _require(self, "kl_samples", is_enough, "at least 2, for a standard error, or 0 for no KL")
        _require(self, "skill_items", self.skill_items >= 1, "at least 1")
        for name in AT_LEAST_ONE:
            _require(self, name, getattr(self, name) is None or getattr(self, name) >= 1, ">= 1")
        too_many = self.batch_size is not None and self.batch_size > LARGEST_BATCH
        _require(self, "batch_size", not too_many, f"at most {LARGEST_BATCH:,}")
        _require(self, "beta2", self.beta2 is None or 0 < self.beta2 < 1, "in (0, 1)")
        _require(self, "max_length", self.max_length is None or self.max_length >= 2, ">= 2")
        for name in ("epochs", "lr", "temperature", "plan_gib"):
            _require(self, name, getattr(self, name) is None or getattr(self, name) > 0, "above 0")
        _require(self, "synthetic_ratio", self.synthetic_ratio > 0, "above 0 (without: ft)")
        _require(self, "top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1]")
        _require(self, "warmup", 0 <= self.warmup < 1, "in [0, 1)")
        for name in ("lam", "weight_decay", "clip"):
            _require(self, name, getattr(self, name) >= 0, "0 or more")
        _require(self, "seed", 0 <= self.seed < 2**32, "in [0, 2^32)")
        known = ", ".join(tinyworld.NEW_SKILLS)
        _require(self, "skill", self.skill in tinyworld.NEW_SKILLS, f"one of {known}")
        are_known = set(self.score_skills or []) <= tinyworld.NEW_SKILLS.keys()
        _require(self, "score_skills", are_known, f"some of {known}")

    @property
    def scored_skills(self) -> list[str]:
        """New skills of TinyWorld that are scored beside the old ones."""
        return list(dict.fromkeys([self.skill, *(self.score_skills or [])]))

    @property
    def on_embedded_model(self) -> bool:
        """Does the run start from the TinyWorld base that ships with the package?"""
        return self.model is None or Path(self.model).resolve() == TINYWORLD_DIR.resolve()

    @property
    def on_tinyworld_data(self) -> bool:
        """Is the task TinyWorld's new skill, so that its skills can be scored?"""
        return self.data is None and self.interleave is None

    def resolved(self, device_type: str, context: int) -> TrainConfig:
        """With every default in place but those that the number of examples decides.

        context  the most positions that the model knows; a longer `--max-length` is refused
        """
        defaults = CHECKPOINT_DEFAULTS
        if self.on_embedded_model:
            defaults = PRETRAIN_DEFAULTS if self.from_scratch else TINYWORLD_DEFAULTS
        values = {name: v for name, v in defaults.items() if getattr(self, name) is None}
        if self.steps is not None or self.epochs is not None:
            values = {name: v for name, v in values.items() if name not in ("steps", "epochs")}
        if self.dtype is None:
            values["dtype"] = "bfloat16" if device_type == "cuda" else "float32"
        if "max_length" in values:
            values["max_length"] = min(values["max_length"], context)
        elif self.max_length > context:
            raise UserError(f"--max-length {self.max_length}: the model's context is {context}")
        for method in self.methods:
            values |= {its.name: getattr(method, its.name) for its in method.options()}
        return replace(self, model=self.model or str(TINYWORLD_DIR), **values)

    def counted(self, num_task_examples: int) -> TrainConfig:
        """With `steps` in place of `epochs`, and what follows from them.

        The number of steps is that of plain fine-tuning whatever is mixed in: passes over the
        mixture are inversely proportional to its size (section 3, "for a fair comparison").
        """
        steps = self.steps
        if steps is None:
            assert self.epochs is not None, "resolved() fills in one of the two"
            steps = max(1, round(self.epochs * num_task_examples / self.batch_size))
        tenth = max(1, steps // 10)
        return replace(
            self,
            steps=steps,
            epochs=None,
            kl_every=self.kl_every or tenth,
            save_every=self.save_every or tenth,
        )


def _require(config: TrainConfig, name: str, holds: bool, rule: str) -> None:
    if not holds:
        flag = name.replace("_", "-")
        raise UserError(f"--{flag} {getattr(config, name)}: expected {rule}")
