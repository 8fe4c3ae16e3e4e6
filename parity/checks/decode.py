"""Decoding over a KV cache: every step's logits are those of the full forward, in both twins.

The full forward is what both frameworks have been judged on; a cache is another way to the same numbers. So its
float64 reference and its noise judge what both twins give chunk by chunk and token by token, at every position.

Shapes: B batch, T time, S slots of the cache, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from parity.checks import Progress, Scope
from parity.result import CheckResult, Control, Row
from parity.verdict import Noise, Verdict

__all__ = ["BLIND", "CASES", "CLAIM", "CONFIGS", "CONTROLS", "PRECISIONS", "Case", "Decoded", "decode", "run"]

CLAIM = (
    "In each twin every logit that comes out of a KV cache is that of the full forward, and the twins' are each "
    "other's: grouped heads, all heads and experts, one row and several of unequal length (padded on the left), "
    "prompts in chunks of 7, 3, 2 and 1 and then token by token, up to the last position. Beyond it a full cache "
    "refuses, and keeps what it has; a window gives what the full forward gives under a banded mask."
)
BLIND = (
    "Long contexts (the caches here have {slots} slots); in the default run JAX's chunks of 2 and 3, its window and "
    "its experts are evaluated from its program in float64, not compiled, and float32 and bfloat16 are looked at with "
    "grouped heads, token by token (--full compiles and runs every case in every precision); gradients, which do not "
    "flow through a cache in torch."
)
CONTROLS = {
    "zeros": "zeros in place of the logits",
    "position 0 alone": "a new token sees the first key only: is_causal for one query, the reference family's bug",
    "query one position on": "after the prompt queries are turned by one position too many",
    "key one position on": "after the prompt keys are turned by one position too many",
    "padding seen": "left padding can be seen after the prompt",
    "mask inverted": "after the prompt the padding can be seen, and nothing else of it",
    "last slot overwritten": "a full cache silently gives its last slot to the next token",
    "stale key": "each step leaves the key of the step before in its slot",
    "window one token longer": "the oldest token leaves one step late",
}
PRECISIONS = ("float64", "float32", "bfloat16")
T = 13
"""Tokens of every text, and slots of every cache but a window's: the last token takes the last slot."""
WINDOW = 5
BLIND = BLIND.format(slots=T)

_BASE: dict[str, Any] = {"vocab_size": 23, "n_layers": 1, "d_model": 16, "n_heads": 4, "d_ff": 20, "ctx_len": T}
CONFIGS: dict[str, dict[str, Any]] = {
    "small gqa-swiglu": {**_BASE, "n_layers": 2, "use_gqa": True, "kv_groups": 2},
    "small mha": {**_BASE, "n_layers": 2, "vocab_size": 29, "n_heads": 2, "ctx_len": WINDOW},
    "small moe-gelu": {**_BASE, "use_swiglu": False, "use_moe": True, "num_experts": 4, "num_experts_per_tok": 2},
}


