"""The schema of a run: one dataclass per conf group and a doc line under each field.

A default lives here and nowhere else; `conf/` holds chosen values. Pure Python, so that a wrong configuration is
refused in well under a second. At the end: chosen values -> schemes, plan, KV grid. Phases and stages of a training:
`stage_config.py`; ranges: `checks.py`; YAML: `cli/compose.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qat.errors import UserError, collected, nearest, problem
from qat.scheme import KEEP, KvSpec, PlanRule, QuantPlan, QuantScheme, QuantSpec
from qat.stage_config import PhasesConfig, StagesConfig

SAME = "same"


@dataclass
class ModelConfig:
    path: str = "???"
    """HF folder, hub name, .gguf file, or `package:NAME/FILE` for a file inside an installed Python package."""
    revision: str | None = None
    """Hub revision; None is the default branch."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only from the command line or a recipe, never from a model folder."""
    attention: str = "sdpa"
    """Attention implementation of transformers: sdpa or eager."""
    architecture: str | None = None
    """Folder of recipes/architectures whose config.json `qat plan` reads when nothing here has the name `path`."""


@dataclass
class DataConfig:
    kind: str = "text"
    """text (plain file or folder of .txt), jsonl, hub (datasets library), or folder (saved or readable by datasets)."""
    path: str = "???"
    """File, folder or hub name; `package:NAME/FILE` reads from an installed Python package."""
    eval_path: str | None = None
    """Held-out text of the same kind; None holds out the last `eval_fraction` of the documents."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str = "train"
    """Split of a hub data set or folder."""
    column: str = "text"
    """Column or JSON key with the text; with `chat`, the list of messages ({role, content})."""
    chat: bool = False
    """The column holds conversations: render them with the tokenizer's chat template."""
    join: str = "eos"
    """What stands between documents in the packed stream: eos, newline, or none."""
    block_size: int = 512
    """Tokens per training and evaluation window."""
    eval_fraction: float = 0.1
    """Share of the documents, counted from the end, held out when there is no eval_path."""
    eval_tokens: int = 16384
    """Held-out tokens scored; fewer when the text is shorter."""
    encoding_errors: str = "strict"
    """What to do with bytes that are not UTF-8: strict (refuse, naming the place), replace or ignore."""


@dataclass
class SpecConfig:
    bits: int = 8
    """2 to 8."""
    symmetric: bool = True
    """Zero point fixed at code 0."""
    granularity: str = "channel"
    """tensor, channel, group or token."""
    group_size: int | None = None
    """Values sharing a scale when granularity=group; any divisor of in_features."""
    dynamic: bool = False
    """Inputs only: the scale comes from the tensor at hand."""


@dataclass
class SchemeConfig:
    name: str = "???"
    """The field's name for it, such as w4a16_g32."""
    weight: SpecConfig = field(default_factory=SpecConfig)
    """Grid of the weights."""
    input: SpecConfig | None = None
    """Grid of the layer's inputs; None keeps them float."""


@dataclass
class KvConfig:
    bits: int | None = None
    """Bits of keys and values, dynamic, values per token and head; None keeps the cache float."""
    symmetric: bool = True
    """Zero point fixed at code 0."""
    key_axis: str = "token"
    """What shares a scale of keys: token (a head's vector) or channel (group_size tokens of one channel)."""
    group_size: int | None = None
    """Tokens that share the scale of a channel, with key_axis=channel."""
    sink_tokens: int = 0
    """First tokens of a sequence that stay float."""
    recent_tokens: int = 0
    """Newest tokens, as a query sees them, that stay float."""


@dataclass
class RuleConfig:
    match: str = "???"
    """Glob over full module names, such as model.layers.0.*."""
    scheme: str = "keep"
    """Name of a scheme in conf/scheme, or keep."""


@dataclass
class PlanConfig:
    rules: list[RuleConfig] = field(default_factory=list)
    """First match wins; a rule that matches nothing is an error."""
    embedding: str = "w8a16"
    """Scheme of token table and output head (one matrix when tied); keep, or same for the run's scheme."""
    max_unsupported: float = 0.1
    """The run refuses when a larger share of the weights is of layers that have no grid and that no rule keeps."""
    sensitivity: str | None = None
    """A sensitivity.json that `qat sensitivity` wrote; the run keeps a copy and its report draws it."""


@dataclass
class FakeQuantConfig:
    estimator: str = "ste_clipped"
    """Gradient: ste_clipped, ste_pass_through, lsq (learned scales) or lsq_plus (and learned zero points)."""
    weight_scale: str = "dynamic"
    """dynamic (from the weight at every step), static (fixed after calibration) or learned (with lsq, lsq_plus)."""
    weight_observer: str = "minmax"
    """What chooses the weight's range at calibration: minmax, moving_average, percentile, mse or histogram."""
    input_observer: str = "moving_average"
    """The same for static inputs."""
    calibration_batches: int = 8
    """Training windows shown to the observers before the first step."""


