"""Every check of the default run, on every device that is at hand: verdict, controls, coverage, counts."""

from __future__ import annotations

import itertools
import json
import re
import statistics
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("jax")

from omni_torch.thinker import ThinkerLM  # noqa: E402
from parity import checks  # noqa: E402
from parity.checks import Scope  # noqa: E402
from parity.fixtures import CONFIGS, REGIMES, configuration  # noqa: E402
from parity.precision import DEVICES  # noqa: E402
from parity.result import CheckResult, Row, RunResult  # noqa: E402
from parity.verdict import THRESHOLDS, Verdict  # noqa: E402

# What the default run looks at. These may only grow.
CASES = set(itertools.product(CONFIGS, REGIMES, ("float64", "float32", "bfloat16")))
COUNTS = {"configurations": 18, "tensors": 1657, "comparisons": 3251}
UNDETERMINED: dict[tuple[str, str, str, str], tuple[str, ...]] = {}
"""(check, configuration, regime, precision) -> the tensors whose noise is as large as their value. May only shrink."""


@pytest.fixture(scope="session", params=DEVICES)
def run(request, run_on) -> RunResult:
    return run_on(request.param)


def check_of(run: RunResult, name: str) -> CheckResult:
    return next(check for check in run.checks if check.name == name)


def by_case(check: CheckResult) -> dict[tuple[str, str, str], dict[str, Row]]:
    """(configuration, regime, precision) -> rows by name."""
    cases: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in check.rows:
        rows = cases.setdefault((row.config, row.regime, row.precision), {})
        assert row.name not in rows, f"two rows for {row}"
        rows[row.name] = row
    return cases


def parameters(config: str) -> list[str]:
    return [name for name, _ in ThinkerLM.from_config(configuration(config)).named_parameters()]


# --- verdicts and controls -------------------------------------------------------------------------------------------


def test_the_run_agrees(run: RunResult) -> None:
    assert [check.name for check in run.checks] == list(checks.CHECKS)
    assert {check.name: check.error or check.verdict for check in run.checks if check.exit_code} == {}
    assert run.exit_code == 0
    assert run.notes == []


@pytest.mark.parametrize("name", checks.CHECKS)
def test_the_check_agrees(run: RunResult, name: str) -> None:
    check = check_of(run, name)
    assert check.error is None
    assert [row for row in check.deciding if row.verdict not in (Verdict.AGREE, Verdict.UNDETERMINED)] == []
    assert check.verdict is Verdict.AGREE
    assert check.exit_code == 0
    assert check.seconds > 0


@pytest.mark.parametrize(
    ("name", "control"), [(name, control) for name in checks.CHECKS for control in checks.load(name).CONTROLS]
)
def test_the_control_is_shown_and_rejected(run: RunResult, name: str, control: str) -> None:
    shown = [found for found in check_of(run, name).controls if found.name == control]
    assert len(shown) == 1, "a control that is declared must be shown to the check"
    assert shown[0].rejected, shown[0].evidence
    assert shown[0].evidence


@pytest.mark.parametrize("name", checks.CHECKS)
def test_every_control_is_declared(run: RunResult, name: str) -> None:
    assert {found.name for found in check_of(run, name).controls} == set(checks.load(name).CONTROLS)


def test_the_faint_control_passes_where_ports_usually_look(run: RunResult) -> None:
    """A real bug that np.allclose on float32 logits at 1e-3 lets through, rejected here on every tensor."""
    for name in ("logits", "gradients"):
        (control,) = [found for found in check_of(run, name).controls if found.name == "eps 1e-6"]
        assert "np.allclose on float32 logits at 0.001: passes" in control.evidence


# --- coverage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["logits", "gradients"])
def test_every_case_is_covered(run: RunResult, name: str) -> None:
    cases = by_case(check_of(run, name))
    assert set(cases) >= CASES
    assert len(CASES) == 6 * 3 * 3
    for case in CASES:
        assert ("logits" if name == "logits" else "loss") in cases[case], case


