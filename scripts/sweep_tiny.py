"""The sweep whose report is in docs/results/sweep_tiny: six short trials of a tiny model made from a fixed seed.

    python scripts/sweep_tiny.py [--parallel 2]

Model, tokenizer and text are those of the tests. Everything is made under build/; the report is copied from there.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from qat.cli.main import main as qat

ROOT = Path(__file__).resolve().parents[1]
SWEEP = ROOT / "docs" / "results" / "sweep_tiny"
SPACE = """\
# Two schemes and the learning rate, in six trials
name: sweep_tiny
space:
  - {key: scheme, values: [w4a16_row, w2a16_g32]}
  - {key: optim.lr, kind: float, low: 3e-4, high: 3e-2, log: true}
record: [bits_per_weight, bytes.packed, tokens_per_second]
trials: 6
pruning: {kind: median, warmup_steps: 8, startup_trials: 2}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parallel", type=int, default=1, help="trials side by side")
    parallel = parser.parse_args().parallel
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import make_llama, make_tokenizer, paragraphs

    work = ROOT / "build" / "sweep_tiny"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    model = make_llama(work / "model", make_tokenizer())
    (work / "stories.txt").write_text("\n\n".join(paragraphs(400, seed=2)) + "\n", encoding="utf-8")
    (work / "sweep.yaml").write_text(SPACE)
    paths = [f"model.path={model}", f"data.path={work / 'stories.txt'}", f"runs_dir={work / 'runs'}"]
    steps = ["trainer.max_steps=40", "trainer.eval_every=4", "trainer.batch_size=8", "trainer.threads=1"]
    more = ["data.eval_tokens=4096", "distill=ce", "evaluate.baselines=false", f"sweep.parallel={parallel}"]
    code = qat(["sweep", "recipe=tiny", f"sweep={work / 'sweep.yaml'}", *paths, *steps, *more])
    if code == 0:
        shutil.rmtree(SWEEP, ignore_errors=True)
        made = work / "runs" / "sweep_tiny"
        shutil.copytree(made / "figures", SWEEP / "figures")
        for name in ("report.md", "results.json"):
            shutil.copy(made / name, SWEEP / name)
        print(f"copied to {SWEEP}")
    return code


if __name__ == "__main__":
    sys.exit(main())