@dataclass
class PtqConfig:
    method: str = "none"
    """none, rtn, rtn_mse, gptq or awq: how weights and scales are chosen before the first step."""
    keep: str = "weights"
    """What training starts from: weights (the method's own, on its grid), scales (its grid, the float weights), or
    compensated (gptq: its grid, the weights that round to its codes)."""
    windows: int = 128
    """Training windows that methods with calibration look at, drawn at random with the run's seed."""
    short_fraction: float = 0.5
    """Share of those windows cut into eighths, so that more of the tokens are the first of their window."""
    damping: float = 0.01
    """gptq: added to the Hessian's diagonal, as a share of its mean."""
    act_order: bool = True
    """gptq: columns in falling order of their inputs' power."""


@dataclass
class OptimConfig:
    kind: str = "adamw"
    """adamw (two moments of every weight), or adafactor (no first, a row and a column of the second)."""
    lr: float = 1e-4
    """Peak learning rate of weights."""
    scale_lr: float = 1e-4
    """Peak learning rate of learned scales and zero points, relative to each scale's own size."""
    weight_decay: float = 0.0
    """Of 2-D weights; scales, zero points, norms and biases have none."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Adam's moments; adafactor has none of its own to set."""
    warmup_fraction: float = 0.05
    """Share of the steps with a linearly rising rate."""
    final_lr_fraction: float = 0.05
    """The cosine ends at this share of the peak."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 is off."""


@dataclass
class DistillConfig:
    kl_weight: float = 1.0
    """Weight of forward KL(teacher || student) over the vocabulary; the teacher is the model's own float weights."""
    ce_weight: float = 0.0
    """Weight of next-token cross entropy on the text."""
    temperature: float = 1.0
    """Softens both distributions; the KL term is scaled by its square."""
    jsd_beta: float = 0.0
    """0 is forward KL; between 0 and 1, the generalized Jensen-Shannon divergence in its place (0.5: the symmetric)."""
    chunk_tokens: int = 256
    """Tokens whose logits exist at one time."""


@dataclass
class TrainerConfig:
    accelerator: str = "cpu"
    """cpu or gpu."""
    strategy: str = "single"
    """single, ddp or fsdp2."""
    devices: int = 1
    """Processes on each machine."""
    nodes: int = 1
    """Machines."""
    start_timeout_minutes: float = 5.0
    """How long the ranks of a job wait for one another at the start; those that do not come are named."""
    memory_gib: float | None = None
    """Memory of a process's device in GiB; `qat plan` refuses a run that does not fit. None asks the GPU, if any."""
    precision: str = "bf16"
    """bf16 (fp32 master weights under autocast) or fp32."""
    max_steps: int = 100
    """Optimizer steps; 0 with a ptq method quantizes without training."""
    batch_size: int = 2
    """Windows per forward pass and process."""
    accumulate: int = 1
    """Forward passes per optimizer step."""
    threads: int | None = None
    """CPU threads; None leaves torch's choice."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    eval_every: int = 0
    """Steps between validation perplexities; 0 is off."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    layer_stats_every: int = 20
    """Steps between per-layer SQNR, clip share, code flips and scale drift; 0 is off."""
    checkpoint_every: int = 200
    """Steps between checkpoints that `qat resume` goes on from; 0 saves only when the run is asked to stop."""
    checkpoint_keep: int = 2
    """Newest checkpoints kept while training."""
    max_skipped_steps: int = 5
    """Steps in a row with a loss or gradient that is not finite that are skipped; one more ends the run."""
    loader_workers: int = 0
    """Processes that read windows ahead."""
    timeout_minutes: float = 10.0
    """How long a process waits for the others of the job before it gives up."""


@dataclass
class ClusterConfig:
    kind: str = "local"
    """Where `qat submit` runs the job: local (a process of this machine) or slurm."""
    partition: str | None = None
    """SLURM partition; None is the cluster's default."""
    account: str | None = None
    """SLURM account; None is the user's default."""
    time_minutes: int = 240
    """Longest running time of one job; a run that needs more goes on in the next."""
    signal_seconds: int = 300
    """Seconds before that end at which the run is told to save and stop, and has for it when told to stop earlier."""
    requeue: bool = True
    """Queue the job again when it was preempted or its time was over."""
    cpus_per_node: int | None = None
    """CPU cores asked for on each machine; None is the cluster's default."""
    memory_gib: int | None = None
    """Main memory asked for on each machine in GiB; 0 asks for all of it, None is the cluster's default."""
    sbatch: list[str] = field(default_factory=list)
    """Further options of sbatch, in quotes where they hold a sign: [exclusive,"constraint=h100"]."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before the run on the first machine, such as module load cuda."""
    port: int = 29500
    """The first of two free ports of the first machine, where the machines of a job meet; one machine needs none."""


