"""Request and response schemas. `/v1/rerank`, `/pooling` and `/classify` follow Jina and vLLM."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from tracereward.messages import REASONING_FIELDS

Text = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, strict=True)]


class Strict(BaseModel):
    """A request in tracereward's own format: unknown fields are rejected by name."""

    model_config = ConfigDict(extra="forbid")


class Lenient(BaseModel):
    """A request in another server's format. A field that the server does not read is accepted only if it changes
    nothing, and rejected by name otherwise: null and empty values change nothing, nor do the following.

    Attributes:
        ignored: fields that never change a score.
        neutral: fields with the value that asks for what the server does anyway.
    """

    model_config = ConfigDict(extra="forbid")
    ignored: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[dict[str, Any]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {
            name: value
            for name, value in given.items()
            if name in cls.model_fields or (name not in cls.ignored and matters(value, cls.neutral.get(name)))
        }


def matters(value: Any, neutral: Any = None) -> bool:
    """Whether the value of a field that is not read asks for anything; `neutral` asks for what happens anyway."""
    return value is not None and value not in ([], {}, "") and (type(value) is not type(neutral) or value != neutral)


ABOUT_REQUEST = frozenset({"user", "priority", "request_id", "metadata"})


class TextPart(BaseModel):
    """A text part of a message; other types are not supported."""

    type: Literal["text"] = "text"
    text: str


def _joined(content: Any) -> Any:
    """Join a list of text parts; return other content unchanged for the validator."""
    if not isinstance(content, list):
        return content
    for index, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"part {index} is of type {kind!r:.40}: only text parts can be scored")
    return "".join(part["text"] for part in content)


class Message(Lenient):
    """A chat message. The assistant's may have its reasoning in a field of its own."""

    role: Text
    content: Annotated[str, BeforeValidator(_joined, json_schema_input_type=str | list[TextPart])]
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _reasoning_alone(cls, given: Any) -> Any:
        """A message may have reasoning and no content."""
        if isinstance(given, dict) and given.get("content") is None and any(map(given.get, REASONING_FIELDS)):
            return {**given, "content": ""}
        return given

    @model_validator(mode="after")
    def _one_reasoning(self) -> Self:
        given = {getattr(self, name) for name in REASONING_FIELDS} - {None, ""}
        if given and self.role != "assistant":
            raise ValueError("only the assistant's messages have reasoning")
        if len(given) > 1:
            raise ValueError(f"give the reasoning in one of {', '.join(REASONING_FIELDS)}")
        return self

    def fields(self) -> dict[str, str]:
        """The fields that the message has."""
        return self.model_dump(exclude_none=True)


Prompt = Text | Annotated[list[Message], Field(min_length=1)]


class ScoreRequest(Strict):
    """Traces of one prompt: a completion, candidates, or the steps of one trace."""

    model: str | None = None
    prompt: Prompt = Field(description="As in training, including the task's instructions; or messages.")
    completion: Text | None = None
    candidates: Annotated[list[Text], Field(min_length=1)] | None = None
    steps: Annotated[list[Text], Field(min_length=1)] | None = Field(
        None, description="Joined as the reward model cuts steps."
    )
    finished: bool = Field(True, description="Whether the traces end with the end of sequence, not at a length limit.")
    tokens: bool = Field(True, description="Also return each token's text, offsets and reward.")

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if sum(value is not None for value in (self.completion, self.candidates, self.steps)) != 1:
            raise ValueError("give one of completion, candidates and steps")
        return self


class Score(BaseModel):
    """Rewards of one trace, in log-odds; see `tracereward score`."""

    index: int
    reward: float
    probability: float | None = Field(None, description="That the trace is correct; calibrated reward models only.")
    aggregates: dict[str, float]
    parts: dict[str, float] | None = Field(None, description="Of thinking and answer; only of traces that think.")
    step_rewards: list[float]
    suspected_error: int | None = Field(
        None,
        description="Index of the suspected first wrong step, or null; only of reward models with a rule for it.",
    )
    tokens: list[str] | None = None
    offsets: list[tuple[int, int]] | None = None
    token_rewards: list[float] | None = None
    step_ends: list[bool] | None = Field(None, description="Whether the token is the last of a step.")


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int


class ScoreResponse(BaseModel):
    """Scores in the order of the traces."""

    model: str
    results: list[Score]
    usage: Usage


class Document(BaseModel):
    """A document as an object: its text is scored; its other fields are data of the client and returned."""

    model_config = ConfigDict(extra="allow")

    text: Text