@pytest.mark.parametrize("config", CONFIGS)
def test_every_parameter_has_a_gradient_row(run: RunResult, config: str) -> None:
    wanted = {f"gradient {name}" for name in parameters(config)}
    shapes = {
        f"gradient {k}": tuple(v.shape) for k, v in ThinkerLM.from_config(configuration(config)).named_parameters()
    }
    for case, rows in by_case(check_of(run, "gradients")).items():
        if case[0] == config:
            assert set(rows) == wanted | {"loss"}, case
            assert all(rows[name].shape == shapes[name] for name in wanted)


@pytest.mark.parametrize("config", CONFIGS)
def test_there_is_a_tap_after_every_part_of_every_block(run: RunResult, config: str) -> None:
    made = configuration(config)
    parts = ["attn", "moe" if made.use_moe else "mlp"]
    wanted = ["tok_emb", "norm"]
    for i in range(made.n_layers):
        wanted += [f"blocks.{i}", *(f"blocks.{i}.{part}" for part in parts)]
    for case, rows in by_case(check_of(run, "logits")).items():
        if case[0] == config:
            taps = {name.removeprefix("tap "): row for name, row in rows.items() if name.startswith("tap ")}
            assert set(taps) == set(wanted), case
            assert {row.verdict for row in taps.values()} == {Verdict.AGREE}, case


@pytest.mark.parametrize("config", CONFIGS)
def test_the_other_calls_are_covered(run: RunResult, config: str) -> None:
    rows = by_case(check_of(run, "logits"))[config, "randomised", "float64"]
    made = configuration(config)
    assert rows["embeddings"].shape == (6, 11, made.d_model)
    for call, length in {"T = 1": 1, "default positions": 11, "far positions": 11}.items():
        assert rows[call].shape == (6, length, made.vocab_size)
        assert rows[call].verdict is Verdict.AGREE
    assert rows["embeddings"].verdict is Verdict.AGREE


@pytest.mark.parametrize("name", ["adamw", "recipe"])
def test_the_optimizer_is_covered(run: RunResult, name: str) -> None:
    names = {(row.precision, row.name) for row in check_of(run, name).deciding}
    assert {precision for precision, _ in names} - {""} == {"float64", "float32"}
    wanted = {
        "adamw": [
            f"{tensor}: {what} after {n}"
            for tensor in ("matrix", "tiny gradients", "no gradient", "scalar")
            for what in ("displacement", "m", "v")
            for n in (1, 10, 100)
        ],
        "recipe": ["learning rate", "gradient norm", "matrix: clipped gradient", "matrix: displacement"],
    }
    assert names >= set(itertools.product(("float64", "float32"), wanted[name]))
    if name == "recipe":
        own = {"decay mask (jax)", "decay mask (torch)", "learning rate under accumulation (torch)"}
        assert {row for precision, row in names if not precision} == own


def test_third_parties_stand_beside_adamw_and_decide_nothing(run: RunResult) -> None:
    rows = [row for row in check_of(run, "adamw").rows if not row.decides]
    for party in ("torch.optim.AdamW", "optax.adamw"):
        assert {row.precision for row in rows if row.name == party} == {"float64", "float32"}
    for row in rows:
        share = re.match(r"(\d+)% explained by ", row.evidence)
        assert row.verdict is Verdict.AGREE or (share and int(share[1]) > 50), row.evidence


def test_the_layers_alone_are_covered(run: RunResult) -> None:
    rows = {row.name: row for row in check_of(run, "logits").rows if row.regime == "layers alone"}
    assert set(rows) == {
        "ids out of range (jax)", "ids out of range (torch)", "targets out of range (jax)", "targets of int32 (torch)",
        "RMSNorm rounds once", "cos in float32", "sin in float32",
    }  # fmt: skip
    tied = [row for row in check_of(run, "logits").rows if row.name == "tied experts"]
    assert {row.config for row in tied} == {name for name in CONFIGS if configuration(name).use_moe}


