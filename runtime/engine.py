"""A graph that obeys the contract of bundles, as three functions without state of their own.

The state of a sequence goes in and comes out: nothing here remembers anything, so any number of threads may
use one engine. On the CPU a state is an array; on CUDA it is an OrtValue that stays on the device from one
step to the next. A step is one plain `run`: two bindings that swap preallocated states in place, with the
copy that keeps a state for rewinding, took the same time (297 and 294 µs for a token).

B batch (1 here), T time, V vocabulary, M mixing, S state.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .container import AGAIN, invalid
from .errors import BundleError, ProviderError, SdgmError
from .manifest import BundleConfig
from .providers import TIDY, Opened, line, onnxruntime, open_graph

_STEP, _MIXING = ["logits", "next_state"], ["mixing", "next_state"]
_MANY_LOGITS = 1 << 20
"""More of them are not kept room for."""
_HAS_ARENA = sys.maxsize > 1 << 32
"""ONNX Runtime has none in 32 bits."""
State = Any
"""(1, S) float32: an array, or an OrtValue on the device. Never written to."""
Floats = NDArray[np.float32]


class Blend(NamedTuple):
    """A step of the mixing vector towards a drawn one: c ← (1 − η) · c + η · z."""

    strength: float
    """η."""
    drawn_M: Floats
    """z."""


class Engine:
    """One variant of a bundle, ready to run."""

    def __init__(
        self,
        graph: Path | bytes,
        config: BundleConfig,
        where: object,
        *,
        providers: str | Sequence[str] = "auto",
        threads: int | None = None,
    ) -> None:
        """Open the graph and hold it against the contract.

        A session of CUDA says nothing of graphs that its kernels have no room for, which is found when this
        one is tried: with "auto" the CPU then takes it.

        Raises:
            BundleError: the graph is refused, or obeys another contract.
            ProviderError: ONNX Runtime or a provider is not there, or cannot run the graph.
            ParameterError: `providers` or `threads` make no sense.
        """
        self.config, self.chunk = config, config.chunk
        self._where = where
        self._differs: dict[int, float] = {}
        reuse = config.chunk * config.vocab_size > _MANY_LOGITS
        self._use(open_graph(graph, where, providers=providers, threads=threads, reuse=reuse))
        try:
            self._check_contract()
        except SdgmError as e:
            if providers != "auto" or self.opened.provider == "cpu":
                raise
            reason = f"CUDA could not run the graph: {line(e.__cause__ or e)}"
            self._use(open_graph(graph, where, providers="cpu", threads=threads, reuse=reuse, reason=reason))
            self._check_contract()

    def _use(self, opened: Opened) -> None:
        self.opened, self._session = opened, opened.session
        self._device = "cuda" if opened.provider == "cuda" else None
        self._tidy = onnxruntime().RunOptions()
        self._tidy.add_run_config_entry(*TIDY)

    def zeros(self) -> State:
        """The state before the first token."""
        return self.upload(np.zeros(self.config.state_size, np.float32))

    def upload(self, state_S: Floats) -> State:
        """Bring a state to where the graph runs."""
        state = np.ascontiguousarray(state_S, np.float32).reshape(1, -1)
        if self._device is None:
            return state
        try:
            return onnxruntime().OrtValue.ortvalue_from_numpy(state, self._device, 0)
        except Exception as e:
            raise self._failure(e) from e

    def download(self, state: State) -> Floats:
        """The numbers of a state, (S,)."""
        state_S: Floats = (state if self._device is None else state.numpy())[0]
        return state_S

    def last(self, ids: Sequence[int], state: State, blend: Blend | None = None) -> tuple[Floats, State]:
        """Feed 1 to `chunk` tokens: logits after the last one, (V,), and the next state."""
        feeds = {"ids": np.array([ids], np.int64), "state": state}
        if len(ids) > 1:
            feeds["start"] = np.array(len(ids) - 1, np.int64)
        if blend is not None:
            feeds["blend"] = np.array(blend.strength, np.float32)
            feeds["drawn"] = blend.drawn_M.reshape(1, 1, -1)
        logits_BTV, state = self._run(_STEP, feeds)
        return logits_BTV[0, -1], state

    def all(self, ids: Sequence[int], state: State, start: int = 0) -> tuple[Floats, State]:
        """Feed 1 to `chunk` tokens: logits after each from `start` on, (T − start, V), and the next state."""
        feeds = {"ids": np.array([ids], np.int64), "state": state}
        if start:
            feeds["start"] = np.array(start, np.int64)
        many = (len(ids) - start) * self.config.vocab_size > _MANY_LOGITS and _HAS_ARENA
        logits_BTV, state = self._run(_STEP, feeds, self._tidy if many else None)
        return logits_BTV[0], state

    def differs(self, most: int) -> float:
        """How far logits and state are off where 2 to `most` tokens are run at once, and not one by one.

        0 is bit for bit the same: whether it is depends on the graph and on the kernels that this processor
        gets, so it is tried, once.
        """
        if most not in self._differs:
            ids = [int(i) for i in np.random.default_rng(0).integers(0, self.config.vocab_size, 2 * most)]
            _, state = self.last(ids[:most], self.zeros())
            singles, after, worst = [], state, 0.0
            for count, token in enumerate(ids[most:], 1):
                logits_V, after = self.last([token], after)
                singles.append(logits_V)
                if count > 1:
                    together = ids[most : most + count]
                    rows_TV, at_once = self.all(together, state)
                    last_V, _ = self.last(together, state)
                    worst = max(
                        worst,
                        _difference(rows_TV, np.stack(singles)),
                        _difference(last_V, logits_V),
                        _difference(self.download(at_once), self.download(after)),
                    )
            self._differs[most] = worst
        return self._differs[most]

    def mixing(self, ids: Sequence[int], state: State) -> tuple[Floats, State]:
        """Feed 1 to `chunk` tokens: the mixing vector of each, (T, M), and the next state."""
        mixing_BTM, state = self._run(_MIXING, {"ids": np.array([ids], np.int64), "state": state})
        return mixing_BTM[0], state

    def _run(self, outputs: list[str], feeds: dict[str, Any], options: Any = None) -> list[Any]:
        try:
            if self._device is None:
                return self._session.run(outputs, feeds, options)  # type: ignore[no-any-return]
            return self._run_on_device(outputs, feeds)
        except Exception as e:  # ONNX Runtime raises a dozen unrelated classes
            raise self._failure(e) from e

    def _failure(self, e: Exception) -> SdgmError:
        provider = self.opened.provider
        if provider == "cpu":
            return BundleError(f"{self._where}: the graph fails: {line(e)}; {AGAIN}")
        return ProviderError(f"{self._where}: the graph fails on {provider}: {line(e)}; use providers='cpu'")

    def _run_on_device(self, outputs: list[str], feeds: dict[str, Any]) -> list[Any]:
        """As `_run`, but the state neither comes from the host nor goes there."""
        binding, value_of = self._session.io_binding(), onnxruntime().OrtValue.ortvalue_from_numpy
        for name, value in feeds.items():
            # Not bind_cpu_input, which does not know inputs that have a default.
            binding.bind_ortvalue_input(name, value if name == "state" else value_of(value))
        for name in outputs:
            binding.bind_output(name, self._device if name == "next_state" else "cpu")
        self._session.run_with_iobinding(binding)
        values = binding.get_outputs()
        return [v if n == "next_state" else v.numpy() for n, v in zip(outputs, values, strict=True)]

    def _check_contract(self) -> None:
        """Compare names, types and shapes with the contract, then try the graph on two tokens."""
        size, graph = self.config, self._session
        f32, i64 = "tensor(float)", "tensor(int64)"
        self._check_values("input", graph.get_inputs(), ids=(i64, "BT"), state=(f32, "BS"))
        defaults = graph.get_overridable_initializers()
        self._check_values(
            "input with default", defaults, start=(i64, ""), blend=(f32, ""), drawn=(f32, "B1M")
        )
        outputs = {"logits": (f32, "BTV"), "next_state": (f32, "BS"), "mixing": (f32, "BTM")}
        self._check_values("output", graph.get_outputs(), **outputs)
        ids = np.zeros((1, min(2, size.chunk)), np.int64)
        logits_BTV, state, mixing_BTM = self._run(list(outputs), {"ids": ids, "state": self.zeros()})
        for name, array, shape in (
            ("logits", logits_BTV, (*ids.shape, size.vocab_size)),
            ("next_state", self.download(state), (size.state_size,)),
            ("mixing", mixing_BTM, (*ids.shape, size.mixing_size)),
        ):
            if array.shape != shape or np.isnan(array).any():
                got = array.shape if array.shape != shape else "NaN"
                raise invalid(
                    self._where, f"{name} as the graph computes it", f"numbers of shape {shape}", got
                )

    def _check_values(self, kind: str, values: Iterable[Any], **contract: tuple[str, str]) -> None:
        """Compare values of the graph with the contract's types and shapes; B and T stand for any size."""
        got = {value.name: (value.type, list(value.shape)) for value in values}
        if got.keys() != contract.keys():
            raise invalid(self._where, f"{kind}s of the graph", ", ".join(contract), ", ".join(got) or "none")
        size = self.config
        known = {"S": size.state_size, "V": size.vocab_size, "M": size.mixing_size, "1": 1}
        for name, (kind_of_number, letters) in contract.items():
            number, shape = got[name]
            fits = len(shape) == len(letters) and all(
                not isinstance(dim, int) or dim == known.get(letter, dim)
                for dim, letter in zip(shape, letters, strict=True)
            )
            if number != kind_of_number or not fits:
                expected = f"{kind_of_number} {[known.get(letter, letter) for letter in letters]}"
                raise invalid(self._where, f"{kind} {name} of the graph", expected, f"{number} {shape}")


def _difference(a: Floats, b: Floats) -> float:
    """max |a − b|; 0 only where they are the same, infinities included."""
    if np.array_equal(a, b):
        return 0.0
    with np.errstate(invalid="ignore"):
        return float(np.nan_to_num(np.abs(a - b), nan=np.inf).max())
