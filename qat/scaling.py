"""Memory, traffic and tokens of training on paper: what `qat plan` says and docs/scaling.md explains.

    peak = what is always there + the largest of three moments: the loss, backward of the head, the end of backward

P weights, n ranks; units of FSDP2 are the decoder blocks, an untied token table, and the rest. Bytes of rank 0:

    float32 weights 4P, Adam moments 8P, gradients 4P      divided by n under FSDP2
    teacher, in the matmul's type                          divided by n under FSDP2
    buckets 4P                                             DDP's copy of the gradients
    scales and zero points 8 each                          buffers, whole on every rank
    float model, rank 0's whole copies                     in main memory, which on a CPU is the same

No torch here; `scripts/check_scaling.py` compares with measured runs.
Source of the shapes of all-gather and reduce-scatter: ZeRO stage 3 (arXiv:1910.02054).

Letters: H hidden size, F intermediate size, Q heads times head size, V vocabulary, D key-value heads times head size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

from qat.config import RunConfig
from qat.stage_config import BLOCK_WINDOWS, StageConfig, length

STRATEGIES = ("single", "ddp", "fsdp2")
FLOAT32 = 4
CONTEXT = 1.5 * 2**30  # a CUDA context with kernels and communication buffers; assumed, not measured here


@dataclass(frozen=True)
class ModelShape:
    """What memory and traffic depend on; counts of values, `scales` those of all grids, a tied table counted once.

    `linear`: weights of linear layers but a tied head; `linear_sides`: the sum of their rows and columns.
    """

    weights: int
    blocks: int
    block_weights: int
    quantized_in_blocks: int
    linear: int
    linear_sides: int
    scales: int
    tied: bool
    vocabulary: int
    hidden: int
    intermediate: int
    query: int
    key_value: int

    @property
    def table(self) -> int:
        """Values of the token table."""
        return self.vocabulary * self.hidden

    @property
    def own_table(self) -> int:
        """Weights of the token table where it is a unit of its own, 0 when the head is tied to it."""
        return 0 if self.tied else self.table

    @property
    def rest(self) -> int:
        """Weights of the last FSDP2 unit: head, last norm, a tied table."""
        return self.weights - self.blocks * self.block_weights - self.own_table


@dataclass(frozen=True)
class Job:
    """How it is trained. `block` tokens a window, `batch` windows a forward pass, `width` bytes of a matmul's values.

    `fused`: the CPU kernels, which keep a weight's values between forward passes; `integer`: int8 inputs.
    `moments`: values that the optimizer keeps of every weight. `trains`: all, scales, or low_rank products of `rank`.
    """

    strategy: str
    ranks: int
    on_gpu: bool
    steps: int
    block: int
    batch: int
    accumulate: int
    checkpointing: bool
    width: int
    teacher: bool
    chunk: int
    learned: bool
    whole_table: bool
    fused: bool
    integer: bool
    moments: int
    trains: str
    rank: int

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass of one rank."""
        return self.block * self.batch

    @property
    def tokens_per_step(self) -> int:
        """Tokens of all ranks in one optimizer step."""
        return self.ranks * self.tokens * self.accumulate

    @property
    def shards(self) -> int:
        """Ranks that share one copy of weights, gradients and moments."""
        return self.ranks if self.strategy == "fsdp2" else 1


