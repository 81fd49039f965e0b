"""Do the tests and the conformance kit notice? Faults put into the package, one at a time.

    python tools/faults.py seeded [PART OF A NAME]   tools/seeded.py: plausible mistakes, by hand
    python tools/faults.py mutate MODULE...          tools/mutants.py: every small change there is

A fault is the changed code of one module, never written to disk: PyTorch and pytest are imported
once, each fault gets a forked process of its own, and an import hook there serves the changed code.
So the working tree stays as it is and faults are tried side by side. `seeded` fails (exit status 1)
where a fault is not caught by the test named for it and by the kit, `mutate` where a score is below
95 %. With --write they put what they found into docs/verification.md.

mutmut was considered: it skips module-level code and decorated functions, where the constants of
Philox and the registered operators are.
"""

from __future__ import annotations

import argparse
import gc
import importlib.machinery
import json
import math
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

with warnings.catch_warnings():  # everything slow, for all processes; nothing of the package
    warnings.simplefilter("ignore")
    import hypothesis.internal.conjecture.engine  # noqa: F401
    import pytest
    import torch
    import torch._dynamo  # noqa: F401
    import torch.testing  # noqa: F401

from tools import mutants, seeded  # noqa: E402

os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"

LIMIT = 300  # seconds of the processor until a process counts as hanging, which is noticed
MEMORY = 12 << 30
# As few as will do: they are imported, and look for garbage, once for every fault.
PLUGINS = ["-p", "_hypothesis_pytestplugin", "-p", "no:cacheprovider",
           "-p", "no:unraisableexception", "-p", "no:threadexception",
           "-o", "addopts=", "-m", "not slow and not peer"]  # fmt: skip
VECTORS = ROOT / "tests" / "vectors"
RESULTS = ROOT / "tools" / "mutation.json"
REPORT = ROOT / "docs" / "verification.md"

# The tests that `mutate` asks about each module; none of them is there to test the tests.
KIT = ["verify/test_conformance.py::test_a_right_port_passes_every_case",
       "verify/test_conformance.py::test_the_vectors_in_the_repository_are_these"]  # fmt: skip
# What takes long and is about the C++ core, the machine, or the tests: not about these modules.
SLOW = ("instruction_set or large_shapes or half_precision or used_twice or catches_something "
        "or by_hand or below_the_evidence or bootstrap_intervals_cover")  # fmt: skip
