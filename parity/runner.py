"""Runs checks over a scope and gathers one result: what `parity run` and the tests call.

A check that raises becomes a check that could not look, never a pass; bad files of the user stop the run.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from parity import cache, checks
from parity.causes import SECONDS
from parity.checks import Scope
from parity.errors import CannotLook, Misuse
from parity.precision import DEVICES, MATMULS, PRECISIONS, device_names, manifest, one_of, settings
from parity.result import CheckResult, RunResult

__all__ = ["RunProgress", "debugging", "prepare", "run", "validate"]

RunProgress = Callable[[str, int, int, str], None]
"""progress(check, done, total, label): called when a check starts (0 of 0) and after each unit of its work."""


def run(
    scope: Scope,
    only: Iterable[str] = (),
    progress: RunProgress | None = None,
    *,
    matmul: str = "default",
    explain: float = SECONDS,
) -> RunResult:
    """Run the checks named in `only` (all, if none are named) over `scope`.

    `explain`: so many seconds, over all checks that fail, are spent on looking for causes (0: none are looked for).

    Raises `Misuse` for a wrong question (unknown names, files of the user that cannot be read) and `CannotLook` for a
    missing device or framework. Whatever else a check raises becomes its `error`, unless PARITY_DEBUG=1. Ctrl-C ends
    the run but not the result: checks that had not ended say so, and the exit code is 3 (1 if a difference was seen).
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    wanted = set(only)
    names = [name for name in checks.CHECKS if name in wanted or (not wanted and _has_precision(name, scope))]
    validate(scope, wanted, matmul)
    prepare()
    with settings(scope.device, matmul):
        _validate_files(scope)
        results, notes = _run_checks(names, scope, progress or (lambda *_: None), explain)
        seen = manifest()
        devices = device_names(scope.device)
    return RunResult(
        checks=results,
        manifest=seen | {"scope": _scope(scope, matmul)},
        devices=devices,
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu_started,
        notes=[*notes, *_not_looked_at(scope, names, devices)],
    )


def _has_precision(name: str, scope: Scope) -> bool:
    """Whether a check that nobody named has any of the scope's precisions; if not, it is told as not looked at."""
    known = getattr(checks.load(name), "PRECISIONS", scope.precisions)
    return any(precision in known for precision in scope.precisions)


def _run_checks(
    names: list[str], scope: Scope, progress: RunProgress, explain: float
) -> tuple[list[CheckResult], list[str]]:
    from parity.locate import watched

    results: list[CheckResult] = []
    models: list[Any] = []
    """What parted in the runs that the checks of models share: the first of them makes it."""
    for position, name in enumerate(names):
        started = time.perf_counter()
        try:
            progress(name, 0, 0, "")
            with watched() as compared:
                results.append(_run_check(name, scope, progress))
            results[-1].seconds = time.perf_counter() - started
            if name in checks.OF_MODELS:
                models = compared = compared or models
            if results[-1].exit_code == 1:
                progress(name, 0, 0, "looking for the cause")
                looked = time.perf_counter()
                results[-1].located = _located(results[-1], compared, max(explain, 0.0))
                explain -= time.perf_counter() - looked
        except KeyboardInterrupt:
            finished = ", ".join(names[:position]) or "no check"
            results.append(CheckResult(name, error="interrupted by Ctrl-C before it ended"))
            results += [
                CheckResult(rest, error="interrupted by Ctrl-C before it began") for rest in names[position + 1 :]
            ]
            return results, [f"interrupted by Ctrl-C; finished before that: {finished}"]
    return results, []


def _run_check(name: str, scope: Scope, progress: RunProgress) -> CheckResult:
    try:
        result = checks.load(name).run(scope, functools.partial(progress, name))
        if not isinstance(result, CheckResult):
            raise TypeError(f"run() of check {name!r} gave {type(result).__name__} instead of a CheckResult")
        shown = {control.name for control in result.controls}
        missing = [control for control in checks.load(name).CONTROLS if control not in shown]
        if scope.controls and missing and result.error is None:
            result.notes.append(f"controls that could not be shown in so narrow a run: {', '.join(missing)}")
        return result
    except Misuse:
        raise
    except CannotLook as error:
        return CheckResult(name, error=str(error))
    except Exception as error:
        if scope.checkpoint is not None and _is_checkpoint_error(error):
            raise Misuse(_about("--checkpoint", scope.checkpoint, error)) from error
        if debugging():
            raise
        return CheckResult(name, error=f"{type(error).__name__}: {_short(str(error))} ({DEBUG_HINT})")