@dataclass(frozen=True)
class Memory:
    """Bytes of rank 0: what is always there, what exists at each moment, and main memory while loading onto a GPU.

    Under FSDP2 the other ranks load nothing.
    """

    always: dict[str, float]
    moments: dict[str, dict[str, float]]
    host: float

    @property
    def moment(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> dict[str, float]:
        """Everything that exists at the peak."""
        return {name: size for name, size in {**self.always, **self.moments[self.moment]}.items() if size > 0}

    @property
    def peak(self) -> float:
        """Bytes at the worst moment."""
        return sum(self.parts.values())


def shape_of(text_config: Any, coverage: Any) -> ModelShape:
    """The shape of a model from its Hugging Face text config and its coverage (insert.Coverage)."""
    layers, count = coverage.layers, text_config.num_hidden_layers
    inside = [layer for layer in layers if ".layers." in layer.name or ".h." in layer.name]
    heads = text_config.num_attention_heads
    size = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    grids = [(layer, coverage.schemes[layer.name]) for layer in layers if layer.scheme and not layer.tied_to]
    shapes = [scheme.weight.scale_shape(layer.shape) for layer, scheme in grids]
    linear = [layer for layer in layers if layer.kind in ("linear", "conv1d") and not layer.tied_to]
    return ModelShape(
        weights=coverage.weights,
        blocks=count,
        block_weights=sum(layer.weights for layer in inside) // count,
        quantized_in_blocks=sum(layer.weights for layer in inside if layer.scheme),
        linear=sum(layer.weights for layer in linear),
        linear_sides=sum(sum(layer.shape) for layer in linear),
        scales=sum(prod(shape) for shape in shapes),
        tied=any(layer.tied_to for layer in layers),
        vocabulary=text_config.vocab_size,
        hidden=text_config.hidden_size,
        intermediate=getattr(text_config, "intermediate_size", None) or 4 * text_config.hidden_size,
        query=heads * size,
        key_value=(getattr(text_config, "num_key_value_heads", None) or heads) * size,
    )


def job_of(config: RunConfig, stage: StageConfig | None = None) -> Job:
    """The part of a run that this file looks at, in a stage of whole models; without one, end to end."""
    stage = stage or StageConfig()
    trainer, on_gpu = config.trainer, config.trainer.accelerator == "gpu"
    return Job(
        strategy=trainer.strategy,
        ranks=trainer.devices * trainer.nodes,
        on_gpu=on_gpu,
        steps=length(stage, trainer.max_steps),
        block=config.data.block_size,
        batch=trainer.batch_size,
        accumulate=trainer.accumulate,
        checkpointing=trainer.gradient_checkpointing,
        width=2 if trainer.precision == "bf16" else FLOAT32,
        teacher=config.distill.kl_weight > 0,
        chunk=config.distill.chunk_tokens,
        learned=config.fake_quant.weight_scale == "learned" or stage.kind == "scales",
        whole_table=config.fake_quant.weight_scale != "dynamic",
        fused=not on_gpu and trainer.precision == "bf16",
        integer=config.scheme.input is not None,
        moments=2 if config.optim.kind == "adamw" else 0,
        trains="scales" if stage.kind == "scales" else "all" if stage.rank is None else "low_rank",
        rank=stage.rank or 0,
    )


def trained(shape: ModelShape, job: Job) -> int:
    """Values with a gradient and moments, vectors not counted; those of scales stand with the scales."""
    return {"all": shape.weights, "scales": 0, "low_rank": job.rank * shape.linear_sides}[job.trains]


def side_by_side(job: Job) -> list[Job]:
    """The same job under every strategy: one process alone, and its ranks under DDP and FSDP2."""
    return [replace(job, strategy=name, ranks=1 if name == "single" else job.ranks) for name in STRATEGIES]


def memory(shape: ModelShape, job: Job) -> Memory:
    """Bytes of one rank while training."""
    weights, head = shape.weights, shape.table
    copy, whole_teacher = FLOAT32 * weights, teacher(shape, job)
    moved = FLOAT32 * trained(shape, job)
    gradients = moved / job.shards
    # with low-rank products: W + B A in float32, from forward to backward
    sums = FLOAT32 * shape.linear / (shape.blocks if job.checkpointing else 1) if job.trains == "low_rank" else 0.0
    sharded = job.strategy == "fsdp2"
    rest, table, block = (FLOAT32 * unit for unit in (shape.rest, shape.own_table, shape.block_weights))
    scales = (8 + (16 / job.shards if job.learned else 0)) * shape.scales
    # every model on its way to a device: the float one, the student, the teacher
    host = 2 * copy + whole_teacher
    always = {
        "float32 weights": copy / job.shards,
        "low-rank products": moved if job.trains == "low_rank" else 0.0,
        "Adam moments": job.moments * moved / job.shards,
        "DDP buckets": moved if job.strategy == "ddp" else 0.0,
        "teacher": whole_teacher / job.shards,
        "teacher's head": head_of_teacher(shape, job) if sharded else 0.0,
        "scales, zero points": scales,
        "CUDA context": CONTEXT if job.on_gpu else 0.0,
    }
    if not job.on_gpu:
        # the run is scored against the float model; FSDP2 deals out from whole models that rank 0 keeps
        always["float model, whole copies"] = host + scales if sharded else copy
    activations, kept = activations_of(shape, job)
    # gradient of the head in float32, then the logits of a chunk, or that gradient scaled and cast
    hidden = 3.0 * FLOAT32 * job.tokens * shape.hidden
    at_loss = {
        # Lightning frees the gradients of a step after the forward pass of the next
        "gradients": gradients,
        "activations": activations,
        "sums with products": sums,
        "fake-quantized weights": kept + job.width * head + (FLOAT32 * head if job.whole_table else 0),
        "head gradient, logits": FLOAT32 * head + 24.0 * job.chunk * shape.vocabulary + hidden,
        "gathered weights": (rest + 3 * block) if sharded else 0.0,
    }
    at_head = {
        **at_loss,
        "gradients": gradients if job.accumulate > 1 else 0.0,
        "head gradient, logits": 10.0 * head + hidden,
    }
    # of the unit that backward ends with: weights, gradients, and the input of reduce-scatter; the rest waits, gathered
    gathered = max(2 * rest + 3 * table, 3 * rest, rest + FLOAT32 * head + 5 * block) if sharded else 0.0
    at_end = {
        "gradients": gradients,
        "gathered weights": gathered,
        "fake-quantized weights": kept if job.fused else 0.0,
    }
    moments = {"loss": at_loss, "backward of the head": at_head, "end of backward": at_end}
    return Memory(always, moments, host if job.on_gpu else 0.0)


def teacher(shape: ModelShape, job: Job) -> float:
    """Bytes of the whole float model that is distilled from: matmuls in their type, the table in float32."""
    if not job.teacher:
        return 0.0
    return job.width * (shape.weights - shape.table) + FLOAT32 * shape.table


def head_of_teacher(shape: ModelShape, job: Job) -> float:
    """Bytes of the teacher's head, which FSDP2 leaves gathered for the loss."""
    return shape.table * (FLOAT32 if shape.tied else job.width) if job.teacher else 0.0


def activations_of(shape: ModelShape, job: Job) -> tuple[float, float]:
    """Bytes that forward leaves for backward: activations, and weights on their grid.

    A block saves, for each token, its two residuals and two normed inputs in float32; the inputs of its seven matmuls;
    query, key, value and output of attention; gate, its silu, and up. Checkpointing leaves one residual for each
    block, and one block's rest while it is recomputed.
    """
    h, f, q, d, w = shape.hidden, shape.intermediate, shape.query, shape.key_value, job.width
    inputs = 0 if w == FLOAT32 else w * 5 * h
    tail = w * (q + f)  # inputs of o_proj and down_proj
    if job.integer and job.fused:
        inputs, tail = 5 * h, q + f
    elif job.integer:
        inputs, tail = w * 5 * h, 2 * tail
    of_block = job.tokens * (4 * FLOAT32 * h + inputs + tail + w * (2 * q + 2 * d + 3 * f))
    per_weight = 1 if job.integer and job.fused else w
    kept = per_weight * shape.quantized_in_blocks
    if not job.checkpointing:
        return shape.blocks * of_block, kept
    one_block = of_block + (0 if job.fused else kept / shape.blocks)
    return shape.blocks * job.tokens * FLOAT32 * h + one_block, kept if job.fused else 0.0


def traffic(shape: ModelShape, job: Job) -> dict[str, float]:
    """Payload bytes of the collectives of one optimizer step, as one rank sees them; a ring moves (n - 1) / n of it."""
    copy, rest = FLOAT32 * shape.weights, FLOAT32 * shape.rest
    gradients = float(FLOAT32 * (shape.scales if job.trains == "scales" else trained(shape, job)))
    if job.ranks == 1:
        return {}
    if job.strategy == "ddp":
        return {"all-reduce": gradients}
    # units are gathered for forward and again for backward, the last one once, the teacher for its forward pass
    gathered = 2 * (copy - rest) + rest + teacher(shape, job)
    # gradients leave after every backward pass, also in the middle of a step
    return {"all-gather": job.accumulate * gathered, "reduce-scatter": job.accumulate * gradients}


def sent(traffic_bytes: dict[str, float], ranks: int) -> float:
    """Bytes that one rank sends in a step when collectives are rings: all-reduce goes around twice."""
    rounds = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}
    return sum(rounds[name] * size for name, size in traffic_bytes.items()) * (ranks - 1) / ranks