TESTS = {
    "core.philox": ["core/test_noise.py", *KIT],
    "core.noise": ["core/test_noise.py", "core/test_adapter.py", *KIT],
    "core.layer": ["fast/test_ops.py", *KIT],
    "core.objective": ["core/test_objective.py", "training/test_trainer.py", *KIT],
    "core.predictive": ["evaluation/test_predict.py", *KIT],
    "fast.normals": ["core/test_noise.py", "core/test_adapter.py", *KIT],
    "verify.reference": ["verify/test_reference.py", "fast/test_ops.py::test_equals_the_reference",
                  "fast/test_ops.py::test_gradients_equal_the_reference", "core/test_objective.py",
                  "evaluation/test_predict.py::test_predictive_equals_the_reference", KIT[1]],
    "fast.ops": ["fast/test_ops.py", "fast/test_linear.py",
                 "verify/test_reference.py::test_defaults_are_those_of_the_op", KIT[0]],
    "evaluation.metrics": ["evaluation/test_metrics.py", *KIT],
    "core.adapter": ["core/test_adapter.py", "core/test_priors.py", "methods/test_contract.py",
                     *KIT],
    "model.llama": ["model/test_llama.py", "fast/test_plain.py", *KIT],
    "training.trainer": ["training/test_trainer.py", *KIT],
    "training.schedule": ["training/test_schedule.py", "training/test_trainer.py", *KIT],
    **{f"methods.{name}": [f"methods/test_{name}.py", "methods/test_contract.py", *KIT]
       for name in ("blob", "dropout", "ensemble", "full", "laplace", "map", "subspace", "swag",
                    "tfb")},
    "methods.point": [f"methods/test_{name}.py" for name in ("point", "subspace", "contract")],
    "methods.evidence": ["methods/test_subspace.py", *KIT],
    "fast.blocks": ["fast/test_blocks.py", *KIT],
    "fast.attention": ["fast/test_attention.py", *KIT],
    "fast.rows": ["fast/test_plain.py", "evaluation/test_predict.py", "model/test_llama.py"],
    "fast.quantize": ["fast/test_quantize.py", "fast/test_packing.py"],
    "fast.designs": ["core/test_noise.py", "core/test_adapter.py", "evaluation/test_predict.py"],
    "model.attach": ["model/test_llama.py", "core/test_adapter.py"],
    "model.config": ["model", *KIT],
    "model.inputs": ["model/test_llama.py", "fast/test_plain.py", "evaluation/test_predict.py"],
    "model.weights": ["model", "support", "fast/test_packing.py", "app/cli/test_mistakes.py"],
    **{f"data.{name}": ["data", "evaluation/test_classifier.py"]
       for name in ("answers", "batches", "chat", "formats", "prompts", "rows", "tokenizer")},
    **{f"evaluation.{name}": [f"evaluation/test_{name}.py", "evaluation/test_evaluate.py"]
       for name in ("comparison", "decisions", "inference", "quadrature", "report", "sequential",
                    "threshold")},
    **{f"evaluation.{name}": ["evaluation/test_predict.py", "evaluation/test_classifier.py",
                              "evaluation/test_generate.py", "evaluation/test_evaluate.py",
                              "evaluation/test_answering.py", "evaluation/test_rule.py",
                              "evaluation/test_stream.py", "app/cli/test_decisions.py",
                              "app/cli/test_evaluate.py", "app/cli/test_mistakes.py"]
       for name in ("answering", "classifier", "evaluate", "generate", "predict", "rule",
                    "stream")},
    **{f"interop.{name}": ["interop/test_peft.py", "interop/test_official.py",
                           "interop/test_exporting.py", "interop/test_importing.py"]
       for name in ("exporting", "importing", "layers", "official", "peft")},
    **{f"training.{name}": [f"training/test_{name}.py", "training/test_watch.py",
                            "training/test_trainer.py", "app/cli/test_train.py",
                            "app/cli/test_runs.py"]
       for name in ("loop", "runs", "savepoints", "watch")},
    **{f"support.{name}": ["support", "model/test_weights.py", "training/test_runs.py",
                           "training/test_savepoints.py", "interop/test_peft.py"]
       for name in ("fields", "files", "folders", "hub", "tensors")},
    "interop.card": ["interop/test_card.py"],
    "interop.hf": ["interop/test_hf.py"],
    "data.text": ["data/test_text.py", "data/test_formats.py"],
    **{f"evaluation.{name}": ["evaluation/test_charts.py", "evaluation/test_plots.py",
                              "evaluation/test_report.py"] for name in ("charts", "plots")},
    **{f"evaluation.{name}": ["evaluation/test_tables.py", "app/study"]
       for name in ("papers", "tables")},
    **{f"app.{name}": [f"app/test_{name}.py"] for name in ("demo", "server", "workers")},
    "app.plan": ["app/test_plan.py", "app/cli/test_plan.py"],
    "app.configs": ["app/cli/test_count.py"],
    **{f"app.study.{name}": ["app/study", "app/cli/test_study.py"]
       for name in ("config", "costs", "jobs", "methods", "paper", "plugins", "sets")},
    **{f"app.cli.{name}": [f"app/cli/test_{test}.py" for test in tests.split()]
       for name, tests in {
           "calibrate": "decisions serve mistakes", "conformance": "conformance main mistakes",
           "count": "count main mistakes", "demo": "demo options", "evaluate": "evaluate decisions",
           "export": "export runs posterior mistakes", "generate": "generate mistakes",
           "import_": "import runs posterior mistakes talk", "info": "info main",
           "loggers": "talk main", "options": "options mistakes train main",
           "output": "main talk", "parser": "options main mistakes", "plan": "plan mistakes",
           "posterior": "posterior posterior_answers mistakes", "predict": "predict mistakes",
           "runs": "runs predict mistakes", "serve": "serve mistakes", "study": "study mistakes",
           "talk": "talk train", "threshold": "decisions predict mistakes",
           "train": "train talk mistakes runs", "verify": "verify main"}.items()},
}  # fmt: skip


# --- Processes ----------------------------------------------------------------------------------


