"""Tiny Hugging Face models with a plan on them, ready to train, pack and serve."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from qat.config import conf_dir, load_scheme
from qat.insert import Coverage, FakeQuantOptions, insert
from qat.nn.quant import quantized_weights
from qat.scheme import PlanRule, QuantPlan, QuantScheme
from qat.train.calibrate import calibrate

SCHEMES = sorted(file.stem for file in (conf_dir() / "scheme").glob("*.yaml"))
IDS = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(3))


@cache
def _loaded(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def float_model(folder: Path):
    """A float32 model in eval mode that the test may change."""
    return copy.deepcopy(_loaded(folder))


def scheme_named(name: str) -> QuantScheme:
    """A scheme of conf/scheme; groups of 128 become 64, which is as wide as the tiny models are."""
    scheme = load_scheme(name)
    if scheme.weight.group_size == 128:
        return replace(scheme, weight=replace(scheme.weight, group_size=64))
    return scheme


def plan(scheme: str = "w4a16_g32", embedding: str | None = "w8a16", rules: dict[str, str | None] | None = None):
    """A QuantPlan from names of schemes; None keeps."""

    def find(name: str | None) -> QuantScheme | None:
        return None if name is None else scheme_named(name)

    given = tuple(PlanRule(glob, find(name)) for glob, name in (rules or {}).items())
    return QuantPlan(given, scheme_named(scheme), find(embedding))


def trained(folder: Path, scheme: str, estimator: str = "ste_clipped", scale: str = "dynamic", **plan_parts):
    """A model as it is after training: planned, calibrated, with learned parameters off their start."""
    model = float_model(folder)
    observer = "minmax" if scale == "dynamic" else "mse"
    coverage: Coverage = insert(model, plan(scheme, **plan_parts), FakeQuantOptions(estimator, scale, observer))
    calibrate(model, IDS, 2)
    generator = torch.Generator().manual_seed(4)
    for _, _, fake_quant in quantized_weights(model):
        for shift in (fake_quant.scale_shift, fake_quant.zero_shift):
            if shift is not None:
                shift.data.uniform_(-0.2, 0.2, generator=generator)
    return model, coverage


@torch.no_grad()
def logits(model, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits
