"""Sensitivity of single layers, the choice for a budget, and the plan that comes out of it."""

from __future__ import annotations

import itertools
import json
import random

import pytest
import torch
import yaml
from quant_models import IDS, float_model, plan, scheme_named
from tiny_runs import lines_of, read, tiny_run

from qat.cli.compose import compose_run
from qat.config import RunConfig
from qat.errors import UserError
from qat.evaluate.perplexity import score
from qat.insert import FakeQuantOptions, insert
from qat.sensitivity.allocate import allocate, budget_bytes
from qat.sensitivity.measure import (
    LINES,
    Sensitivity,
    check_candidates,
    layers_that_share_inputs,
    measure,
    resumed,
    rounded,
    units,
)

FOLDERS = ["tiny_model_dir", "tiny_gpt2_dir", "tiny_mixtral_dir"]
SCHEMES = ["w2a16_g32", "w4a16_g64", "w8a16"]


def brute_force(costs, sizes, budget):
    """The least cost over all choices within the budget."""
    names = [list(cost) for cost in costs]
    sums = (
        sum(cost[name] for cost, name in zip(costs, choice, strict=True))
        for choice in itertools.product(*names)
        if sum(size[name] for size, name in zip(sizes, choice, strict=True)) <= budget
    )
    return min(sums)


@pytest.mark.parametrize("seed", range(20))
def test_allocation_is_the_best_of_all_choices(seed):
    draw = random.Random(seed)
    sizes = [{name: draw.randint(1, 40) * 384 for name in "abc"} for _ in range(6)]
    costs = [{name: draw.random() for name in "abc"} for _ in range(6)]
    low, high = (sum(pick(size.values()) for size in sizes) for pick in (min, max))
    budget = draw.randint(low, high)
    chosen = allocate(costs, sizes, budget)
    assert sum(size[name] for size, name in zip(sizes, chosen, strict=True)) <= budget
    total = sum(cost[name] for cost, name in zip(costs, chosen, strict=True))
    assert total == pytest.approx(brute_force(costs, sizes, budget))


def test_allocation_holds_the_budget_when_steps_are_coarse(monkeypatch):
    monkeypatch.setattr("qat.sensitivity.allocate.MAX_STEPS", 100)
    draw = random.Random(0)
    sizes = [{name: draw.randint(1, 10**6) for name in "abc"} for _ in range(6)]
    costs = [{name: 1 / size for name, size in unit.items()} for unit in sizes]
    low, high = (sum(pick(size.values()) for size in sizes) for pick in (min, max))
    for budget in (low, low + 1, (low + high) // 2, high):
        chosen = allocate(costs, sizes, budget)
        assert sum(size[name] for size, name in zip(sizes, chosen, strict=True)) <= budget


def test_budget_counts_bytes_and_refuses_what_cannot_be_met():
    sizes = [{"small": 10, "large": 20}, {"small": 30, "large": 60}]
    assert budget_bytes(4.0, sizes, 100) == 50
    assert budget_bytes(4.0, sizes, 110, rest=5) == 50
    with pytest.raises(UserError, match=r"^--budget: the smallest candidates take 3.200 .* got 3.1. Use --budget 3.21"):
        budget_bytes(3.1, sizes, 100)
    with pytest.raises(UserError, match=r"the largest candidates take 6.400: nothing to choose, got 6.4"):
        budget_bytes(6.4, sizes, 100)


@pytest.mark.parametrize("folder", FOLDERS)
def test_kl_is_that_of_a_whole_model_with_one_layer_rounded(folder, request):
    folder = request.getfixturevalue(folder)
    model = float_model(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = units(model, plan())
    assert {unit.block for unit in found} == {0, 1}
    sensitivity, scheme = Sensitivity(model, IDS), scheme_named("w2a16_g32")
    for unit in (found[0], found[-1]):
        whole = float_model(folder)
        site = unit.sites[0]
        weight = whole.get_parameter(site.layer.name)
        weight.data = rounded(weight.data, scheme.weight, site.transposed)
        # `score` leaves the last token of a window out
        last = torch.cat([IDS, IDS[:, :1]], 1)
        wanted = score(whole, last, 2, "fp32", reference=float_model(folder)).kl
        assert sensitivity.kl(unit, scheme) == pytest.approx(wanted, rel=1e-3)
        assert wanted > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_quantized_inputs_are_part_of_a_candidate(tiny_model_dir):
    model = float_model(tiny_model_dir)
    unit, scheme = units(model, plan())[0], scheme_named("w4a8_g32")
    both = Sensitivity(model, IDS).kl(unit, scheme)
    weights_alone = Sensitivity(model, IDS).kl(unit, scheme_named("w4a16_g32"))
    assert both != weights_alone


def test_rounding_has_the_range_that_calibrated_training_layers_have(tiny_model_dir):
    model = float_model(tiny_model_dir)
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight").data.clone()
    insert(model, plan("w3a16_g64"), FakeQuantOptions("ste_clipped", "static", "mse"))
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    layer.weight_fake_quant.observer.observe(layer.weight)
    layer.weight_fake_quant.adopt_observed()
    y = layer.weight_fake_quant(layer.weight, torch.float32)
    assert torch.equal(rounded(weight, scheme_named("w3a16_g64").weight), y)


def test_layers_that_read_one_tensor_become_one_unit(tiny_model_dir):
    model = float_model(tiny_model_dir)
    shared = layers_that_share_inputs(model, plan(), IDS)
    attention = {f"model.layers.1.self_attn.{part}_proj" for part in "qkv"}
    mlp = {f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up")}
    assert attention in shared
    assert mlp in shared
    assert len(shared) == 4
    found = units(model, plan(), shared)
    assert len(found) == 8
    assert sum(unit.weights for unit in found) == sum(unit.weights for unit in units(model, plan()))


def test_layers_of_a_rule_are_left_out(tiny_model_dir):
    names = [unit.names[0] for unit in units(float_model(tiny_model_dir), plan(rules={"*.0.*": None}))]
    assert len(names) == 7
    assert all(".1." in name for name in names)
    with pytest.raises(UserError, match="needs layers in the decoder blocks"):
        units(float_model(tiny_model_dir), plan(rules={"*": None}))


def test_candidates_must_fit_every_layer(tiny_model_dir):
    found = units(float_model(tiny_model_dir), plan())
    with pytest.raises(UserError, match="multiple of group_size=128") as caught:
        from qat.config import load_scheme

        check_candidates(found, [load_scheme("w4a16_g128"), load_scheme("w8a8_static")])
    assert any("inputs must be dynamic or float" in line for line in caught.value.problems)


def test_measurement_goes_on_behind_the_last_whole_line(tiny_model_dir, tmp_path):
    model = float_model(tiny_model_dir)
    found, schemes = units(model, plan())[:2], [scheme_named(name) for name in SCHEMES]
    sensitivity, facts = Sensitivity(model, IDS), {"model": "m"}
    whole = measure(sensitivity, found, schemes, facts, tmp_path)
    lines = (tmp_path / LINES).read_text().splitlines()
    assert len(lines) == 1 + 2 * 3
    # a line that was being written when the process was killed, and a KL that only reading can give
    first = json.loads(lines[1]) | {"kl": 123.0}
    (tmp_path / LINES).write_text("\n".join([lines[0], json.dumps(first), lines[2], lines[3][:20]]))
    again = measure(sensitivity, found, schemes, facts, tmp_path)
    assert again.pop((found[0].names, SCHEMES[0])) == 123.0
    assert again == {key: kl for key, kl in whole.items() if key != (found[0].names, SCHEMES[0])}
    with pytest.raises(UserError, match="must be of this measurement to go on with it, got another model"):
        resumed(tmp_path / LINES, {"model": "n"})
    (tmp_path / LINES).write_text("[]\n")
    with pytest.raises(UserError, match="must hold measurements"):
        resumed(tmp_path / LINES, facts)


def test_command_measures_solves_and_its_plan_trains(qat, tiny_model_dir, tiny_text, tmp_path, monkeypatch):
    from tiny_runs import same_process

    from qat import pipeline

    out, file = tmp_path / "out", tmp_path / "plan.yaml"
    words = ["recipe=tiny", f"model.path={tiny_model_dir}", f"data.path={tiny_text}", "--windows", "2"]
    words += ["--candidates", ",".join(SCHEMES), "--out", out, "--write", file, "--share-inputs"]
    code, text, error = qat("sensitivity", *words, "--budget", "4.6")
    assert code == 0, error
    assert "about 18 forward passes over 64 tokens" in error
    assert (out / "figures/sensitivity.png").read_bytes().startswith(b"\x89PNG")
    content = read(out, "sensitivity.json")
    assert content["candidates"] == SCHEMES
    size = sum(unit["bytes"][unit["chosen"]] for unit in content["layers"])
    weights = sum(unit["weights"] for unit in content["layers"])
    assert 4.25 < 8 * size / weights <= 4.6

    monkeypatch.setattr(pipeline, "_fresh_process", same_process)
    run = tiny_run(tmp_path, tiny_model_dir, tiny_text, f"plan={file}")
    chosen = {f"{name}.weight": unit["chosen"] for unit in content["layers"] for name in unit["names"]}
    layers = {layer["name"]: layer for layer in read(run, "coverage.json")["layers"]}
    assert {name: layers[name]["scheme"] for name in chosen} == chosen
    assert sum(layers[name]["bytes"] for name in chosen) == size
    assert len(set(chosen.values())) > 1
    assert read(run, "parity.json")["verdict"] == "equal"
    assert "<h2>Sensitivity</h2>" in (run / "report.html").read_text()

    with pytest.raises(UserError, match=r"^plan.sensitivity: must be a file, got 'no.json'"):
        tiny_run(tmp_path / "other", tiny_model_dir, tiny_text, f"plan={file}", "plan.sensitivity=no.json")
    assert not (tmp_path / "other").exists()

    # solved again without measuring, now with everything counted
    measured = (out / LINES).read_text()
    code, text, error = qat("sensitivity", *words, "--budget", "6", "--whole-model")
    assert code == 0, error
    assert (out / LINES).read_text() == measured
    bits = float(text.partition("whole model: ")[2].split()[0])
    assert 5 < bits <= 6


REFUSED = {
    ("--budget", "2"): r"--budget: the smallest candidates take 2\.500 bits per weight, got 2",
    ("--budget", "9"): "nothing to choose, got 9",
    ("--candidates", "w4a16_g65"): "--candidates: must be a file in conf/scheme",
    ("--candidates", "w4a16_g128"): "multiple of group_size=128",
    ("--windows", "0"): "--windows: must be at least 1, got 0",
    ("--length", "-1"): "--length: must be at least 1, got -1",
    ("--write", "x.yaml"): "--write: needs a budget",
    ("--whole-model",): "--whole-model: needs a budget",
}


@pytest.mark.parametrize("words", REFUSED)
def test_command_refuses_before_any_work(qat, tiny_model_dir, tiny_text, tmp_path, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = ["recipe=tiny", f"model.path={tiny_model_dir}", f"data.path={tiny_text}"]
    candidates = [] if "--candidates" in words else ["--candidates", ",".join(SCHEMES)]
    code, _, error = qat("sensitivity", *overrides, *candidates, *words)
    assert code == 2
    assert any(REFUSED[words].replace("\\", "") in line for line in lines_of(error)), error
    assert list(tmp_path.iterdir()) == []


def test_plan_may_be_a_file_of_the_users_own(tmp_path):
    file = tmp_path / "mine (1).yaml"
    file.write_text("# mine\nembedding: keep\nrules:\n  - {match: '*.0.*', scheme: w8a16}\n")
    run = compose_run(["model.path=m", "data.path=d", f"plan={file}", "plan.max_unsupported=0.2"])
    assert [vars(rule) for rule in run.plan.rules] == [{"match": "*.0.*", "scheme": "w8a16"}]
    assert (run.plan.embedding, run.plan.max_unsupported) == ("keep", 0.2)
    assert isinstance(run, RunConfig)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("rules: [{match: x, shceme: keep}]", r"plan.rules.0.shceme: must be a setting"),
        ("embeding: keep", r"plan.embeding: must be a setting.*Did you mean 'plan.embedding'\?"),
        ("plan: {embedding: keep}", "plan.plan.embedding: must be a setting"),
        ("rules: [{match: x, scheme: w9}]", "plan.rules.0.scheme: must be a file in conf/scheme"),
        ("- x", "must hold key: value lines"),
    ],
)
def test_plan_file_with_a_mistake_is_refused(tmp_path, text, match):
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=match):
        compose_run(["model.path=m", "data.path=d", f"plan={file}"])
    with pytest.raises(UserError, match=r"no\.yaml: must be a readable YAML file"):
        compose_run(["model.path=m", "data.path=d", f"plan={tmp_path / 'no.yaml'}"])


def test_plan_yaml_quotes_what_yaml_would_read_otherwise():
    from qat.sensitivity.plan import plan_yaml

    text = plan_yaml("title", [("*.0.*", "keep"), ("a.b", "w8a16")], "w8a16", "a: b.json")
    assert text.startswith("# title\n")
    assert yaml.safe_load(text) == {
        "embedding": "w8a16",
        "sensitivity": "a: b.json",
        "rules": [{"match": "*.0.*", "scheme": "keep"}, {"match": "a.b", "scheme": "w8a16"}],
    }