class Changed(importlib.machinery.PathFinder):
    """Serves `code` as the module `name`, and every other module as it is."""

    def __init__(self, name: str, code: CodeType) -> None:
        self.name, self.code = f"scalabl_ref.{name}", code

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        spec = super().find_spec(name, path, target)
        if spec and name == self.name:
            spec.loader.get_code = lambda _: self.code
        return spec


class Task(NamedTuple):
    """What one process does: `work` with the package changed, its result any JSON value.

    change: the module and its code, made in the process; None leaves the package as it is.
    """

    key: Any
    change: Callable[[], tuple[str, CodeType]] | None
    work: Callable[[], Any]
    limit: float = LIMIT


def in_processes(tasks: Iterator[Task], jobs: int) -> Iterator[tuple[Any, Any]]:
    """Run the tasks, `jobs` at a time; yields (key, result) as they end.

    The result of a process that a signal ended is that signal's name.
    """
    keys: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        while True:
            while len(keys) < jobs and (task := next(tasks, None)) is not None:
                sys.stdout.flush()
                gc.freeze()
                pid = os.fork()
                if pid == 0:
                    _child(task, Path(folder))
                keys[pid] = task.key
            if not keys:
                return
            pid, status = os.wait()
            answer = Path(folder) / f"{pid}.json"
            if os.WIFSIGNALED(status):
                result: Any = signal.Signals(os.WTERMSIG(status)).name
            else:
                result = json.loads(answer.read_text())
            yield keys.pop(pid), result


def _child(task: Task, folder: Path) -> None:
    seconds = math.ceil(task.limit)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(3 * seconds)  # for what sleeps
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    output = os.open(folder / f"{os.getpid()}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        if task.change is not None:
            sys.meta_path.insert(0, Changed(*task.change()))
        result = task.work()
    except BaseException:
        result = {"error": traceback.format_exc()}
    (folder / f"{os.getpid()}.json").write_text(json.dumps(result))
    os._exit(0)


# --- Who notices --------------------------------------------------------------------------------


class Plugin:
    """Sorts the tests, times them, and remembers the first that failed."""

    def __init__(self, cost: Callable[[str], float]) -> None:
        self.cost, self.seconds, self.caught = cost, Counter[str](), ""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: self.cost(item.nodeid))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.caught = self.caught or f"{report.nodeid} (import)"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.caught = self.caught or report.nodeid


def run_tests(
    tests: Sequence[str], profile: str, cost: Callable[[str], float] = lambda _: 0.0
) -> dict[str, Any]:
    """Run until one fails: caught (which, or ""), seconds of the processor, and of each test."""
    start, plugin = time.process_time(), Plugin(cost)
    os.chdir(ROOT / "tests")
    arguments = ["-x", "-q", "--assert=plain", f"--hypothesis-profile={profile}", *PLUGINS]
    status = pytest.main([*arguments, *tests], [plugin])
    caught = plugin.caught or ("" if status == pytest.ExitCode.OK else "import")
    return {"caught": caught.removeprefix("tests/"), "seconds": time.process_time() - start,
            "each": plugin.seconds}  # fmt: skip


# Ways to compute: the fast bodies with the native core, the plain ones, and the fast ones without
# the native core, which stays away from then on.
BODIES = ("native", "plain", "PyTorch")


def run_kit() -> dict[str, Any]:
    """Grade the package as a port, with each of its `BODIES`, against the stored vectors."""
    start = time.process_time()
    caught = next(filter(None, map(_first_failure, BODIES)), "")
    return {"caught": caught, "seconds": time.process_time() - start}


def _first_failure(body: str) -> str:
    """A case that fails, or else a level that cannot be computed, or ""."""
    from scalabl_ref import fast
    from scalabl_ref.fast import native
    from scalabl_ref.support.tensors import save_tensors
    from scalabl_ref.verify.conformance import check
    from tests.own_port import cases, port

    if body == "PyTorch":
        native.core = lambda: None
    results, problem = {}, ""
    with fast.plain() if body == "plain" else nullcontext():
        for level in dict.fromkeys(case["level"] for case, _ in cases(VECTORS)):
            try:
                results.update(port(VECTORS, torch.float32, levels={level}))
            except Exception as error:  # a port that cannot run is no port
                problem = problem or f"{level}: {type(error).__name__}"
    with tempfile.TemporaryDirectory() as folder:
        save_tensors(Path(folder) / "outputs.safetensors", results.items())
        grades, _ = check(VECTORS, Path(folder) / "outputs.safetensors")
    return next((grade.id for grade in grades if not grade.passed), problem)