def checkpoint_bytes(shape: ModelShape, job: Job) -> dict[str, float]:
    """Bytes on disk: the final model, and a state that training can go on from (with Adam's moments)."""
    grids = (8 + (4 if job.learned else 0)) * shape.scales
    model = FLOAT32 * shape.weights + grids
    return {"model": model, "training state": model + job.moments * FLOAT32 * shape.weights}


@dataclass(frozen=True)
class StageNeed:
    """What a stage of a run takes: `steps` optimizer steps, `tokens` as results.json counts them, and memory.

    `job`: how it trains; a blockwise stage trains as none.
    """

    kind: str
    steps: int
    tokens: int
    memory: Memory
    job: Job | None = None


def stage_needs(shape: ModelShape, config: RunConfig) -> list[StageNeed]:
    """Every stage of a run, in order."""
    needs = []
    for stage in config.stages.schedule:
        job = job_of(config, stage)
        if stage.kind == "blockwise":
            # a window that goes through all blocks counts once; blocks do not accumulate
            tokens = job.steps * job.ranks * job.tokens
            needs.append(StageNeed(stage.kind, shape.blocks * job.steps, tokens, block_memory(shape, job, stage)))
        else:
            kind = f"{stage.kind}, rank {stage.rank}" if stage.rank else stage.kind
            needs.append(StageNeed(kind, job.steps, job.steps * job.tokens_per_step, memory(shape, job), job))
    return needs