@dataclass
class EvaluateConfig:
    baselines: bool = True
    """Also score the float model, the float control, and round-to-nearest of both."""
    controls: str | None = None
    """Folder in which runs share trained float controls, each named by a hash of all that makes it; None is the run."""
    batch_size: int = 4
    """Windows per forward pass."""
    precision: str = "bf16"
    """Arithmetic of every row of the table: bf16 or fp32."""
    decode_tokens: int = 0
    """Tokens decoded one by one from the export to measure tokens per second on this machine; 0 is off."""


@dataclass
class ExportConfig:
    format: str = "compressed_tensors"
    """File format of the packed model."""
    overwrite: bool = False
    """Replace an export folder that exists."""
    prompts: list[str] = field(default_factory=list)
    """Questions the packed model answers at the end."""
    max_new_tokens: int = 40
    """Length of each answer."""


@dataclass
class LoggerConfig:
    wandb: str = "off"
    """off, offline or online; metrics.jsonl is always written."""
    project: str = "qat"
    """wandb project."""
    group: str | None = None
    """wandb group; `qat sweep` gives its trials the name of the sweep."""


@dataclass
class RunConfig:
    name: str = "run"
    """The run folder is runs_dir/name."""
    runs_dir: str = "runs"
    """Where run folders live."""
    overwrite: bool = False
    """Replace a run folder that holds another run."""
    seed: int = 0
    """Seed of everything random."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    scheme: SchemeConfig = field(default_factory=SchemeConfig)
    kv: KvConfig = field(default_factory=KvConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    fake_quant: FakeQuantConfig = field(default_factory=FakeQuantConfig)
    ptq: PtqConfig = field(default_factory=PtqConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    phases: PhasesConfig = field(default_factory=PhasesConfig)
    stages: StagesConfig = field(default_factory=StagesConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


def conf_dir() -> Path:
    """The folder of the conf groups, recipes beside it: inside the installed package, or at the root of a checkout."""
    package = Path(__file__).resolve().parent
    for root in (package, package.parent):
        if (root / "conf/train.yaml").is_file() and (root / "recipes").is_dir():
            return root / "conf"
    fix = "Install the wheel again, or run from a whole checkout."
    raise UserError(problem("conf and recipes", f"must stand in {package} or beside it", "not there", fix))


def recipes_dir() -> Path:
    """The folder of the shipped recipes."""
    return conf_dir().parent / "recipes"


def spec_from(config: SpecConfig, where: str, is_activation: bool) -> QuantSpec:
    """The grid that `config` describes; UserError lines start with `where`, such as `scheme.weight`."""
    scale_dtype = "float32" if is_activation and config.dynamic else "bfloat16"
    try:
        return QuantSpec(**vars(config), scale_dtype=scale_dtype, is_activation=is_activation)
    except UserError as error:
        raise UserError(*(f"{where}.{line}" for line in error.problems)) from None


def scheme_from(config: SchemeConfig) -> QuantScheme:
    """The validated scheme; UserError names every impossible field of both grids."""
    problems: list[str] = []
    weight = collected(problems, spec_from, config.weight, "scheme.weight", False)
    given = collected(problems, spec_from, config.input, "scheme.input", True) if config.input else None
    if problems or weight is None:
        raise UserError(*problems)
    return QuantScheme(config.name, weight, given)


def load_scheme(name: str, where: str = "scheme") -> QuantScheme:
    """The scheme in conf/scheme/`name`.yaml; UserError, naming the setting `where`, for a name that is not there."""
    known = {file.stem: file for file in sorted((conf_dir() / "scheme").glob("*.yaml"))}
    if name not in known:
        raise UserError(problem(where, "must be a file in conf/scheme", f"'{name}'", nearest(name, list(known))))
    values: dict[str, Any] = yaml.safe_load(known[name].read_text(encoding="utf-8"))
    given = SpecConfig(**values["input"]) if values.get("input") else None
    return scheme_from(SchemeConfig(values["name"], SpecConfig(**values["weight"]), given))


def plan_from(config: RunConfig) -> QuantPlan:
    """Which layer gets which scheme; UserError names every unknown or impossible one."""
    problems: list[str] = []
    own = collected(problems, scheme_from, config.scheme)

    def chosen(where: str, name: str) -> QuantScheme | None:
        return None if name == KEEP else collected(problems, load_scheme, name, where)

    given = enumerate(config.plan.rules)
    rules = tuple(PlanRule(rule.match, chosen(f"plan.rules.{i}.scheme", rule.scheme)) for i, rule in given)
    embedding = own if config.plan.embedding == SAME else chosen("plan.embedding", config.plan.embedding)
    if problems or own is None:
        raise UserError(*problems)
    return QuantPlan(rules, own, embedding)


def kv_spec(config: KvConfig) -> KvSpec | None:
    """The grid of keys and values, scales taken at run time; None for a float cache."""
    if config.bits is None:
        return None
    spec = spec_from(SpecConfig(config.bits, config.symmetric, "token", dynamic=True), "kv", is_activation=True)
    return KvSpec(spec, config.key_axis, config.group_size, config.sink_tokens, config.recent_tokens)