# --- The catalogue ------------------------------------------------------------------------------


def run_seeded(part: str, jobs: int, write: bool) -> int:
    faults = [fault for fault in seeded.FAULTS if part in fault.name]
    start = time.perf_counter()
    properties = sorted({fault.property for fault in faults})

    def work(tests: Sequence[str]) -> Callable[[], Any]:
        return lambda: {"property": run_tests(tests, "faults"), "kit": run_kit()}

    ((_, right),) = in_processes(iter([Task(None, None, work(properties))]), 1)
    if "error" in right or right["property"]["caught"] or right["kit"]["caught"]:
        print(f"without any fault: {right}")
        return 1
    tasks = (Task(f, f.change, work([f.property])) for f in faults)
    rows, bad = {}, 0
    for fault, got in in_processes(tasks, jobs):
        if "error" in got:
            print(f"{fault.name}: {got}")
            return 1
        by, kit = got["property"], got["kit"]
        missed = [who for who, result in (("property", by), ("kit", kit)) if not result["caught"]]
        bad += bool(missed)
        print(f"{len(rows) + 1:3} {fault.name}: {by['caught']}, {kit['caught']}",
              *(f"NOT CAUGHT by the {who}" for who in missed))  # fmt: skip
        rows[fault] = (
            f"| {fault.name} | {fault.module} | {_code(by['caught'])} | {by['seconds']:.1f} "
            f"| {_code(kit['caught'])} | {kit['seconds']:.1f} |"
        )
    seconds = time.perf_counter() - start
    print(f"{len(rows) - bad} of {len(rows)} faults caught by both, {seconds:.0f} s")
    if write:
        write_section("Seeded faults", _seeded_text([rows[f] for f in faults], bad, seconds))
    return int(bad > 0)


def _code(name: str) -> str:
    return f"`{name.split('::')[-1][:60]}`" if name else "**missed**"


def _seeded_text(rows: list[str], bad: int, seconds: float) -> str:
    return f"""\
`python tools/faults.py seeded` puts the mistakes of `tools/seeded.py` into the package one by one
(in memory). For each it runs the test that should detect it, and the conformance kit: the package's
results with the native core, with the fast bodies in PyTorch and with the plain bodies, graded
against `tests/vectors`.
{date.today():%Y-%m}: {len(rows) - bad} of {len(rows)} caught by both, in {seconds:.0f} s
on two cores. Seconds are processor time, until the test has failed and until the kit is done. If a
level could not be computed, the kit's column has the level and the error.

| fault | module | caught by the property | s | caught by the kit's case | s |
|---|---|---|---|---|---|
""" + "\n".join(rows)


# --- Mutation testing ---------------------------------------------------------------------------


def run_mutation(modules: Sequence[str], jobs: int, step: int, again: bool, write: bool) -> int:
    """Try the mutants of the modules, or `again` those that lived; returns 1 for a score below .95.

    tools/mutation.json keeps those that live, and why no test can notice them, which is written
    there by hand: "" counts against the score.
    """
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for module in modules:
        found = mutants.mutants(seeded.path(module).read_text())
        chosen: Sequence[int] = range(0, len(found), step)
        record = {"all": len(found), "tried": len(chosen)}
        if again:
            record = results[module]
            chosen = [i for i, mutant in enumerate(found) if str(mutant) in record["alive"]]
        why = results.get(module, {}).get("alive", {})
        alive = [str(found[i]) for i in _mutate(module, found, chosen, jobs)]
        results[module] = {**record, "alive": {name: why.get(name, "") for name in alive}}
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    text, worst = _mutation_text(results)
    print(text)
    if write:
        write_section("Mutation testing", text)
    return int(worst < 0.95)


