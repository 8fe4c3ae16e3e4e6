"""Learning rates."""

from __future__ import annotations

from parity.mutants.mutant import Edit, Mutant

__all__ = ["MUTANTS"]

TORCH, JAX = ("omni_torch.optim", "warmup_cosine"), ("omni_jax.optim", "warmup_cosine")


def _mutant(name: str, report: str, what: str, *edits: Edit, needs: str = "") -> Mutant:
    where = "rate|learning|warm-up|descent|down to|displacement|factor"
    return Mutant(f"schedule-{name}", "schedule", report, what, edits, "recipe", where, {}, needs)


MUTANTS = (
    _mutant("one-on", "S01", "the factor of the next step", Edit(*TORCH, "step = _check_step(step)",
        "step = _check_step(step) + 1")),
    _mutant("warmup-one-on", "S01", "warm-up begins at 1 / warmup_steps",
            Edit(*TORCH, "return step / warmup_steps", "return (step + 1) / warmup_steps")),
    _mutant("warmup-inside", "S03", "the cosine is counted over max_steps, warm-up included",
            Edit(*TORCH, "/ (max_steps - warmup_steps)", "/ max_steps")),
    _mutant("warmup-twice", "S03", "warm-up is taken off twice",
            Edit(*TORCH, "left = max(max_steps - step, 0) / (max_steps - warmup_steps)",
                 "left = min(max(max_steps - step, 0) / (max_steps - 2 * warmup_steps or 1), 1.0)")),
    _mutant("floor-absolute", "S03", "the floor is a lower bound, not where the cosine ends",
            Edit(*TORCH, "share + (1.0 - share) * min_ratio", "max(share, min_ratio)")),
    _mutant("linear", "common: linear for cosine", "the descent is a line",
            Edit(*TORCH, "math.sin(0.5 * math.pi * left) ** 2", "left")),
    _mutant("no-end", "S03", "behind max_steps the cosine rises again",
            Edit(*TORCH, "max(max_steps - step, 0)", "(max_steps - step)"), needs="steps beyond the last one"),
    _mutant("micro-steps", "S04", "the trainer's schedule counts micro-batches",
            Edit("omni_torch.training_run", "TrainingRun._update", "warmup_cosine(state.step, train.warmup",
                 "warmup_cosine(state.step * train.gradient_accumulation_steps, train.warmup")),
    _mutant("micro-step-lost", "S04", "the trainer leaves out one micro-batch of each update",
            Edit("omni_torch.training", "Trainer._batch", "for micro in range(train.gradient_accumulation_steps)",
                 "for micro in range(train.gradient_accumulation_steps - 1)")),
    _mutant("halved", "common: half a period", "a quarter of a period: it ends in the middle",
            Edit(*TORCH, "0.5 * math.pi * left", "0.25 * math.pi * (1.0 + left)")),
)  # fmt: skip