class RerankRequest(Lenient):
    """Request of Jina and Cohere: documents are candidates, the query is the prompt."""

    ignored = ABOUT_REQUEST
    neutral = {"rank_fields": ["text"], "truncation": False}

    model: str | None = None
    query: Prompt
    documents: Annotated[list[Text | Document], Field(min_length=1)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = True


class Ranked(BaseModel):
    """One ranked document."""

    index: int
    relevance_score: float = Field(description="In [0, 1]: the calibrated probability, else sigmoid of the reward.")
    reward: float
    document: Document | None = None


class RerankResponse(BaseModel):
    """Documents, best first."""

    id: str
    model: str
    object: Literal["list"] = "list"
    usage: Usage
    results: list[Ranked]


class ClassifyRequest(Lenient):
    """Request of vLLM: texts or their token ids, or a conversation whose last message is the assistant's trace."""

    ignored = ABOUT_REQUEST
    neutral = {"add_special_tokens": True, "add_generation_prompt": False, "continue_final_message": False}

    model: str | None = None
    input: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[list[TokenId]], Field(min_length=1)]
        | None
    ) = None
    messages: Annotated[list[Message], Field(min_length=2)] | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.input is None) == (self.messages is None):
            raise ValueError("give one of input and messages")
        if self.messages is not None and self.messages[-1].role != "assistant":
            raise ValueError("the last message must be the assistant's")
        return self

    @property
    def inputs(self) -> list[str] | list[list[int]]:
        """`input` as a list; a single text or list of ids is wrapped."""
        given: Any = self.input
        return [given] if isinstance(given, str) or isinstance(given[0], int) else given


class PoolingRequest(ClassifyRequest):
    """Request of vLLM."""

    encoding_format: Literal["float", "base64"] = Field(
        "float", description="base64: of little-endian float32 values, one per token."
    )


class Pooled(BaseModel):
    """Token rewards of one input: one row per token, with one number."""

    index: int
    object: Literal["pooling"] = "pooling"
    data: list[list[float]] | str


class PoolingResponse(BaseModel):
    """Response of vLLM."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Pooled]
    usage: Usage


class Class(BaseModel):
    """Expert or policy, by the sigmoid of the trace reward."""

    index: int
    label: Literal["policy", "expert"]
    probs: list[float]
    num_classes: int = 2


class ClassifyResponse(BaseModel):
    """Response of vLLM."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Class]
    usage: Usage


class ErrorBody(BaseModel):
    """OpenAI's error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """Every error has this shape."""

    error: ErrorBody


class Selection(Strict):
    """How the proxy selects: the field ``tracereward`` of a request."""

    n: Annotated[int, Field(ge=1)] | None = Field(None, description="Number of samples to request from the upstream.")
    method: Literal["vote", "sigmoid_vote", "reward", "majority", "shortest"] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="Sampling temperature; at 0 all samples are identical."
    )


def _only(prompt: Any) -> Any:
    """Unwrap a list of one text."""
    if isinstance(prompt, list):
        if len(prompt) != 1:
            raise ValueError(f"give one text, not {len(prompt)} texts")
        return prompt[0]
    return prompt


class StreamOptions(Lenient):
    """OpenAI's stream options."""

    ignored = frozenset({"include_obfuscation"})
    neutral = {"continuous_usage_stats": False}

    include_usage: bool | None = Field(None, strict=True)


class Proxied(BaseModel):
    """The fields that the proxy reads. All other fields are forwarded to the upstream unchanged."""

    model_config = ConfigDict(extra="allow")

    model: str | None = Field(None, description="The model's name on the upstream.")
    n: Annotated[int, Field(ge=1, strict=True)] | None = Field(None, description="Number of choices to return.")
    stream: Annotated[bool, Field(strict=True)] | None = None
    stream_options: StreamOptions | None = None
    seed: Annotated[int, Field(strict=True)] | None = None
    temperature: Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)] | None = None
    tracereward: Selection | None = Field(None, description="Number of samples and selection method.")


class ChatRequest(Proxied):
    """OpenAI's chat completion."""

    messages: Annotated[list[Message], Field(min_length=1)]
    continue_final_message: Annotated[bool, Field(strict=True)] | None = None
    add_generation_prompt: Annotated[bool, Field(strict=True)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(Proxied):
    """OpenAI's completion."""

    prompt: Annotated[Text, BeforeValidator(_only, json_schema_input_type=Text | list[Text])] = Field(
        description="One text, or a list of one."
    )


JsonObject = dict[str, Any]
