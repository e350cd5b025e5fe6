"""The sampler in one process: against `transformers`, against the hardware, and on a GPU."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from models import EOS, columns, random_model
from rich.console import Console

from cfs.assets import TINYWORLD_DIR
from cfs.model import Decoder, load_model, save_model
from cfs.model.packed import packed_for_decoding
from cfs.sample.sample import Request, SamplingSettings
from cfs.sample.sampler import Usage, choose_num_slots, generate
from cfs.sample.sampling import draw
from cfs.sample.slots import Slots

MAX_TOKENS, NUM_SAMPLES, TOP_P = 256, 256, 0.95
REPEATS = 3
HBM_BYTES, PEAK_FLOPS = 4.8e12, 989e12
"""An H200's memory bandwidth and dense bfloat16 rate: the roofline of the gpu table."""
CPU_SHAPES = ("olmo-50304", "llama-128256")


def settings(max_tokens: int = MAX_TOKENS, seed: int = 0) -> SamplingSettings:
    return SamplingSettings(max_tokens, temperature=1.0, top_p=TOP_P, seed=seed)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def ours(
    model: Decoder, num_slots: int, num_samples: int = NUM_SAMPLES, max_tokens: int = MAX_TOKENS
) -> tuple[float, list[int], float]:
    """Seconds, lengths, and the useful share of slot-steps."""
    usage = Usage()
    requests = (Request(i, [EOS]) for i in range(num_samples))
    vocabulary = model.config.vocab_size
    synchronize(model.embed_tokens.weight.device)
    started = time.perf_counter()
    samples = generate(
        model, requests, settings(max_tokens), EOS, vocabulary, num_slots, usage=usage
    )
    lengths = [len(sample.logprob_model) for sample in samples]
    return time.perf_counter() - started, lengths, usage.tokens / usage.slot_steps


# ------------------------------------------------------------------------------------- compare


def theirs(model: Any, batch: int, seed: int) -> tuple[float, list[int]]:
    """Seconds and lengths of one `transformers` batch, which waits for its longest text."""
    torch.manual_seed(seed)
    prompts = torch.full((batch, 1), EOS)
    started = time.perf_counter()
    texts = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        temperature=1.0,
        top_p=TOP_P,
        top_k=0,
        max_new_tokens=MAX_TOKENS,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    elapsed = time.perf_counter() - started
    ended = texts[:, 1:] == EOS
    lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, texts.shape[1] - 1)
    return elapsed, lengths.tolist()