@dataclass(frozen=True)
class Case:
    """Texts over a cache: `pads` tokens of left padding in each row, `prompt` tokens in chunks, then one by one."""

    config: str
    pads: tuple[int, ...]
    chunk: int
    prompt: int
    precisions: tuple[str, ...] = ("float64",)
    """Looked at in the default run."""
    compiled: bool = False
    """Compiled in the default run; otherwise JAX's program is evaluated by parity's interpreter."""
    window: bool = False

    @property
    def regime(self) -> str:
        words = f"chunks of {self.chunk}, then one by one" if self.prompt else "one by one"
        words += ", one row" if len(self.pads) == 1 else ""
        return f"window of {WINDOW}, {words}" if self.window else words

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What decides which full forward it is compared with."""
        return self.config, self.pads, self.window


UNEQUAL, ALONE = (0, 5, 2), (0,)
CASES = (
    Case("small gqa-swiglu", UNEQUAL, 7, 7, compiled=True),
    Case("small gqa-swiglu", UNEQUAL, 1, 0, ("float32", "bfloat16"), compiled=True),
    Case("small gqa-swiglu", UNEQUAL, 2, 12),
    Case("small moe-gelu", UNEQUAL, 1, 0),
    Case("small mha", ALONE, 3, 6, window=True),
)
MORE = (
    Case("small gqa-swiglu", UNEQUAL, 3, 6),
    Case("small moe-gelu", UNEQUAL, 3, 6),
    Case("small moe-gelu", UNEQUAL, 7, 7),
    Case("small moe-gelu", ALONE, 7, 7),
    Case("small gqa-swiglu", ALONE, 1, 0),
    Case("small gqa-swiglu", ALONE, 3, 6),
    Case("small gqa-swiglu", ALONE, 7, 7),
    Case("small mha", UNEQUAL, 3, 6, window=True),
    Case("small mha", ALONE, 1, 0, window=True),
)
"""Those that --full adds."""

Tamper = Callable[..., dict[str, Any]]
"""What a control does to a torch cache: tamper(net, cache, slot) before the token of that slot (and after the last
one) -> further arguments of the call."""


@dataclass(frozen=True)
class Decoded:
    """What both twins gave over a cache, and what judges it."""

    case: Case
    precision: str
    jax: Mapping[str, np.ndarray]
    torch: Mapping[str, np.ndarray]
    reference: np.ndarray
    noise: Noise
    ties: int
    device: str

    def judgement(self) -> Any:
        from parity.precision import unit_roundoff
        from parity.verdict import judge_tensor

        return judge_tensor(
            self.jax["logits"],
            self.torch["logits"],
            self.reference,
            self.noise,
            unit_roundoff(self.precision),
            noisy_reference=self.precision == "float64",
        )

    def rows(self) -> list[Row]:
        from parity.result import row_from_judgement

        judgement = self.judgement()
        excused = bool(self.ties) and judgement.verdict is Verdict.DIFFER
        if excused:
            words = f"{self.ties} choices of experts are ties within the noise; {judgement.evidence}"
            judgement = dataclasses.replace(judgement, verdict=Verdict.UNDETERMINED, evidence=words)
        fields: dict[str, Any] = {"check": "decode", "config": self.case.config, "regime": self.case.regime}
        fields |= {"precision": self.precision, "device": self.device}
        rows = [row_from_judgement(judgement, name="logits", shape=self.reference.shape, excused=excused, **fields)]
        if not self.case.window:
            rows.append(self._full(fields))
        return rows

    def _full(self, fields: Mapping[str, Any]) -> Row:
        """One token beyond the last slot: NaN inside jit, a ValueError in torch, and a cache left as it was."""
        wrong = [
            f"{side} {what}"
            for side, found in (("jax", self.jax), ("torch", self.torch))
            for what, fine in (
                ("gave logits for it", np.isnan(found["beyond"]).all()),
                ("changed the cache", bool(found["unchanged"])),
            )
            if not fine
        ]
        words = f"one token beyond max_length={T}: " + (
            "; ".join(wrong) if wrong else "jax gives NaN, torch a ValueError; both keep the cache as it was"
        )
        verdict = Verdict.DIFFER if wrong else Verdict.AGREE
        return Row(name="a full cache", verdict=verdict, evidence=words, **fields)


def run(scope: Scope, progress: Progress) -> CheckResult:
    """Judge every case in its precisions, then show the controls on the torch side."""
    from parity.checks._steps import merge

    started = time.perf_counter()
    result = CheckResult("decode")
    cases = (*CASES, *MORE) if scope.full else CASES
    wanted = [
        (case, precision)
        for case in cases
        for precision in PRECISIONS
        if precision in scope.precisions and (scope.full or precision in case.precisions)
    ]
    made: dict[Any, _Full] = {}
    for done, (case, precision) in enumerate(wanted):
        progress(done, len(wanted), f"{case.config}, {case.regime}, {precision}")
        if case.inputs not in made:
            made[case.inputs] = _Full(case, scope)
        decoded = decode(case, precision, scope, made[case.inputs])
        result.rows += decoded.rows()
        # float32 lies between the other two.
        if scope.controls and (scope.full or precision != "float32" or "bfloat16" not in scope.precisions):
            result.controls += _controls(decoded, made[case.inputs])
    if not wanted:
        result.error = f"decode looks at {', '.join(PRECISIONS)} only; ask for one of them with --precision"
    result.controls = merge(result.controls)
    result.seconds = time.perf_counter() - started
    progress(1, 1, "")
    return result


class _Full:
    """The full forward of a case's texts: both models, weights, inputs, and per precision reference and noise."""

    DRAWN = 4
    """Candidates for each row of a model with experts: the first whose choices are clear in every precision."""

    def __init__(self, case: Case, scope: Scope):
        from flax import nnx

        from omni_jax.config import ThinkerConfig as JaxConfig
        from omni_jax.thinker import ThinkerLM as JaxLM
        from omni_torch.config import ThinkerConfig
        from omni_torch.thinker import ThinkerLM
        from parity.fixtures import random_weights
        from parity.judge import Judge
        from parity.pair import pair_of
        from parity.precision import resolve_device

        self.case, self.scope = case, scope
        self.config = ThinkerConfig(**CONFIGS[case.config])
        self.module = ThinkerLM.from_config(self.config).eval()
        fields = JaxConfig(**self.config.to_dict()).to_dict()
        abstract = nnx.eval_shape(lambda: JaxLM(**fields, rngs=nnx.Rngs(0)))
        abstract.eval()
        graphdef, self.template, rest = nnx.split(abstract, nnx.Param, ...)
        self.model = lambda params: nnx.merge(graphdef, params, rest)
        self.weights = random_weights(self.config, scope.seed)
        self.devices = resolve_device(scope.device)

        def forward(params, tokens, mask, *positions):
            return self.model(params)(tokens, attention_mask=mask, positions=positions[0] if positions else None)

        pair = pair_of(forward, self.module, self.template, taps={}, name=case.config)
        shares = len({"float64", "float32"} & set(self._precisions())) > 1
        self.judge = Judge(pair, draws=scope.draws, seed=scope.seed, shares=shares)
        self.found: dict[str, Any] = {}
        self.tokens, self.mask = self._texts()
        self.rows = np.arange(len(self.tokens))
        if self.config.use_moe:
            self.rows = self._clear_rows()
        self.inputs = (self.tokens[self.rows].copy(), self.mask[self.rows].copy())

    def _precisions(self) -> list[str]:
        every = {p for c in CASES if c.inputs == self.case.inputs for p in c.precisions}
        return [p for p in self.scope.precisions if self.scope.full or p in every]

    def _texts(self) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, mask): of every row, or of its candidates, row by row."""
        pads = np.repeat(self.case.pads, self.DRAWN if self.config.use_moe else 1)
        mask = np.arange(T) >= pads[:, None]
        tokens = np.random.default_rng([self.scope.seed, 53]).integers(3, self.config.vocab_size, mask.shape)
        return np.where(mask, tokens, 0).astype(np.int32), mask

    def _clear_rows(self) -> np.ndarray:
        from parity.precision import unit_roundoff

        clear = np.ones(len(self.tokens), bool)
        for precision in self._precisions():
            for choice in self.noise(precision).choices:
                clear &= ~choice.ties(unit_roundoff(precision)).reshape(len(clear), -1).any(1)
        return np.argmax(clear.reshape(-1, self.DRAWN), axis=1) + self.DRAWN * np.arange(len(self.case.pads))

    def noise(self, precision: str) -> Any:
        """The noise model of the full forward: within a window, under a banded mask and with positions beyond S."""
        if precision not in self.found:
            inputs: tuple[np.ndarray, ...] = (self.tokens, self.mask)
            if self.case.window:
                at = np.arange(T)
                band = (at[:, None] - at < WINDOW) & (at[:, None] >= at)
                positions = np.maximum(np.cumsum(self.mask, 1) - 1, 0).astype(np.int32)
                inputs = (self.tokens, band & self.mask[:, None], positions)
            self.found[precision] = self.judge.noise(self.weights, inputs, precision)
        return self.found[precision]


def decode(case: Case, precision: str, scope: Scope, full: _Full | None = None) -> Decoded:
    """Run both twins over a cache."""
    from parity.noise import Tracer, measure_program
    from parity.pair import pair_of
    from parity.precision import precision as format_of
    from parity.precision import unit_roundoff
    from parity.sides import JaxSide, TorchSide

    full = _Full(case, scope) if full is None else full
    pair = pair_of(
        _jax_decoder(full, case), full.module, full.template, torch_call=_torch_decoder(case), taps={}, name=case.config
    )
    pair.hasty = True
    tracer = Tracer(pair.jax_program())
    wide = precision == "float64"
    if case.compiled or scope.full or not wide:
        side = JaxSide(pair, tracer, None if wide else full.devices[0])
        ours, _ = side(full.weights, full.inputs, precision)
    else:
        dtype = format_of(precision).numpy
        args = (pair.jax_params({k: v.astype(dtype) for k, v in full.weights.items()}), *full.inputs)
        evaluated = measure_program(tracer.program(args, precision), args, draws=2, kappa=False)
        import jax

        ours = pair.named(jax.tree.unflatten(evaluated.tree, evaluated.reference))
    theirs, _ = TorchSide(pair, "cpu" if wide else full.devices[1])(full.weights, full.inputs, precision)
    model = full.noise(precision)
    ties = sum(
        int(c.ties(unit_roundoff(precision)).reshape(len(full.tokens), -1)[full.rows].sum()) for c in model.choices
    )
    noise = Noise(model.noise[0].sigma[full.rows], model.noise[0].dof, model.noise[0].kappa)
    device = "cpu" if wide else scope.device
    return Decoded(case, precision, ours, theirs, model.reference[0][full.rows], noise, ties, device)


def _jax_decoder(full: _Full, case: Case) -> Callable[..., dict[str, Any]]:
    """(params, tokens, mask) -> logits chunk by chunk in lax.scan; and what one token more does."""

    def program(params, tokens, mask):
        import jax
        import jax.numpy as jnp

        from omni_jax.cache import init_cache

        net = full.model(params)
        B = tokens.shape[0]
        cache = init_cache(net, B, WINDOW if case.window else T, window=case.window)
        beyond = 0 if case.window else 1

        def body(cache, xs):
            logits, new = net(xs[0], attention_mask=xs[1], cache=cache)
            before, after = jax.tree.leaves(cache), jax.tree.leaves(new)
            same = jnp.all(jnp.stack([jnp.all(x == y) for x, y in zip(before, after)]))
            return new, (logits, same)

        def steps(cache, start, size, end):
            # The token beyond the last slot is the first one again.
            columns = [jnp.concatenate([x, x[:, :1]], 1)[:, start:end] for x in (tokens, jnp.ones_like(mask) & mask)]
            chunks = [jnp.swapaxes(jnp.reshape(x, (B, -1, size)), 0, 1) for x in columns]
            cache, (logits, same) = jax.lax.scan(body, cache, tuple(chunks))
            return cache, jnp.reshape(jnp.swapaxes(logits, 0, 1), (B, end - start, -1)), same

        parts = []
        if case.prompt:
            cache, logits, _ = steps(cache, 0, case.chunk, case.prompt)
            parts.append(logits)
        _, logits, same = steps(cache, case.prompt, 1, T + beyond)
        parts.append(logits)
        logits = jnp.concatenate(parts, axis=1)
        return {"logits": logits[:, :T], "beyond": logits[:, T:], "unchanged": same[-1]}

    return program


def _torch_decoder(case: Case, tamper: Tamper | None = None, slots: int = 0) -> Callable[..., dict[str, Any]]:
    """The same on the torch side; `tamper` is called before every token after the prompt, `slots` are other ones."""

    def call(net, tokens, mask):
        import torch

        from omni_torch.cache import init_cache

        cache = init_cache(net, len(tokens), slots or (WINDOW if case.window else T), window=case.window)
        parts = []
        for start in range(0, case.prompt, case.chunk):
            cut = slice(start, start + case.chunk)
            logits, cache = net(tokens[:, cut], attention_mask=mask[:, cut], cache=cache)
            parts.append(logits)
        for at in range(case.prompt, T):
            cut = slice(at, at + 1)
            given = {"attention_mask": mask[:, cut]} | (tamper(net, cache, at) if tamper else {})
            logits, cache = net(tokens[:, cut], cache=cache, **given)
            parts.append(logits)
        beyond, before = torch.full_like(parts[-1], torch.nan), _leaves(cache)
        if not case.window and not tamper:
            with contextlib.suppress(ValueError):
                beyond, cache = net(tokens[:, :1], cache=cache)
        unchanged = all(torch.equal(x, y) for x, y in zip(before, _leaves(cache)))
        return {"logits": torch.cat(parts, 1), "beyond": beyond, "unchanged": torch.tensor(unchanged)}

    return call


def _leaves(cache: Any) -> list[Any]:
    import torch

    return [x.clone() for x in (*cache.k, *cache.v, cache.kept, cache.count)] + [torch.tensor(cache.length)]


# ------------------------------------------------------------------------------------------------ controls


def _see_first_alone(net: Any, cache: Any, at: int) -> dict[str, Any]:
    import torch

    first = cache.kept[:, :1].clone()
    cache.kept[:, 1:] = False
    positions = cache.count[:, None].clone()
    cache.count += 1
    return {"attention_mask": torch.zeros_like(first), "positions": positions}


def _turn(net: Any, cache: Any, at: int, by: int) -> None:
    """Turn the key in the slot before `at` by one position more."""
    import torch

    from omni_torch.layers import apply_rope, rope_frequencies

    config = net.config
    device, dtype = cache.k[0].device, cache.k[0].dtype
    cos, sin = rope_frequencies(
        torch.ones(1, 1, dtype=torch.long, device=device), config.head_dim, config.rope_theta, dtype
    )
    for k in cache.k:
        k[:, at - 1 : at] = apply_rope(k[:, at - 1 : at], cos, sin * by)


def _query_on(net: Any, cache: Any, at: int, prompt: int) -> dict[str, Any]:
    if at > prompt:  # the key went on with its query: turned back
        _turn(net, cache, at, -1)
    return {"positions": cache.count[:, None] + 1}


def _key_on(net: Any, cache: Any, at: int, prompt: int) -> dict[str, Any]:
    if at > prompt:
        _turn(net, cache, at, 1)
    return {}


def _padding_seen(net: Any, cache: Any, at: int) -> dict[str, Any]:
    cache.kept[:, :at] = True
    return {}


def _inverted(net: Any, cache: Any, at: int, prompt: int) -> dict[str, Any]:
    if at == prompt:
        cache.kept[:, :at] = ~cache.kept[:, :at]
    return {}


def _overwrite(net: Any, cache: Any, at: int) -> dict[str, Any]:
    cache.length = min(cache.length, cache.kept.shape[1] - 1)
    return {}


def _stale(net: Any, cache: Any, at: int, prompt: int) -> dict[str, Any]:
    if at > prompt:
        for k in cache.k:
            k[:, at - 1] = k[:, at - 2]
    return {}


def _net(full: _Full, precision: str) -> tuple[Any, list[Any]]:
    """The torch model and the inputs as a control gets them."""
    import torch

    device = "cpu" if precision == "float64" else full.devices[1]
    net = type(full.module).from_config(full.config).eval()
    net.load_state_dict({k: torch.from_numpy(v) for k, v in full.weights.items()})
    inputs = [torch.from_numpy(x.astype(np.int64) if x.dtype != bool else x).to(device) for x in full.inputs]
    return net.to(device, getattr(torch, precision)), inputs


def _controls(decoded: Decoded, full: _Full) -> list[Control]:
    """Wrong caches on the torch side: each must be rejected by what judges the right one."""
    import torch

    from parity.checks._steps import rejection
    from parity.precision import unit_roundoff

    case, precision = decoded.case, decoded.precision
    wide = precision == "float64"
    after = 7  # tokens of the prompt: all padding is among them
    start = dataclasses.replace(case, chunk=after, prompt=after)
    wrongs: dict[str, Any] = {}
    if case.window:
        longer = dataclasses.replace(case, chunk=1, prompt=0)
        wrongs["window one token longer"] = _torch_decoder(longer, lambda *_: {}, slots=WINDOW + 1)
    elif case.inputs == CASES[0].inputs:
        wrongs |= {
            "position 0 alone": _torch_decoder(start, _see_first_alone),
            "query one position on": _torch_decoder(start, partial(_query_on, prompt=after)),
            "key one position on": _torch_decoder(start, partial(_key_on, prompt=after)),
            "padding seen": _torch_decoder(start, _padding_seen),
            "mask inverted": _torch_decoder(start, partial(_inverted, prompt=after)),
            "last slot overwritten": _torch_decoder(start, _overwrite, slots=T - 2),
            "stale key": _torch_decoder(start, partial(_stale, prompt=after)),
        }
    shown = {"zeros": np.zeros_like(decoded.reference)}
    net, inputs = _net(full, precision)
    with torch.no_grad():
        for name, call in wrongs.items():
            shown[name] = call(net, *inputs)["logits"].double().cpu().numpy()
    values = {"logits": (None, None, decoded.reference, decoded.noise)}
    where, unit = f"{case.config}, {precision}", unit_roundoff(precision)
    return [
        rejection(name, where, {"logits": wrong}, values, unit, noisy_reference=wide) for name, wrong in shown.items()
    ]
