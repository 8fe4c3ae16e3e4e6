"""Over the catalogue of bugs: how many are placed in the right module, and for how many is the right cause named?

Two figures of causes are kept apart. "By rule" is what the hypotheses reach that know no bug: arrays, and the JAX
program with one place changed by rule. "With the library" adds AdamW's formulas with a known mistake, and the bugs of
the catalogue themselves, as far as one has a counterpart in the other twin; what is in a library is found because it
is in it. The rules have been extended with this catalogue in view: of bugs that nobody has seen, expect less.

What counts as the right cause is written down below, bug by bug, from what each bug does; a bug that is not listed
has no right answer among the causes that are known, and counts as not explained.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parity.mutants import Mutant

__all__ = ["RIGHT", "Attributed", "Report", "render", "score"]

RULES = ("arrays", "program", "flow", "size")
"""Families that know no bug; the formulas of optimizers are a library, as the catalogue is."""
CAUSES: tuple[tuple[str, str], ...] = (
    ("^eps", "norm-eps-torch norm-eps-jax norm-eps-outside norm-eps-positional"),
    ("^eps|left out: add", "norm-eps-finfo"),
    ("^mean subtracted", "norm-mean-subtracted"),
    ("^rounded inside: .*bfloat16",
     "norm-scale-rounded attention-softmax-bfloat16 rope-bfloat16 moe-router-bfloat16 loss-bfloat16 "
     "dtype-head-bfloat16 dtype-values-bfloat16 dtype-statistics-narrow dtype-norm-late-cast"),
    ("31", "norm-unbiased"),
    ("^norm scale not loaded|^left out: mul", "norm-scale-missing"),
    ("^one plus scale|^left out: add|plus -?1|^constant: 0 in the place of 1 ", "norm-scale-plus-one"),
    ("norm1.*norm2", "norm-second-shared"),
    ("^left out: .*RMSNorm", "norm-post embedding-last-norm"),
    ("^heads tiled", "attention-heads-tiled"),
    ("^heads tiled|^order: reshape", "attention-heads-tiled-jax"),
    ("^scale factor", "attention-scale-model attention-scale-missing mlp-gelu-root embedding-scaled"),
    ("^soft cap|^left out: tanh", "attention-softcap"),
    ("^clipped|^left out: (max|min|clamp)", "attention-score-clamp"),
    ("^shifted by one",
     "attention-sees-ahead attention-not-itself rope-query-ahead embedding-row-on loss-shifted-twice"),
    ("^mask inverted", "attention-mask-polarity"),
    ("^mask missing", "attention-mask-ignored"),
    ("^not finite", "attention-empty-nan"),
    ("^mask value", "attention-mask-finite attention-mask-added"),
    ("axis|transposed", "attention-softmax-axis"),
    ("^transposed", "attention-output-transposed"),
    ("^order", "attention-qkv-order attention-qkv-same attention-heads-merged attention-heads-split mlp-gate-up"),
    ("^order|^interleaved", "attention-qkv-by-head"),
    ("^interleaved", "rope-interleaved rope-interleaved-both-ends"),
    ("^sign flipped", "rope-sign"),
    ("^sign flipped|^order of parts: .*apply_rope", "rope-backwards"),
    ("^base of the angles", "rope-theta rope-theta-ignored"),
    ("^scale factor.*rope_freq|^base of the angles", "rope-exponent"),
    ("^rounded inside: .*float32", "rope-float32 dtype-norm-float32 dtype-loss-float32"),
    ("^mask missing|^positions", "rope-padding-counted"),
    ("GELU", "mlp-gelu-tanh"),
    ("^tanh GELU", "mlp-gelu-tanh-torch mlp-gelu-for-silu"),
    ("^quick GELU", "mlp-gelu-quick"),
    ("^clipped", "mlp-sigmoid-clipped"),
    ("^bias missing", "mlp-bias-missing"),
    ("^SiLU|^ReLU", "mlp-relu-for-silu"),
    ("^left out: div", "moe-not-renormalised"),
    ("^eps|1e-0?8", "moe-softmax-after"),
    ("^order|^sign flipped", "moe-worst"),
    ("^counted otherwise|^left out", "moe-last-expert-lost"),
    ("^gradient stopped", "moe-router-detached gradients-residual-cut gradients-norm-cut"),
    ("tok_emb", "embedding-tied"),
    ("^gradient counted twice|^scale factor: .* 2$|multiplied by 2$", "embedding-tied-gradient"),
    ("^zeros|^gradient stopped", "embedding-pad-frozen"),
    ("^zeros|^counted otherwise|^left out: mul", "embedding-pad-zero"),
    ("^rounded inside: .*bfloat16|^rounded: .*bfloat16", "embedding-bfloat16"),
    ("^counted otherwise|^mask missing", "loss-pad-counted loss-zero-ignored"),
    ("^scale factor|^mask missing", "loss-mean-over-all"),
    ("^scale factor|^left out: div", "loss-sum loss-two-logits"),
    ("^left out: sub", "loss-top-shift"),
    ("^normalised in place", "norm-in-place"),
    ("^first for all", "moe-first-weight"),
    ("^eps", "optimizer-eps-inside optimizer-eps-inside-jax optimizer-eps-uncorrected"),
    ("^shifted by one", "optimizer-late optimizer-ahead"),
    ("^bias correction missing", "optimizer-uncorrected"),
    ("^weight decay coupled", "optimizer-coupled"),
    ("^weight decay: ", "optimizer-decay-default optimizer-decay-unscaled optimizer-decay-after"),
    ("^betas", "optimizer-beta2 optimizer-betas-swapped"),
    ("^sign flipped", "optimizer-ascent"),
    ("^no update|^zeros: it is zero", "optimizer-nothing-lost"),
    ("^clipped|^left out: (min|max|clamp)", "rope-table-end"),
    ("^narrow integer", "rope-int8"),
    ("^gradient stopped|^zeros", "gradients-rope-cut"),
    ("^scale of gradients|^gradient stopped", "gradients-relu-half"),
    ("^scale", "gradients-batch-divided"),
    ("^rounded inside: .*(TF32|float16)", "dtype-attention-tf32"),
    ("^label smoothing", "loss-smoothing"),
    ("^empty rows|^mask value", "attention-empty-mean"),
    ("^applied too often: apply_rope", "rope-values-turned"),
    ("^eps: .*LayerNorm", "norm-layernorm-eps"),
    ("^constant rounded", "optimizer-moments-drift"),
    ("^shifted by one", "schedule-one-on"),
    ("^scale factor: 10 in the place of 7", "schedule-warmup-inside"),
    ("^left out: max|^clipped", "schedule-no-end"),
    ("^eps: .*clip_grad_norm", "clipping-eps-missing clipping-eps-larger"),
    ("^left out: (mul|min).*clip_grad_norm", "clipping-never"),
    ("^clipped: .*clip_grad_norm", "clipping-always"),
    ("^root missing", "clipping-no-root"),
    ("^zeros: input 1", "clipping-first-lost"),
    ("^constant: 1e-10 in the place of 1e-05", "mel-floor"),
    ("^scale factor: log .*1 / ln 10", "mel-log10"),
    ("^clipped: .*frame", "mel-hop-one-less"),
    ("^order: reshape.*resize_positions", "image-positions-turned"),
    ("^left out: mul .*_multiply", "dropout-attention-none dropout-residual-none"),
    ("^left out: div", "dropout-renormalised"),
    ("^scale of gradients: .*by 0.75", "dropout-half-scale"),
    ("^scale factor: .*multiplied by 2$|^constant: 2 in the place of 1 ", "gradients-accumulated"),
)  # fmt: skip
"""Regular expression of a cause ("CAUSE: WORDS"), and the bugs of which it says what they do."""

RIGHT = {name: cause for cause, names in CAUSES for name in names.split()}


@dataclass(frozen=True)
class Attributed:
    """What became of one bug."""

    id: str
    side: str
    check: str
    what: str
    seen: bool
    place: str = ""
    placed: bool = False
    """Where the catalogue says."""
    cause: str = ""
    """What was named, by rule; "" where nothing was."""
    right: bool = False
    library: str = ""
    """What was named with the library, where nothing was without."""
    library_right: bool = False
    words: str = ""
    seconds: float = 0.0


@dataclass
class Report:
    """One run over the catalogue."""

    outcomes: list[Attributed] = field(default_factory=list)
    ended: bool = True

    def count(self, models: bool = False, **wanted: Any) -> int:
        """How many outcomes have these values; of the checks of our models only, if `models`."""
        from parity.checks import OF_MODELS

        rows = [o for o in self.outcomes if o.check in OF_MODELS] if models else self.outcomes
        return sum(all(getattr(o, name) == value for name, value in wanted.items()) for o in rows)

    @property
    def lines(self) -> list[str]:
        """The totals, in words."""
        seen, models = self.count(seen=True), self.count(models=True, seen=True)
        share = lambda part, whole: f"{part} of {whole}" + (f" ({part / whole:.1%})" if whole else "")  # noqa: E731
        named = sum(bool(o.cause) for o in self.outcomes)
        right, more = self.count(right=True), self.count(library_right=True)
        return [
            f"placed in the right module: {share(self.count(placed=True, seen=True), seen)}; of the language model's: "
            f"{share(self.count(models=True, placed=True, seen=True), models)}",
            f"right cause named by rule: {share(right, seen)}; of the language model's: "
            f"{share(self.count(models=True, right=True), models)}",
            f"named by rule at all: {named}, of these rightly: {share(right, named)}",
            f"right cause named with the library as well: {share(right + more, seen)}; of the language model's: "
            f"{share(self.count(models=True, right=True) + self.count(models=True, library_right=True), models)}",
            f"right module and right cause, by rule: {share(self.count(placed=True, right=True), seen)}; of the "
            f"language model's: {share(self.count(models=True, placed=True, right=True), models)}",
        ]

    @property
    def exit_code(self) -> int:
        """0 when there is something to tell, 3 when not."""
        return 0 if self.outcomes and self.ended else 3

    def to_dict(self) -> dict[str, Any]:
        return {"lines": self.lines, "ended": self.ended, "outcomes": [asdict(o) for o in self.outcomes]}


def score(
    mutants: Sequence[Mutant] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    library: bool = True,
    right: Mapping[str, str] = RIGHT,
) -> Report:
    """Every live bug of the catalogue in the fast gate's scope; Ctrl-C ends the run but not the report.

    `right`: id -> regular expression of a right cause, where others than the catalogue's are scored.
    """
    from parity.mutants import catalogue
    from parity.mutants.gate import Gate
    from parity.sides import one_thread

    wanted = [m for m in (catalogue() if mutants is None else mutants) if not m.equivalent]
    report, gate = Report(), Gate("fast")
    with one_thread():
        try:
            for done, mutant in enumerate(sorted(wanted, key=lambda m: m.check)):
                if progress is not None:
                    progress(done, len(wanted), mutant.id)
                report.outcomes.append(_one(gate, mutant, library, right))
        except KeyboardInterrupt:
            report.ended = False
    return report


def _one(gate: Any, mutant: Mutant, library: bool, answers: Mapping[str, str]) -> Attributed:
    from parity import checks
    from parity.locate import found_in, watched
    from parity.mutants import inject
    from parity.mutants.gate import changed, quiet

    started = time.perf_counter()
    told = mutant.id, mutant.side, mutant.check, mutant.what
    scope = gate.scope(mutant)
    try:
        clean, recording = gate.clean_run(mutant.check, scope)
        with inject.injected(mutant.edits):
            with recording.running(mutant.side), watched() as compared:
                result = checks.load(mutant.check).run(scope, quiet)
            rows = changed(clean, result)
            found = found_in(compared, rows, model=False)
            diagnosis = None if found is None else found.diagnosis
            by_rule = _named(diagnosis) if diagnosis is not None and diagnosis.family in RULES else ""
            more = _named(diagnosis) if not by_rule else ""
            if found is not None and not by_rule and not more and library and compared:
                with recording.running(mutant.side):
                    again = found_in(compared, rows, model=True)
                more = "" if again is None else _named(again.diagnosis)
    except Exception as error:  # its own symptom may be an exception; what is not seen is not placed
        words = f"{type(error).__name__}: {error}"[:200]
        return Attributed(*told, seen=False, words=words, seconds=time.perf_counter() - started)
    if found is None:
        return Attributed(*told, seen=False, words=result.error or "", seconds=time.perf_counter() - started)
    place = found.place.removeprefix("tap ")
    right = answers.get(mutant.id, "(?!)")
    return Attributed(
        *told, seen=True, place=place, placed=bool(re.search(mutant.where, place)), cause=by_rule,
        right=bool(by_rule and re.search(right, by_rule)), library=more,
        library_right=_same_report(more, mutant) or bool(more and re.search(right, more)),
        words=found.sentence, seconds=time.perf_counter() - started,
    )  # fmt: skip


def _same_report(cause: str, mutant: Mutant) -> bool:
    """Whether the bug of the library that was named is the same mistake as this one, in the other twin."""
    from parity.mutants import catalogue

    known = next((m for m in catalogue() if cause.endswith(f"[{m.id}]")), None)
    return known is not None and (known.report, known.area) == (mutant.report, mutant.area)


def _named(diagnosis: Any) -> str:
    return f"{diagnosis.cause}: {diagnosis.words}" if diagnosis is not None and diagnosis.named else ""


def render(report: Report, console: Any) -> None:
    """A row per bug, those without the right cause first, then the totals."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("bug", "placed at", "cause by rule", "cause with the library"):
        table.add_column(name, overflow="fold")
    for o in sorted(report.outcomes, key=lambda o: (o.right, o.library_right, bool(o.cause))):
        place = o.place if o.placed else f"{o.place or 'not seen'} (not where meant)"
        cause = o.cause and (o.cause if o.right else f"{o.cause} (another is meant)")
        library = o.library and (o.library if o.library_right else f"{o.library} (another is meant)")
        table.add_row(*(Text(cell) for cell in (o.id, place, cause, library)))
    console.print(table)
    for line in report.lines:
        console.print(Text(line))
    if not report.ended:
        console.print(Text("interrupted by Ctrl-C: the rest of the catalogue was not run"))
