"""Text from a bundle.

    gen = Generator.load("model.sdgm")
    for piece in gen.stream("Once upon a time", max_new_tokens=64, temperature=0.8, seed=1):
        print(piece, end="", flush=True)

A generator holds what can be shared (graph, tokenizer, mixture) and nothing of any text: all threads may use
one. Each call, and each session, has a state of its own.

What `prior_strength` costs: 0 leaves the mixture out and costs nothing; "prior" mode draws a mixing vector
for each token and runs the graph once; "posterior" mode runs it twice, first for this context's own vector.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from .atoms import with_atoms
from .bundle import Bundle, read_bundle
from .container import shown
from .encoding import encode
from .engine import Engine, Floats
from .errors import BundleError, ParameterError, StateError
from .generation import Cancel, Generation, Progress, Stream, read
from .mixture import Mixture
from .parameters import SamplingParams
from .prepared import prepare
from .providers import names_cpu
from .scoring import Score, chunk_nlls, score_chunks, with_line_end
from .session import HISTORY, Segment, Session, load_session
from .state_file import Identity
from .text import Vocabulary
from .text import heal as take_back

Prompt = str | Sequence[int] | None


class TokenLogprob(NamedTuple):
    """A token of a text, and how likely it was after all that stands before it."""

    token: int
    """Its id."""
    text: str
    """What it says."""
    logprob: float
    """Natural logarithm of its probability."""


class Generator:
    """A bundle, ready to generate and to score; made by `Generator.load`."""

    def __init__(self, bundle: Bundle, variant: str, engine: Engine) -> None:
        self.bundle, self.variant, self.engine = bundle, variant, engine
        self.vocabulary = Vocabulary(bundle.tokenizer)
        self._identity = Identity(bundle.manifest.model_id, variant)

    @classmethod
    def load(
        cls,
        path: str | Path,
        variant: str | None = None,
        providers: str | Sequence[str] = "auto",
        threads: int | None = None,
        *,
        prepared: bool = False,
        atoms: int | None = None,
    ) -> Self:
        """Read a bundle, check it, and open one of its variants.

        `providers`: "auto" (CUDA where it works, else the CPU), "cpu", "cuda", or a list. `threads`: 1,
        unless more are asked for. `prepared`: run on the CPU with weights that are mapped from the cache in
        the form that this CPU wants (see `prepare`); the first time, they are put there. `atoms`: so many of
        each layer, the strongest, rounded up to whole blocks of weights; all, where there are no more.

        Raises:
            BundleError: the bundle is damaged, lacks the variant, or its atoms cannot be parted.
            CacheError: the prepared form is damaged, others may write to it, or it cannot be written.
            ProviderError: ONNX Runtime is not installed, or a provider that was asked for does not work.
            ParameterError: `providers`, `threads` or `atoms` make no sense.
        """
        bundle = read_bundle(path)
        chosen = bundle.variant(variant)
        if atoms is not None:
            bundle = with_atoms(bundle, atoms, chosen.name)
        where = f"{bundle.path}: {chosen.file}"
        if prepared:
            if providers != "auto" and not names_cpu(providers):
                raise ParameterError(
                    f"providers: expected cpu, which alone takes prepared weights, got {shown(providers)}; "
                    "leave one of them out"
                )
            providers = "cpu"
            graph: Path | bytes = prepare(bundle, chosen.name, thorough=False).graph
        else:
            graph = bundle.graph(chosen.name)
        return cls(
            bundle, chosen.name, Engine(graph, bundle.config, where, providers=providers, threads=threads)
        )

    @property
    def provider(self) -> str:
        """Where the graph runs: cpu, cuda, …"""
        return self.engine.opened.provider

    @property
    def vocab_size(self) -> int:
        """Number of tokens V."""
        return self.bundle.config.vocab_size

    @property
    def atoms(self) -> int | None:
        """How many atoms of each layer there are, where the bundle tells."""
        return self.bundle.atoms

    # Text and tokens

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without the begin token. Raises ParameterError where it is not Unicode."""
        return list(encode(self.bundle.tokenizer, text))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens. Raises ParameterError on ids that the model does not have."""
        ids = list(ids)
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ParameterError(
                f"decode: expected ids from 0 to {self.vocab_size - 1}, got {shown(wrong[0])}; check them"
            )
        text: str = self.bundle.tokenizer.decode(ids, skip_special_tokens=False)
        return text

    # Sessions

    def session(self, *, history: int = HISTORY) -> Session:
        """A new session, which can be rewound by `history` tokens (each costs one state)."""
        begin = Segment(self.engine.zeros(), [self.bundle.generation.begin_token])
        return Session(self.engine, self.bundle.tokenizer, self._identity, [begin], history=history)

    def load_session(self, path: str | Path, *, history: int = HISTORY) -> Session:
        """The session that `Session.save` wrote. Raises StateError on a damaged or foreign one."""
        return load_session(self.engine, self.bundle.tokenizer, self._identity, Path(path), history=history)

    # Generating

    def stream(
        self,
        prompt: Prompt,
        *,
        session: Session | None = None,
        heal: bool = False,
        cancel: Cancel | None = None,
        progress: Progress | None = None,
        **params: Any,
    ) -> Stream:
        """Generate, and give the text in pieces of whole characters as soon as each is certain.

        `prompt`: text or ids; None to go on with `session`, or to begin from nothing. `session`: continue
        this one, and leave it after the last token. `heal`: let the model complete the word that the prompt
        ends in. `cancel`: asked before each token; true ends the text. `progress`: told, as the prompt is
        read, how many of its tokens are, and how many there are (None where that is not known yet, the
        same number at the end). `params`: those of `SamplingParams`, over the bundle's own.

        Raises:
            ParameterError: a parameter is unknown or out of range, or the prompt is empty.
            StateError: `session` is of another model, or of another variant.
        """
        chosen = self._params(params)
        ids, removed = self._read(prompt, heal)
        if session is None:
            session = self.session(history=0)
        elif session.identity != self._identity:
            expected, got = (f"{i.model_id[:16]}… {i.variant}" for i in (self._identity, session.identity))
            raise StateError(
                f"session: of another model or variant: expected {expected}, got {got}; "
                "go on with the generator that made it"
            )
        return self._stream(session, ids, removed, chosen, cancel, progress)

    def generate(
        self,
        prompt: Prompt,
        *,
        session: Session | None = None,
        heal: bool = False,
        callback: Callable[[str], object] | None = None,
        cancel: Cancel | None = None,
        progress: Progress | None = None,
        **params: Any,
    ) -> Generation:
        """Generate the whole text; `callback` is given each piece. Otherwise as `stream`."""
        stream = self.stream(prompt, session=session, heal=heal, cancel=cancel, progress=progress, **params)
        for piece in stream:
            if callback is not None:
                callback(piece)
        return stream.generation

    def candidates(
        self,
        prompt: Prompt,
        n: int,
        *,
        heal: bool = False,
        cancel: Cancel | None = None,
        progress: Progress | None = None,
        **params: Any,
    ) -> list[Generation]:
        """`n` texts for one prompt, which is read once; the i-th is what `seed + i` generates alone.

        To read it is in the timing of none.
        """
        if type(n) is not int or n < 1:
            raise ParameterError(f"n: expected a number of candidates from 1, got {shown(n)}; 1 is usual")
        chosen = self._params(params)
        ids, removed = self._read(prompt, heal)
        session = self.session(history=0)
        _, whole = read(session, ids, cancel, progress)
        generations = []
        for i in range(n):
            seed = None if chosen.seed is None else (chosen.seed + i) % 2**64
            params_i = chosen.replace(seed=seed)
            stream = self._stream(session.fork(), (), removed, params_i, cancel if whole else lambda: True)
            for _ in stream:
                pass
            generations.append(stream.generation)
        return generations

    def batch(
        self,
        prompts: Iterable[str | Sequence[int]],
        *,
        heal: bool = False,
        cancel: Cancel | None = None,
        **params: Any,
    ) -> list[Generation]:
        """One text for each prompt, each as it would be generated alone."""
        if isinstance(prompts, str):
            raise ParameterError("prompts: expected a list of prompts, got one text; use generate for one")
        return [self.generate(prompt, heal=heal, cancel=cancel, **params) for prompt in prompts]

    def _read(self, prompt: Prompt, healing: bool) -> tuple[Iterable[int], bytes]:
        """The ids of a prompt, and the bytes at its end that are to be sampled again."""
        if prompt is None:
            return (), b""
        if not isinstance(prompt, Collection) or isinstance(prompt, bytes | bytearray):
            got = type(prompt).__name__
            raise ParameterError(
                f"prompt: expected text or a list of ids, got {got}; decode bytes to text first"
            )
        if len(prompt) == 0:
            remedy = "give text, or None to begin from nothing"
            raise ParameterError(f"prompt: expected at least one character or id, got none; {remedy}")
        if not isinstance(prompt, str):
            if healing:
                raise ParameterError("heal: expected a prompt of text, got ids; leave one of them out")
            return prompt, b""
        if healing:
            return take_back(self.vocabulary, prompt)
        return encode(self.bundle.tokenizer, prompt), b""

    def _stream(
        self,
        session: Session,
        ids: Iterable[int],
        removed: bytes,
        params: SamplingParams,
        cancel: Cancel | None,
        progress: Progress | None = None,
    ) -> Stream:
        return Stream(
            session,
            self.vocabulary,
            params,
            ids,
            removed=removed,
            end_tokens=self.bundle.generation.end_tokens,
            mixture=self.bundle.mixture,
            cancel=cancel,
            progress=progress,
        )

    # Scoring

    def score(self, text: str) -> Score:
        """How well the model predicts a text: every token scored once, in constant memory."""
        unknown = getattr(self.bundle.tokenizer.model, "unk_token", None)
        unknown_id = self.bundle.tokenizer.token_to_id(unknown) if unknown else None
        seen = False

        def nlls() -> Iterator[NDArray[np.float64]]:
            nonlocal seen
            for ids, nll_T in self._nlls(text if self.vocabulary.byte_level else with_line_end(text)):
                seen = seen or unknown_id in ids
                yield nll_T

        return replace(score_chunks(text, nlls()), has_unk=seen)

    def logprobs(self, text: str) -> list[TokenLogprob]:
        """The log-probability of each token of a text."""
        result: list[TokenLogprob] = []
        for ids, nll_T in self._nlls(text):
            for token, nll in zip(ids, nll_T.tolist(), strict=True):
                says = self.vocabulary.following if result else self.vocabulary.first
                result.append(TokenLogprob(token, says[token].decode("utf-8", "replace"), -nll))
        return result

    def mixing(self, text: str) -> tuple[list[int], Floats]:
        """The tokens of a text, and the mixing vector at each, (T, M)."""
        chunks = list(self._mixing(text))
        if not chunks:
            raise ParameterError("text: expected at least one token, got none; give a text that is not empty")
        return [i for ids, _ in chunks for i in ids], np.concatenate([c_TM for _, c_TM in chunks])

    def mixture(self, asked_for: str) -> Mixture:
        """The mixture over mixing vectors, which `asked_for` needs.

        Raises:
            BundleError: the bundle has none.
        """
        if self.bundle.mixture is None:
            raise BundleError(
                f"{self.bundle.path}: {asked_for}: expected a mixture, got a bundle without gmm.npz; "
                "train the model with a prior, and export it again"
            )
        return self.bundle.mixture

    def typicality(self, text: str) -> NDArray[np.float64]:
        """log p(c) of the mixing vector at each token, (T,): low where the model is on unfamiliar ground."""
        mixture = self.mixture("typicality")
        return np.concatenate([np.zeros(0), *(mixture.log_density(c_TM) for _, c_TM in self._mixing(text))])

    def _nlls(self, text: str) -> Iterator[tuple[list[int], NDArray[np.float64]]]:
        chunks = self._chunks(text, self.engine.chunk)
        return chunk_nlls(self.engine, chunks, self.bundle.generation.begin_token)

    def _mixing(self, text: str) -> Iterator[tuple[list[int], Floats]]:
        _, state = self.engine.last([self.bundle.generation.begin_token], self.engine.zeros())
        for ids in self._chunks(text, self.engine.chunk):
            c_TM, state = self.engine.mixing(ids, state)
            yield ids, c_TM

    def _chunks(self, text: str, size: int) -> Iterator[list[int]]:
        ids = encode(self.bundle.tokenizer, text)
        while chunk := list(islice(ids, size)):
            yield chunk

    def _params(self, given: dict[str, Any]) -> SamplingParams:
        params = self.bundle.generation.sampling.replace(**given)
        if params.prior_strength:
            self.mixture("prior_strength").check_steer(params.steer)
        if params.draft:
            self._check_draft(params.draft)
        return params

    def _check_draft(self, draft: int) -> None:
        most = min(draft + 1, self.engine.chunk)
        if off := self.engine.differs(most):
            again = "export the bundle again with --drafts"
            if self.variant == "q4":
                again += ", which in 4 bits serves where there is AVX-512 VNNI"
            other = again if self.variant in ("int8", "q4") else "try another variant"
            raise ParameterError(
                f"draft: expected a graph that gives for {most} tokens at once what it gives one by one, got "
                f"one ({self.variant} on {self.provider}) that is off by {off:.2g}: the text would change; "
                f"leave draft out, or {other}"
            )