def block_memory(shape: ModelShape, job: Job, stage: StageConfig) -> Memory:
    """Bytes of one rank in a blockwise stage (train/blockwise.py), by the structure of its code; not measured.

    Models and the two streams of hidden states wait in main memory; on a GPU stand one block and its float
    counterpart, and, while the streams are made, both whole models.
    """
    copy, block = float(FLOAT32 * shape.weights), float(FLOAT32 * shape.block_weights)
    scales = 8.0 * shape.scales
    windows = (BLOCK_WINDOWS if stage.windows is None else stage.windows) // job.ranks
    streams = 2.0 * FLOAT32 * windows * job.block * shape.hidden
    waiting = 2 * copy + scales + teacher(shape, job) + streams
    activations, kept = activations_of(replace(shape, blocks=1), replace(job, checkpointing=False))
    training = {
        "gradients": block,
        "Adam moments": job.moments * block,
        "values kept": 2 * block,
        "activations": activations,
        "fake-quantized weights": kept / shape.blocks,
    }
    always = {"CUDA context": CONTEXT, "scales, zero points": scales} if job.on_gpu else {}
    if not job.on_gpu:
        always = {
            "float32 weights": copy,
            "float model, whole copies": copy,
            "teacher": teacher(shape, job),
            "streams": streams,
            "scales, zero points": scales,
        }
        return Memory(always, {"a block": training}, 0.0)
    whole = {"float32 weights": 2 * copy}
    return Memory(always, {"a block": {"blocks": 2 * block, **training}, "making the streams": whole}, waiting)