def _located(result: CheckResult, compared: list[Any], seconds: float) -> str:
    """Where the sides part, which one left, and the diagnosis; an explanation that fails is no failure of the run."""
    from parity.locate import found_in

    try:
        # The library of bugs is left to `parity locate`: it exchanges code, and what the checks share would be lost.
        found = found_in(compared, result.rows, model=False, seconds=seconds)
        return "" if found is None else found.sentence
    except Exception as error:
        if debugging():
            raise
        return f"no cause was looked for: {type(error).__name__}: {_short(str(error))} ({DEBUG_HINT})"


DEBUG_HINT = "set PARITY_DEBUG=1 for the traceback"


def debugging() -> bool:
    """PARITY_DEBUG=1: exceptions are raised, third parties may chatter."""
    return os.environ.get("PARITY_DEBUG", "") not in ("", "0")


def _short(text: str, most: int = 500) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]} ..."


def _is_checkpoint_error(error: BaseException) -> bool:
    """Each twin has a CheckpointError of its own; by name, so that neither has to be imported here."""
    return any(kind.__name__ == "CheckpointError" for kind in type(error).__mro__)


# --- before the run --------------------------------------------------------------------------------------------------


def validate(scope: Scope, only: Iterable[str] = (), matmul: str = "default") -> None:
    """`Misuse` for whatever can be seen to be wrong without a framework: names and the text file."""
    for name in only:
        one_of("check", name, checks.CHECKS)
    for name in scope.precisions:
        one_of("precision", name, tuple(PRECISIONS))
    if not scope.precisions:
        raise Misuse(f"precision: none named (known: {', '.join(PRECISIONS)})")
    one_of("device", scope.device, DEVICES)
    one_of("matmul", matmul, MATMULS)
    wanted = set(only)
    for reached, options in _own(scope).items():
        if wanted and not wanted & set(reached):
            raise Misuse(
                f"{', '.join(options)}: no meaning for {', '.join(sorted(wanted))}, which has a problem of its own; it "
                f"is for {' and '.join(reached)}"
            )
    for option, path in (("--audio", scope.audio), ("--image", scope.image)):
        if path is not None and not Path(path).is_file():
            _missing(option, Path(path))
    if scope.text is not None:
        _validate_text(Path(scope.text))
    if scope.checkpoint is not None and not Path(scope.checkpoint).is_file():
        _missing("--checkpoint", Path(scope.checkpoint))
    if scope.checkpoint is not None and len(scope.configs) > 1:
        raise Misuse(
            f"--config: {len(scope.configs)} given with one --checkpoint; name the one that it was trained with"
        )
    for config in scope.configs:
        if _is_path(config) and not Path(config).is_file():
            _missing("--config", Path(config))


def _own(scope: Scope) -> dict[tuple[str, ...], list[str]]:
    """checks -> the options that name the user's own models, text, sound or picture and that only they look at."""
    given = {
        checks.OF_MODELS: {"--config": scope.configs, "--checkpoint": scope.checkpoint, "--text": scope.text},
        ("mel",): {"--audio": scope.audio},
        ("image",): {"--image": scope.image},
    }
    found = {reached: [option for option, value in options.items() if value] for reached, options in given.items()}
    return {reached: options for reached, options in found.items() if options}


def _validate_text(path: Path) -> None:
    if not path.is_file():
        _missing("--text", path)
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8")
    except OSError as error:
        raise Misuse(f"--text {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise Misuse(
            f"--text {path}: not UTF-8 at byte {error.start} (line {line}, value 0x{error.object[error.start]:02x}); "
            f"convert it first, for example: iconv -f LATIN1 -t UTF-8 {path} > text.utf8.txt"
        ) from error
    if not text.strip():
        raise Misuse(f"--text {path}: the file holds no text; name a file with some sentences in it")


def _missing(option: str, path: Path) -> None:
    if path.is_dir():
        raise Misuse(f"{option} {path}: this is a folder; name a file in it")
    raise Misuse(f"{option} {path}: no such file; check the path (the current folder is {Path.cwd()})")