def _mutate(
    module: str, found: list[mutants.Mutant], chosen: Sequence[int], jobs: int
) -> list[int]:
    """Those of the chosen mutants that no test noticed."""
    tests = [*TESTS[module], "-k", f"not ({SLOW})"]
    ((_, right),) = in_processes(iter([Task(None, None, lambda: run_tests(tests, "faults"))]), 1)
    if "error" in right or right["caught"]:
        raise SystemExit(f"{module}, without any change: {right}")
    print(f"{module}: {right['seconds']:.0f} s without a change", flush=True)
    seconds, kills, start = right["each"], Counter[str](), time.perf_counter()
    # Cheap tests first, and those that caught others; -x ends a run at the first that fails.
    cost = lambda name: seconds.get(name, 0.0) / (1 + kills[name])  # noqa: E731
    tasks = (
        Task(i, lambda i=i: (module, mutants.changed(found, i)),
             lambda: run_tests(tests, "faults", cost), 2 * right["seconds"] + 10)
        for i in chosen
    )  # fmt: skip
    alive = []
    for done, (i, got) in enumerate(in_processes(tasks, jobs), 1):
        caught = got if isinstance(got, str) else got.get("caught", "cannot be compiled")
        if isinstance(got, str):
            print(f"  {got}: {module} {found[i].line}: {found[i]}", flush=True)
        kills[f"tests/{caught}"] += 1
        if not caught:
            alive.append(i)
            print(f"  alive: {module} {found[i].line}: {found[i]}", flush=True)
        if done % 50 == 0 or done == len(chosen):
            elapsed = time.perf_counter() - start
            print(f"{module}: {done} of {len(chosen)}, {len(alive)} alive, {elapsed:.0f} s",
                  flush=True)  # fmt: skip
    return sorted(alive)


def _mutation_text(results: dict[str, Any]) -> tuple[str, float]:
    """The section, and the smallest score."""
    rows, lists, worst = [], [], 1.0
    for module, result in results.items():
        reasons = result["alive"].items()
        missed = sum(not reason for _, reason in reasons)
        counted = result["tried"] - len(reasons) + missed
        score = (counted - missed) / counted
        worst = min(worst, score)
        rows.append(f"| {module} | {result['all']} | {result['tried']} | {counted - missed} "
                    f"| {len(reasons) - missed} | {missed} | {100 * score:.1f} % |")  # fmt: skip
        lists += [f"\n{module}:\n"] * bool(reasons)
        lists += [f"* `{mutant}`: {reason or '**not noticed**'}" for mutant, reason in reasons]
    text = f"""\
`python tools/faults.py mutate MODULE...` makes every small change of `tools/mutants.py` in a module
(operators exchanged, terms, statements, calls, keywords, bounds and branches left out, constants
moved, arguments and related functions exchanged) and runs the tests of that module until one fails.
Hypothesis draws 20 examples, the same every time, and slow tests of the C++ core and of chance are
left out: the suite itself is the stricter. A process that crashes, or takes more than twice the
processor's time of the tests without a change, has noticed too.
Score: noticed / (tried - unobservable), {date.today():%Y-%m}; a module's row is of its last run.
Where fewer than all mutants were tried, the row is a sample: every sixth was tried. Its score is an
estimate of the score of all.

| module | mutants | tried | noticed | unobservable | not noticed | score |
|---|---|---|---|---|---|---|
""" + "\n".join(rows)
    return text + "\n\nThose that live, and why:\n" + "\n".join(lists), worst


# --- The report ---------------------------------------------------------------------------------


def write_section(title: str, text: str) -> None:
    """Replace or append one `## title` section of docs/verification.md."""
    whole = REPORT.read_text() if REPORT.exists() else "# Verification\n"
    section = f"## {title}\n\n{text.strip()}\n"
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.M | re.S)
    if pattern.search(whole):
        whole = pattern.sub(lambda _: section + "\n", whole)
    else:
        whole = f"{whole.rstrip()}\n\n{section}"
    REPORT.write_text(whole.rstrip() + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--write", action="store_true", help="write docs/verification.md")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("seeded").add_argument("part", nargs="?", default="")
    mutate = commands.add_parser("mutate")
    mutate.add_argument("modules", nargs="*", choices=[*TESTS, []])
    mutate.add_argument("--step", type=int, default=1, help="only every n-th mutant")
    mutate.add_argument("--again", action="store_true", help="only those that lived last time")
    arguments = parser.parse_args()
    if arguments.command == "seeded":
        return run_seeded(arguments.part, arguments.jobs, arguments.write)
    a = arguments
    return run_mutation(a.modules, a.jobs, a.step, a.again, a.write)


if __name__ == "__main__":
    sys.exit(main())
