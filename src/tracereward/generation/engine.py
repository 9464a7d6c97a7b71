"""What samples completions: transformers in this process, vLLM in this process, or an OpenAI-compatible server.

All engines have one method, `Engine.sample`: prompts in, the completions of each prompt out as they are finished. The
transformers engine is here; the others are in `vllm_engine` and `server_engine`, which import their packages.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tracereward.errors import InputError, RunFailed, check_choice
from tracereward.generation.params import SamplingParams
from tracereward.generation.sampling import Sample, sample

LOCAL = ("transformers", "vllm")
APIS = ("completions", "chat")
MESSAGE = Mapping[str, Any]
Prompt = str | Sequence[MESSAGE]
"""A rendered text, or the messages of a conversation, which only a server takes: it has a chat template."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Where completions are sampled.

    Attributes:
        name: transformers, vllm, or the base URL of an OpenAI-compatible server.
        api: of a server: completions (texts) or chat (messages); None is decided by the data and the model.
        concurrency: of a server: requests in flight.

    Raises:
        InputError: no such engine, or no address of a server.
    """

    name: str = "transformers"
    api: str | None = None
    concurrency: int = 32

    def __post_init__(self) -> None:
        if self.api is not None:
            check_choice("--api", self.api, APIS)
        if not self.is_server:
            check_choice("engine", self.name, [*LOCAL, "the URL of a server"])
            return
        try:
            parts = urlsplit(self.name)
            whole = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 80) < 65536
            valid = whole and not parts.query and not parts.fragment
        except ValueError:
            valid = False
        if not valid:
            raise InputError(f"--engine {self.name}: give the full address, e.g. http://127.0.0.1:8000/v1")

    @property
    def is_server(self) -> bool:
        """Whether requests over HTTP sample the completions."""
        return "://" in self.name

    def questions_together(self, sampling: SamplingParams, n: int) -> int:
        """Questions whose completions share random numbers: an unfinished output is resumed after complete ones.

        A batch of transformers has one random seed; the other engines have one for each question.
        """
        return sampling.prompts_together(n) if self.name == "transformers" else 1


class Answer(Protocol):
    """A completion of any engine: a `Sample`, or a `server_engine.Answered`, of which a server may not tell all."""

    @property
    def prompt(self) -> int:
        """Index of its prompt."""
        ...

    @property
    def text(self) -> str:
        """Without special tokens."""
        ...

    @property
    def finished(self) -> bool:
        """Whether it ended by itself, not at the length limit."""
        ...

    @property
    def length(self) -> int | None:
        """Number of its tokens with the end of sequence; None if the server does not tell."""
        ...

    @property
    def logprob(self) -> float | None:
        """Mean log-prob of its tokens; None if the server does not tell."""
        ...


class Engine(Protocol):
    """Samples completions."""

    def sample(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        n: int = 1,
        done: Collection[int] = (),
        before: int | None = None,
    ) -> Iterator[Sequence[Answer]]:
        """Sample `n` completions of each prompt whose index is not in `done`.

        Of a stream, `prompts` are a window and `before` is the number of prompts before it: the index of the first.
        Otherwise it is None, and the first has the index 0.

        Yields:
            Completions of one or several prompts, those of a prompt together; prompts in any order.

        Raises:
            Unanswered: after everything else, if prompts have no completions.
        """
        ...

    def cost(self) -> str:
        """One line about the tokens that `sample` has read and written since the last call; "" if nobody counts."""
        ...


class Unanswered(RunFailed):
    """Prompts whose completions cannot be had.

    Attributes:
        reasons: by index of the prompt.
        given_up: whether further prompts were not asked, as nothing succeeded any more.
    """

    def __init__(self, reasons: Mapping[int, str], given_up: bool = False):
        super().__init__(f"{len(reasons)} prompts have no completions: {next(iter(reasons.values()), '')}")
        self.reasons, self.given_up = reasons, given_up


@dataclass(frozen=True)
class TransformersEngine:
    """A loaded policy that samples with transformers' `generate`.

    Attributes:
        model: the policy.
        tokenizer: its tokenizer.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def sample(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        n: int = 1,
        done: Collection[int] = (),
        before: int | None = None,
    ) -> Iterator[list[Sample]]:
        """See `Engine` and `sampling.sample`; the prompts are texts, and `done` are the first complete chunks."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        first = max(0, len(done) - (before or 0)) // params.prompts_together(n)
        return sample(self.model, self.tokenizer, texts, params, n=n, first_chunk=first, before=before)

    def cost(self) -> str:
        """See `Engine`: nothing is counted."""
        return ""