def _is_path(config: str) -> bool:
    return config.endswith(".json") or "/" in config or os.sep in config


def _validate_files(scope: Scope) -> None:
    """`Misuse` for configurations and checkpoints that the twins' own readers refuse."""
    if scope.configs:
        from parity.fixtures import configuration
    for config in scope.configs:
        try:
            configuration(config)
        except Misuse:
            raise
        except (ValueError, OSError) as error:
            raise Misuse(_about("--config", config, error)) from error
    if scope.checkpoint is not None:
        _validate_checkpoint(scope.checkpoint)
    if scope.audio is not None:
        from omni_torch.audio import load_audio

        _readable("--audio", scope.audio, load_audio)
    if scope.image is not None:
        from omni_torch.vision import load_image

        _readable("--image", scope.image, load_image)


def _readable(option: str, path: str, load: Callable[[str], Any]) -> None:
    try:
        load(path)
    except ImportError as error:
        raise CannotLook(f"{option} {path}: {error.name} is not installed, which reads it: pip install it") from error
    except (ValueError, OSError) as error:
        raise Misuse(_about(option, path, error)) from error


def _about(option: str, path: str, error: BaseException) -> str:
    """The reader's words, with the file's name before them unless they hold it already."""
    return str(error) if path in str(error) else f"{option} {path}: {error}"


def _validate_checkpoint(path: str) -> None:
    import numpy as np

    from omni_jax.checkpoint import load_checkpoint

    try:
        state = load_checkpoint(path).model
    except (ValueError, OSError) as error:
        raise Misuse(_about("--checkpoint", path, error)) from error
    for key, value in state.items():
        array = np.asarray(value)
        bad = array.size - int(np.isfinite(array.astype(np.float64)).sum())
        if bad:
            raise Misuse(
                f"--checkpoint {path}: tensor {key!r} holds {bad} of {array.size} values that are not finite (NaN or "
                "Inf): every answer would be NaN on both sides; name a checkpoint from before training went bad"
            )


# --- surroundings ----------------------------------------------------------------------------------------------------


def prepare() -> None:
    """Quieten third parties and keep XLA's compiled code between runs; σ and verdicts are computed in every run."""
    if not debugging():
        for name, value in {"TF_CPP_MIN_LOG_LEVEL": "3", "GLOG_minloglevel": "3", "ABSL_MIN_LOG_LEVEL": "3"}.items():
            os.environ.setdefault(name, value)
        for logger in ("absl", "jax._src.xla_bridge", "jax._src.compiler", "jax._src.compilation_cache"):
            logging.getLogger(logger).setLevel(logging.ERROR)
    # A run keeps what it makes (programs, findings): looking through all of it again and again finds no garbage.
    gc.set_threshold(50_000, 50, 50)
    # Two frameworks share one GPU: JAX must not take three quarters of its memory at the start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with contextlib.suppress(ImportError):
        import torch

        # The fixtures' models are small: two threads cost several times their work in waiting for each other.
        torch.set_num_threads(1)
    try:
        import jax
    except ImportError:
        return
    folder = cache.cache_folder()
    if folder is None or jax.config.jax_compilation_cache_dir is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# --- what the result says of itself ----------------------------------------------------------------------------------


def _scope(scope: Scope, matmul: str) -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(scope) | {"matmul": matmul}


def _not_looked_at(scope: Scope, names: list[str], devices: list[str]) -> list[str]:
    """A narrowed run says what it left out."""
    default = Scope()
    parts = []
    if rest := [name for name in checks.CHECKS if name not in names]:
        parts.append(f"checks {', '.join(rest)}")
    if rest := [name for name in default.precisions if name not in scope.precisions]:
        parts.append(f"precisions {', '.join(rest)}")
    if scope.configs or scope.checkpoint:
        parts.append("other configurations than those named")
    if scope.regimes or scope.checkpoint:
        parts.append("other weight regimes")
    notes = [f"not looked at: {'; '.join(parts)}"] if parts else []
    for reached, options in _own(scope).items():
        if others := [name for name in names if name not in reached]:
            notes.append(f"{', '.join(options)} reached only {' and '.join(reached)}; {', '.join(others)}: as ever")
    if scope.device == "tpu" and any(name.startswith("torch on cpu") for name in devices):
        notes.append("torch cannot use a TPU without torch_xla: its side ran on the CPU")
    return notes