@pytest.mark.parametrize("name", ["tokenizer", "checkpoint"])
def test_both_twins_answer_every_question(run: RunResult, name: str) -> None:
    names = [row.name for row in check_of(run, name).rows]
    sides = {
        side: {n.removesuffix(f" ({side})") for n in names if n.endswith(f" ({side})")} for side in ("jax", "torch")
    }
    assert sides["jax"] == sides["torch"]
    assert 2 * len(sides["jax"]) == len(names) > 0


@pytest.mark.parametrize("scheme", ["xavier", "kaiming", "zero", "default"])
def test_the_initializers_are_covered(run: RunResult, scheme: str) -> None:
    names = " ".join(row.name for row in check_of(run, "initializers").deciding).lower()
    assert scheme in names


# --- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", COUNTS)
def test_the_counts_only_grow(run: RunResult, what: str) -> None:
    print(f"\n{run.counts}, {run.cpu_seconds:.0f} s of CPU time, {run.seconds:.0f} s")
    assert run.counts[what] >= COUNTS[what]


def test_what_is_undetermined_is_named(run: RunResult) -> None:
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for row in run.rows:
        if row.decides and row.verdict is Verdict.UNDETERMINED:
            found.setdefault((row.check, row.config, row.regime, row.precision), []).append(row.name)
    unnamed = {case: names for case, names in found.items() if not set(names) <= set(UNDETERMINED.get(case, ()))}
    assert unnamed == {}
    assert run.counts["undetermined"] <= sum(map(len, UNDETERMINED.values()))


# --- is it a measurement? --------------------------------------------------------------------------------------------


def measured(run: RunResult, precision: str) -> list[Row]:
    """Rows with enough elements that an RMS means something."""
    return [
        row
        for name in ("logits", "gradients")
        for row in check_of(run, name).rows
        if row.precision == precision and _size(row) >= 64 and row.verdict is Verdict.AGREE
    ]


def _size(row: Row) -> int:
    size = 1
    for n in row.shape:
        size *= n
    return size


@pytest.mark.parametrize("precision", Scope().precisions)
def test_distances_are_those_of_two_right_and_different_implementations(run: RunResult, precision: str) -> None:
    """Neither zero, as when something is compared with itself, nor near the thresholds."""
    rows = measured(run, precision)
    for side in ("z_jax", "z_torch", "z_same"):
        z: list[Any] = [getattr(row, side) for row in rows if not row.name.startswith("tap tok_emb")]
        print(f"\n{precision} {side}: median {statistics.median(z):.2f}, largest {max(z):.2f} of {len(z)}")
        assert max(z) < THRESHOLDS.z * 2
        assert 0.1 < statistics.median(z) < 1.0


def test_effective_bits_are_those_of_the_format(run: RunResult) -> None:
    for precision, digits in (("float64", 53), ("float32", 24), ("bfloat16", 8)):
        for row in measured(run, precision):
            for bits in (row.effective_jax, row.effective_torch):
                assert bits is not None
                assert bits > digits - 2, row


def test_float64_would_have_seen_much_less_than_float32(run: RunResult) -> None:
    """The smallest relative error that each tensor's check would have called another function."""
    seen = {p: statistics.median(row.smallest_seen or 0.0 for row in measured(run, p)) for p in Scope().precisions}
    print(f"\nmedian of the smallest relative error that would have been seen: {seen}")
    assert 0 < seen["float64"] < seen["float32"] / 2**26 < seen["bfloat16"] / 2**26
    assert seen["float32"] < 2**-12


def test_the_run_says_where_it_ran(run: RunResult) -> None:
    assert run.devices[-1] in ("cpu", "float64 reference on cpu")
    devices = {row.device for check in run.checks for row in check.rows if row.precision == "float32"}
    assert devices <= {"cpu"} if run.devices == ["cpu"] else devices > {"cpu"}
    assert run.manifest["scope"]["device"] in DEVICES


def test_the_run_is_strict_json(run: RunResult) -> None:
    whole = json.loads(run.to_json(), parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    assert whole["counts"] == run.counts