def compare(console: Console, batches: list[int]) -> None:
    """Interleaved: a run of ours, a batch of theirs, and so on; float32 and the same weights.

    Both draw from one law, and few texts make a mean length that is chance. So useful tokens are
    counted as texts times the mean length over all texts of both.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    table = columns(
        "Useful tokens/s beside transformers generate, float32, top-p 0.95, at most 256 tokens",
        ("model", "what", "tokens/s", "runs", "mean length", "useful slot-steps", "ratio"),
    )
    for shape in CPU_SHAPES:
        model = random_model(shape)
        slots = choose_num_slots(model, 1 + MAX_TOKENS, NUM_SAMPLES)
        with tempfile.TemporaryDirectory() as directory:
            save_model(model, directory)
            reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        mine: list[tuple[float, list[int], float]] = []
        others: dict[int, tuple[float, list[int]]] = {}
        for batch in batches if shape == CPU_SHAPES[0] else [64]:
            mine.append(ours(model, slots))
            others[batch] = theirs(reference, batch, seed=batch)
        mine.append(ours(model, slots))
        lengths = [run[1] for run in (mine[0], *others.values())]
        mean_length = statistics.mean(itertools.chain(*lengths))
        speeds = {batch: batch * mean_length / run[0] for batch, run in others.items()}
        best = max(speeds.values())
        for batch, speed in speeds.items():
            own = f"{statistics.mean(others[batch][1]):.0f}"
            table.add_row(
                shape, f"transformers, batch {batch}", f"{speed:,.0f}", "1", own, "",
                f"{speed / best:.2f}",
            )  # fmt: skip
        speed = NUM_SAMPLES * mean_length / statistics.median(run[0] for run in mine)
        table.add_row(
            shape, f"cfs, {slots} slots", f"{speed:,.0f}", str(len(mine)),
            f"{statistics.mean(mine[0][1]):.0f}", f"{mine[0][2]:.1%}", f"{speed / best:.1f}",
        )  # fmt: skip
    console.print(table)


# ---------------------------------------------------------------------------------- step, draw


def milliseconds(function: Callable[[], object], repeats: int = 10) -> float:
    """Median of several calls, after two to warm up."""
    times = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[2:])


@torch.inference_mode()
def running_slots(model: Decoder, num_slots: int) -> Slots:
    """Slots as they stand after 200 steps of a long generation: texts of every age."""
    slots = Slots(
        packed_for_decoding(model, num_slots),
        settings(),
        EOS,
        model.config.vocab_size,
        num_slots,
        1 + MAX_TOKENS,
        0,
        "auto",
    )
    numbers = iter(range(10**9))
    slots.fill(list(range(num_slots)), [Request(next(numbers), [EOS]) for _ in range(num_slots)])
    for _ in range(200):
        for row in slots.step():
            slots.take(row)
        idle = slots.youngest(slots.idle_rows())
        slots.fill(idle, [Request(next(numbers), [EOS]) for _ in idle])
    return slots


@torch.inference_mode()
def parts_of_a_step(slots: Slots) -> dict[str, Callable[[], object]]:
    """The step as it is, and by themselves: its products, its cache reads, its draw."""
    model, config = slots.model, slots.model.config
    num_rows, vocabulary = len(slots.requests), config.vocab_size
    x, wide = (
        torch.randn(num_rows, config.hidden_size),
        torch.randn(num_rows, config.intermediate_size),
    )
    mixed = torch.randn(num_rows, config.num_heads * config.head_dim)
    logits = model.logits(x)
    work = torch.empty_like(logits)  # a draw overwrites its logits
    u = torch.rand(num_rows, dtype=torch.float64)
    spans = slots.spans()
    slots.advances.zero_()  # every step is the same one

    def products() -> None:
        for block in model.layers:
            attention, mlp = block.self_attn, block.mlp
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj):  # type: ignore[union-attr]
                linear(x)  # type: ignore[operator]
            attention.o_proj(mixed)  # type: ignore[operator, union-attr]
            mlp.gate_proj(x)  # type: ignore[operator, union-attr]
            mlp.up_proj(x)  # type: ignore[operator, union-attr]
            mlp.down_proj(wide)  # type: ignore[operator, union-attr]
        model.logits(x)

    def reads() -> None:
        for cached in (slots.cache.keys, slots.cache.values):
            for layer in cached:
                for span in spans:
                    layer[span.rows, :, : span.num_filled].sum()

    return {
        "step": lambda: slots.device_step(spans),
        "products": products,
        "reads": reads,
        "copy": lambda: work.copy_(logits),
        "copy and draw": lambda: draw(work.copy_(logits), u, 1.0, TOP_P, vocabulary),
        "copy and draw at 0.6": lambda: draw(work.copy_(logits), u, 0.6, TOP_P, vocabulary),
        "sort": lambda: logits.sort(-1),
        "multinomial": lambda: torch.multinomial(logits.softmax(-1), 1),
    }


@torch.inference_mode()
def step_and_draw(console: Console) -> None:
    """The parts are timed in turn, so that a slow moment of the machine meets them all."""
    table = columns(
        "A decode step (ms): the bound of its own products and cache reads, timed alone; its draw",
        ("model", "slots", "step", "products", "reads", "bound / step", "draw", "draw / step",
         "at T 0.6", "(sort)", "(multinomial)"),
    )  # fmt: skip
    for shape in CPU_SHAPES:
        model = random_model(shape)
        num_slots = choose_num_slots(model, 1 + MAX_TOKENS, NUM_SAMPLES)
        parts = parts_of_a_step(running_slots(model, num_slots))
        times: dict[str, list[float]] = {name: [] for name in parts}
        for _ in range(REPEATS):
            for name, function in parts.items():
                times[name].append(
                    milliseconds(function, 2 if name in ("sort", "multinomial") else 10)
                )
        ms = {name: statistics.median(values) for name, values in times.items()}
        ms["draw"] = ms["copy and draw"] - ms["copy"]
        ms["draw at 0.6"] = ms["copy and draw at 0.6"] - ms["copy"]
        table.add_row(
            shape, str(num_slots), *(f"{ms[name]:.1f}" for name in ("step", "products", "reads")),
            f"{(ms['products'] + ms['reads']) / ms['step']:.0%}",
            f"{ms['draw']:.1f}", f"{ms['draw'] / ms['step']:.0%}",
            f"{ms['draw at 0.6'] / ms['step']:.0%}",
            f"{ms['sort']:.0f}", f"{ms['multinomial']:.0f}",
        )  # fmt: skip
    console.print(table)


# ------------------------------------------------------------------------------- bfloat16, gpu


@torch.inference_mode()
def bfloat16(console: Console) -> None:
    """Log-probabilities that a bfloat16 sampler stores, beside float32 ones of the same tokens."""
    table = columns(
        "bfloat16 sampling: stored log p minus a float32 forward pass, nats per token",
        ("model", "tokens", "mean", "mean absolute", "99 %", "largest"),
    )
    shipped, half = load_model(TINYWORLD_DIR), load_model(TINYWORLD_DIR, dtype=torch.bfloat16)
    random32, random16 = random_model("olmo-50304"), random_model("olmo-50304", torch.bfloat16)
    random32.load_state_dict(random16.state_dict())
    for name, model, rounded, count in (
        ("TinyWorld", shipped, half, 500),
        ("olmo-50304, random", random32, random16, 50),
    ):
        requests = [Request(i, [EOS]) for i in range(count)]
        num_tokens = model.config.vocab_size
        differences = []
        for sample in generate(rounded, requests, settings(200), EOS, num_tokens, 50):
            ids = torch.from_numpy(sample.input_ids).long()[None]
            targets = torch.ones_like(ids, dtype=torch.bool)
            targets[0, 0] = False
            differences.append(sample.logprob_model - model(ids, target_mask=targets).numpy())
        all_of_them = np.concatenate(differences)
        absolute = np.abs(all_of_them)
        table.add_row(
            name, f"{len(absolute):,}", f"{all_of_them.mean():+.4f}", f"{absolute.mean():.4f}",
            f"{np.quantile(absolute, 0.99):.3f}", f"{absolute.max():.3f}",
        )  # fmt: skip
    console.print(table)


def gpu(console: Console) -> None:
    """Tokens/s of the true shapes in bfloat16 beside the time to read weights and cache."""
    table = columns(
        "One GPU, bfloat16, random weights, every slot at work to the full length",
        ("model", "slots", "max tokens", "tokens/s", "target", "share of roofline", "draw / step"),
    )
    rows = (("olmo-1b", 512, 80_000), ("olmo-1b", 1024, 40_000), ("llama-8b", 1024, 15_000))
    for shape, max_tokens, target in rows:
        if not torch.cuda.is_available():
            table.add_row(shape, "", str(max_tokens), "not measured", f"{target:,}", "", "")
            continue
        model = random_model(shape, torch.bfloat16, "cuda", hazard=1e-9)
        config = model.config
        num_slots = choose_num_slots(model, 1 + max_tokens, 1024)
        ours(model, num_slots, num_slots, 32)  # compiles
        seconds, lengths, _ = ours(model, num_slots, num_slots, max_tokens)
        speed, mean_length = sum(lengths) / seconds, statistics.mean(lengths)
        step = num_slots / speed
        parameters = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n)
        per_position = 4 * config.num_layers * config.num_kv_heads * config.head_dim
        moved = 2 * parameters + num_slots * mean_length / 2 * per_position
        bound = max(moved / HBM_BYTES, 2 * parameters * num_slots / PEAK_FLOPS)
        logits = torch.randn(num_slots, config.vocab_size, device="cuda", dtype=torch.bfloat16)
        u = torch.rand(num_slots, dtype=torch.float64, device="cuda")

        def drawing(logits: torch.Tensor = logits, u: torch.Tensor = u) -> None:
            draw(logits, u, 1.0, TOP_P, logits.shape[-1])
            torch.cuda.synchronize()

        share = milliseconds(drawing) / 1000 / step
        table.add_row(
            shape, str(num_slots), str(max_tokens), f"{speed:,.0f}", f"{target:,}",
            f"{bound / step:.0%}", f"{share:.0%}",
        )  # fmt: skip
    console.print(table)
    if torch.cuda.is_available():
        print(torch.cuda.get_device_name())
